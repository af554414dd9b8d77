"""What the report shows, in order, and the page that shows it. Text reaches the page through autoescaping alone.

write_report("runs/dpo")                  # -> runs/dpo/report.html, with the runs it goes back to
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pivot.config import COMPONENTS
from pivot.config_load import to_yaml
from pivot.data.images import ImageError, decode_rgb
from pivot.data.shards import DamagedSample, ShardSet
from pivot.evaluate.intervals import Interval
from pivot.evaluate.outcomes import compare, read_outcomes
from pivot.evaluate.task import Measure
from pivot.evaluate.tasks import titled_measures
from pivot.evaluate.vqa import BLIND, VQA
from pivot.report.charts import Chart, Series, format_number, interval_bar
from pivot.report.read import LogRow, ReportedRun, find_previous, read_run
from pivot.run.spent import describe_spent
from pivot.system.files import write_atomically
from pivot.system.redact import redact

MAX_SHOWN = 12  # sample scenes at once; the others fold away
THUMBNAIL = 320  # pixels
MAX_LISTED = 8  # steps that went wrong


class Moment(NamedTuple):
    """A point in the chain of runs at which the held-out set was scored."""

    label: str
    run: ReportedRun
    row: LogRow


@dataclass(frozen=True)
class Headline:
    """A held-out share over the chain."""

    title: str
    meaning: str
    labels: list[str]  # of the moments
    cells: list[Interval | None]  # one per moment
    change: Interval | None  # the newest run's own, paired
    blind: float | None

    @property
    def shown(self) -> list[Interval]:
        return [cell for cell in self.cells if cell is not None]

    @property
    def bar(self) -> Markup:
        labels = [label for label, cell in zip(self.labels, self.cells, strict=True) if cell is not None]
        return interval_bar(self.shown, labels, level=self.blind)

    @property
    def verdict(self) -> str:
        """What the change amounts to, given its noise."""
        if self.change is None:
            return ""
        if self.change.low <= 0 <= self.change.high:
            return "within noise"
        return "better" if self.change.value > 0 else "worse"


def write_report(run_folder: str | Path, previous: Sequence[str | Path] | None = None) -> Path:
    """Write RUN/report.html and give its path. `previous`: earlier stages, oldest first; None: those in init_from."""
    run = read_run(run_folder)
    chain = find_previous(run) if previous is None else [read_run(folder) for folder in previous]
    path = run.folder / "report.html"
    write_atomically(path, render(run, chain))
    return path


def render(run: ReportedRun, chain: Sequence[ReportedRun]) -> str:
    environment = Environment(
        loader=PackageLoader("pivot.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": format_number, "percent": _percent, "points": _points, "duration": _duration}
    environment.filters |= {"image": Images(run.config.data.eval)}
    moments = _moments(run, chain)
    scenes = _scenes(moments)
    return environment.get_template("page.html.j2").render(
        run=run,
        stages=[*chain, run],
        moments=moments,
        headlines=_headlines(moments),
        plain_rows=_plain_rows(moments, run),
        kinds=_kinds(moments),
        blind=next((m.row[BLIND] for m in reversed(moments) if BLIND in m.row), None),
        scenes=scenes[:MAX_SHOWN],
        more_scenes=scenes[MAX_SHOWN:],
        held_out_charts=_held_out_charts(run),
        training_charts=[(stage, _training_charts(stage)) for stage in (run, *reversed(chain))],
        facts=_facts(run),
        config=to_yaml(run.config),
        components=COMPONENTS,
    )


# -- held out ------------------------------------------------------------------------------------------------------


def _moments(run: ReportedRun, chain: Sequence[ReportedRun]) -> list[Moment]:
    """Before the first run that was scored on the same held-out set, and after each that was."""
    moments: list[Moment] = []
    for stage in (*chain, run):
        if not stage.evaluations or stage.config.data.eval != run.config.data.eval:
            continue
        first, last = stage.evaluations[0], stage.evaluations[-1]
        if not moments:
            label = "untrained" if stage.config.init_from is None else f"before {stage.name}"
            moments.append(Moment(label, stage, first))
        if last["step"] > first["step"]:
            moments.append(Moment(f"after {stage.name}", stage, last))
    return moments


def _headlines(moments: list[Moment]) -> list[Headline]:
    headlines, labels = [], [moment.label for moment in moments]
    for measure in titled_measures():
        cells = [_interval(moment.row, measure) for moment in moments]
        if measure.is_share and any(cells):
            change, blind = _change(moments, measure.key), _blind(moments, measure)
            headlines.append(Headline(measure.title, measure.meaning, labels, cells, change, blind))
    return headlines


def _blind(moments: list[Moment], measure: Measure) -> float | None:
    """What can be had without looking at the image, where that is known."""
    told = (moment.row.get(f"{measure.key}_blind") for moment in reversed(moments))
    return next((blind for blind in told if blind is not None), measure.chance)


def _plain_rows(moments: list[Moment], run: ReportedRun) -> list[tuple[str, list[float | None]]]:
    """What is no share: of the newest run alone, since another's beta or objective makes other numbers."""
    rows = []
    plain = [(measure.key, measure.title) for measure in titled_measures() if not measure.is_share]
    for metric, title in (*plain, ("eval/loss", "Loss")):
        cells = [moment.row.get(metric) if moment.run is run else None for moment in moments]
        if any(cell is not None for cell in cells):
            rows.append((title, cells))
    return rows


def _kinds(moments: list[Moment]) -> list[tuple[str, list[float | None]]]:
    """Answer accuracy per kind of question, where the samples tell their kind."""
    prefix = f"{VQA}/"
    names = sorted({key for moment in moments for key in moment.row if key.startswith(prefix)})
    return [(name.removeprefix(prefix), [moment.row.get(name) for moment in moments]) for name in names]


def _interval(row: LogRow, measure: Measure) -> Interval | None:
    value = row.get(measure.key)
    if measure.own_reference and row["step"] == 0:
        return None  # the policy is its own reference: every pair is a tie
    if measure.key in row.get("intervals", {}):
        return Interval(*row["intervals"][measure.key])
    return Interval(value, value, value) if isinstance(value, int | float) else None


def _change(moments: list[Moment], metric: str) -> Interval | None:
    """What the newest stage changed, sample by sample."""
    if len(moments) < 2:
        return None
    try:
        before, after = (read_outcomes(m.run.folder, m.row["step"]) for m in moments[-2:])
        return compare(before, after, metric)
    except (OSError, ValueError, KeyError, IndexError, TypeError, BadZipFile):
        return None  # a file in held_out/ is damaged; the shares themselves stand in the log


def _held_out_charts(run: ReportedRun) -> list[Chart]:
    def series(name: str, colour: int, key: str, *, from_start: bool = True) -> Series:
        xs, ys = run.series(key, held_out=True)
        if not from_start and xs[:1] == [0]:
            xs, ys = xs[1:], ys[1:]
        rows = [row for row in run.evaluations if isinstance(row.get(key), int | float)]
        spread = [tuple(row["intervals"][key][1:]) for row in rows if key in row.get("intervals", {})]
        return Series(name, colour, xs, ys, spread=spread if len(spread) == len(xs) else None)

    shares = [
        series(measure.legend, colour, measure.key, from_start=not measure.own_reference)
        for colour, measure in enumerate((measure for measure in titled_measures() if measure.is_share), start=1)
    ]
    charts = [
        Chart("Held-out accuracy", [s for s in shares if s.xs], "bars: 95 % intervals"),
        Chart("Held-out loss", [series("loss", 1, "eval/loss")]),
        Chart("Held-out rewards", _pair_series(series, "eval/rewards/")),
        Chart("Held-out log-probability", _pair_series(series, "eval/logps/"), "nat per answer"),
    ]
    return [chart for chart in charts if not chart.is_empty and len(run.evaluations) > 1]


def _pair_series(series: Any, prefix: str) -> list[Series]:
    curves = [series("chosen", 1, f"{prefix}chosen"), series("rejected", 2, f"{prefix}rejected")]
    if "rewards" in prefix:
        curves.append(series("margin", 3, f"{prefix}margins"))
    return [curve for curve in curves if curve.xs]


# -- training ------------------------------------------------------------------------------------------------------


def _training_charts(run: ReportedRun) -> list[Chart]:
    def series(name: str, colour: int, key: str) -> Series:
        return Series(name, colour, *run.series(key), smooth=True)

    def per_component(prefix: str, *, smooth: bool) -> list[Series]:
        curves = [Series(c, i + 1, *run.series(f"{prefix}/{c}"), smooth=smooth) for i, c in enumerate(COMPONENTS)]
        return [curve for curve in curves if curve.xs]

    terms = [series(key.removeprefix("loss/"), 2 + i, key) for i, key in enumerate(run.keys("loss/")[:5])]
    charts = [
        Chart("Loss", [series("loss", 1, "loss"), *terms], _list_trouble(run)),
        Chart("Reward accuracy", [series("share of pairs", 1, "rewards/accuracies")], bounds=(0, 1), level=0.5),
        Chart("Rewards", _pair_series(series, "rewards/"), "beta times the log ratio to the reference"),
        Chart("Log-probability", _pair_series(series, "logps/"), "nat per answer"),
        Chart("KL", [series("kl", 1, "kl")], "nat per answer to another prompt: what KTO measures gains from"),
        Chart("Learning rate", per_component("lr", smooth=False), peak=True),
        Chart("Gradient norm", [*per_component("grad_norm", smooth=True), series("all", 4, "grad_norm")], log=True),
        Chart("Update ratio", per_component("update_ratio", smooth=True), "|update| / |weights| of a step", log=True),
        Chart("Throughput", [series("pairs per second", 1, "perf/pairs_per_s")]),
        Chart("Tokens", [series("tokens per second", 3, "perf/tokens_per_s")]),
    ]
    return [chart for chart in charts if not chart.is_empty]


def _list_trouble(run: ReportedRun) -> str:
    """Of the loss: where it rose far above the steps before, and where it or the gradient was not finite."""
    kinds = {"spikes at": run.spikes, "not finite at": run.skipped}
    return "; ".join(f"{kind} {_list_steps(rows)}" for kind, rows in kinds.items() if rows)


def _list_steps(rows: Sequence[LogRow]) -> str:
    """step 3, 31, 32 and 7 more"""
    shown = ", ".join(f"{row['step']:,}" for row in rows[:MAX_LISTED])
    more = f" and {len(rows) - MAX_LISTED:,} more" if len(rows) > MAX_LISTED else ""
    return f"step {shown}{more}" if rows else "none"


# -- sample scenes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A held-out question, and what was said to it at each moment."""

    row: int
    question: str
    answer: str
    said: list[tuple[str, LogRow]]  # (label, row of samples.jsonl)

    @property
    def rank(self) -> int:
        """Which to show first: what training mended, what it broke, what is still wrong, what was always right."""
        before, after = (bool(self.said[i][1]["right"]) for i in (0, -1))
        return {(False, True): 0, (True, False): 1, (False, False): 2, (True, True): 3}[before, after]


def _scenes(moments: list[Moment]) -> list[Scene]:
    if not moments:
        return []
    newest = moments[-1]
    rows = [row for step, row in newest.run.answers if step == newest.row["step"]]
    scenes = []
    for row in rows:
        said = [(m.label, m.run.answers.get((m.row["step"], row))) for m in moments]
        known = [(label, answer) for label, answer in said if answer is not None]
        scenes.append(Scene(row, known[-1][1]["question"], known[-1][1]["answer"], known))
    return _mixed(scenes)


def _mixed(scenes: list[Scene]) -> list[Scene]:
    """Half of the first ones changed for the better where there are so many; the other kinds take turns."""
    kinds: list[list[Scene]] = [[scene for scene in scenes if scene.rank == rank] for rank in range(4)]
    order = [0, 1, 0, 2, 0, 3]
    mixed: list[Scene] = []
    while any(kinds):
        mixed += [kinds[rank].pop(0) for rank in order if kinds[rank]]
    return mixed


class Images:
    """The first image of a row as a data URI, drawn anew: no byte of a file goes into the page unseen."""

    def __init__(self, data: str | None) -> None:
        try:
            self._shards = ShardSet.open(data) if data is not None else None
        except (ValueError, OSError):
            self._shards = None  # the set has moved; the words remain

    def __call__(self, row: int) -> str | None:
        if self._shards is None or row >= len(self._shards):
            return None
        try:
            _, files = self._shards.read(row)
            image = Image.fromarray(decode_rgb(files[0]))
        except (DamagedSample, ImageError, ValueError, IndexError):
            return None
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        small, buffer = max(image.size) <= 128, io.BytesIO()
        image.save(buffer, "PNG" if small else "JPEG", quality=85)
        return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -- facts ---------------------------------------------------------------------------------------------------------


def _facts(run: ReportedRun) -> list[tuple[str, str]]:
    start, config = run.start, run.config
    parameters = start.get("num_parameters", {})
    excluded = ", ".join(f"{count or 0:,} {reason}" for reason, count in start.get("exclusions", {}).items())
    newest = run.evaluations[-1] if run.evaluations else {}
    perf = run.steps[-1] if run.steps else {}
    others = ", ".join(f"{count:,} of {name}" for name, count in run.passed_over.items() if count)
    masked = sum(int(row.get("masked") or 0) for row in run.steps)
    facts = [
        ("training data", f"{config.data.train}, {start.get('num_pairs') or 0:,} samples"),
        ("excluded", excluded or "none"),
        ("damaged samples", f"{masked:,}" if masked else "none"),
        ("steps that were not finite", _list_steps(run.skipped)),
        ("spikes of the loss", _list_steps(run.spikes)),
        ("held-out data", config.data.eval or "none"),
        ("held-out samples", f"{newest.get('eval/num_samples') or 0:,.0f}" if newest else "-"),
        ("questions", f"{newest.get('eval/num_questions') or 0:,.0f}" if newest else "-"),
        ("parameters", f"{sum(count or 0 for count in parameters.values()):,}"),
        *((name.replace("_", " "), f"{count or 0:,}") for name, count in parameters.items()),
        ("ranks", f"{start.get('world_size', '?')} on {start.get('device', '?')}".replace("cuda:0", "cuda")),
        ("ZeRO stage", str(start.get("zero_stage", "?"))),
        ("precision", str(start.get("dtype", "?")).removeprefix("torch.")),
        ("memory", f"{perf['perf/peak_memory_gib']:.1f} GiB a rank" if perf.get("perf/peak_memory_gib") else "-"),
        ("useful share of the matrix rate", f"{100 * perf['perf/mfu']:.1f} %" if perf.get("perf/mfu") else "-"),
        ("saving", _describe_saving(run)),
        ("spent", describe_spent(run.end, run.objective.unit_name) if "flops" in run.end else "-"),
        *([("lines passed over", f"{others}: not what a run writes, or cut short")] if others else []),
        ("seed", str(config.train.seed)),
        ("data plan", str(start.get("plan_fingerprint", "-"))[:16]),
        *((f"{name} version", str(version)) for name, version in start.get("versions", {}).items()),
    ]
    return [(name, redact(value)) for name, value in facts]


def _describe_saving(run: ReportedRun) -> str:
    if not run.saves:
        return "-"
    waited, longest = sum(row["wait_s"] for row in run.saves), max(row["write_s"] for row in run.saves)
    return (
        f"{len(run.saves):,} checkpoints, training waited {_duration(waited)}; the longest write took {longest:.1f} s"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
