"""The table of a sweep: what each setting gave, over its seeds, and what it changed against the first setting.

A setting is all values of the grid but the seed. Several seeds of one are runs, and the interval is a t interval over
them; with one seed it is over the held-out samples, which says nothing about another run: the table names which it is.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pivot.evaluate.intervals import Interval, change_text, difference_of_means, mean_of_runs, share_text
from pivot.evaluate.outcomes import compare, read_outcomes
from pivot.evaluate.tasks import compared_measures
from pivot.report.read import ReportedRun, read_run
from pivot.system.files import write_atomically

SEED = "train.seed"


@dataclass(frozen=True)
class Setting:
    """One row: what was set, and its runs by seed."""

    values: dict[str, str]
    runs: dict[str, ReportedRun]  # seed, "" where the grid has none -> run

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.values.items()) or "the config"

    def results(self, key: str) -> dict[str, float]:
        """Seed -> the last held-out value of a metric, of the runs that have one."""
        found = {seed: run.series(key, held_out=True)[1] for seed, run in self.runs.items()}
        return {seed: values[-1] for seed, values in found.items() if values}


def write_tables(cells: Sequence[tuple[dict[str, str], Path]], folder: Path) -> str:
    """Write `folder`/table.csv, table.md and table.png of the runs (their values of the grid, their folder) that have
    begun; the Markdown, and where the files are."""
    settings = group(cells)
    keys = [m.key for m in compared_measures() if any(setting.results(m.key) for setting in settings)]
    folder.mkdir(parents=True, exist_ok=True)
    text = describe(settings, keys)
    write_atomically(folder / "table.csv", as_csv(settings, keys))
    write_atomically(folder / "table.md", text + "\n")
    files = ["table.csv", "table.md"] + (["table.png"] if draw(settings, keys, folder / "table.png") else [])
    return f"{text}\n\nwritten    {', '.join(files)} in {folder}"


def group(cells: Sequence[tuple[dict[str, str], Path]]) -> list[Setting]:
    """Runs that differ in their seed alone are one setting; those that have not begun are left out."""
    settings: dict[tuple[str, ...], Setting] = {}
    for values, folder in cells:
        if not (folder / "log.jsonl").is_file():
            continue
        others = {key: value for key, value in values.items() if key != SEED}
        setting = settings.setdefault(tuple(others.values()), Setting(others, {}))
        setting.runs[values.get(SEED, "")] = read_run(folder)
    return list(settings.values())


def describe(settings: list[Setting], keys: list[str]) -> str:
    """The table in Markdown."""
    lines = ["| setting | runs |" + "".join(f" {key.removeprefix('eval/')} | change |" for key in keys)]
    lines.append("|---|---|" + "---|---|" * len(keys))
    for setting in settings:
        done = sum(run.status.get("status") == "done" for run in setting.runs.values())
        cells = [text for key in keys for text in (_value(setting, key), _change(settings[0], setting, key))]
        runs = f"{done}" if done == len(setting.runs) else f"{done} of {len(setting.runs)} done"
        lines.append("| " + " | ".join([setting.name, runs, *cells]) + " |")
    many = any(len(setting.runs) > 1 for setting in settings)
    over = "over runs (t)" if many else "over held-out samples of one run, which is not what another seed would give"
    lines += ["", f"[..] is the 95 % interval {over}. Change: against the first setting, paired by seed."]
    return "\n".join(lines)


def _value(setting: Setting, key: str) -> str:
    results = setting.results(key)
    if len(setting.runs) > 1:
        interval = mean_of_runs(list(results.values()))
        return "" if not results else share_text(interval) if interval else f"{next(iter(results.values())):.3f}"
    run = next(iter(setting.runs.values()))
    row = next((row for row in reversed(run.evaluations) if row.get(key) is not None), {})
    ends = row.get("intervals", {}).get(key)
    return share_text(Interval(*ends)) if ends else f"{row[key]:.3f}" if key in row else ""


def _change(base: Setting, setting: Setting, key: str) -> str:
    if setting is base:
        return ""
    if len(setting.runs) > 1:
        before, after = base.results(key), setting.results(key)
        shared = [seed for seed in before if seed in after]
        interval = difference_of_means([before[seed] for seed in shared], [after[seed] for seed in shared])
        return change_text(interval) if interval else ""
    ends = [next(iter(one.runs.values())) for one in (base, setting)]
    outcomes = [read_outcomes(run.folder, int(run.evaluations[-1]["step"])) if run.evaluations else {} for run in ends]
    paired = compare(outcomes[0], outcomes[1], key)
    return "" if paired is None else change_text(paired)


def as_csv(settings: list[Setting], keys: list[str]) -> str:
    """A line a run, for other tools."""
    text = io.StringIO()
    names = list(settings[0].values) if settings else []
    table = csv.writer(text)
    table.writerow([*names, SEED, "folder", "status", "step", *keys])
    for setting in settings:
        for seed, run in setting.runs.items():
            step = run.evaluations[-1]["step"] if run.evaluations else ""
            values = [setting.results(key).get(seed, "") for key in keys]
            table.writerow([*setting.values.values(), seed, run.folder, run.status.get("status", ""), step, *values])
    return text.getvalue()


def draw(settings: list[Setting], keys: list[str], path: Path) -> bool:
    """A panel a metric: every run as a point, a setting's mean with its interval; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not keys:
        return False
    figure = Figure(figsize=(4.5 * len(keys), 1.0 + 0.5 * len(settings)), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False, sharey=True)[0]
    for panel, key in zip(panels, keys, strict=True):
        for height, setting in enumerate(settings):
            values = list(setting.results(key).values())
            panel.plot(values, [height] * len(values), "o", color="0.6")
            interval = mean_of_runs(values)
            if interval is not None:
                panel.plot([interval.low, interval.high], [height, height], "-", color="C0")
                panel.plot([interval.value], [height], "D", color="C0")
        panel.set_xlabel(key.removeprefix("eval/"))
        panel.set_yticks(range(len(settings)), [setting.name for setting in settings])
        panel.invert_yaxis() if panel is panels[0] else None
    figure.savefig(path, dpi=150)
    return True
