"""A run's folder as the report needs it: log, settings, kept answers. A row that a resume repeated counts once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pivot.config import Config
from pivot.config_load import read_settings
from pivot.objectives import Objective, objective_class
from pivot.report.rows import LogRow, is_log_row, is_sample, read_rows
from pivot.run.status import RUNNING, last_sign
from pivot.system.files import read_object


@dataclass(frozen=True)
class ReportedRun:
    folder: Path
    config: Config
    start: LogRow  # the log's newest "start" row
    end: LogRow  # its "end" row, {} as long as there is none
    steps: list[LogRow]  # in order, the newest of each step
    saves: list[LogRow]
    evaluations: list[LogRow]
    skipped: list[LogRow]  # steps whose loss or gradient was not finite: see pivot/run/guard.py
    spikes: list[LogRow]  # losses far above those before them
    answers: dict[tuple[int, int], LogRow]  # (step, data row) -> what samples.jsonl has
    status: LogRow
    passed_over: dict[str, int]  # file -> lines that are not what a run writes

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def objective(self) -> type[Objective]:
        return objective_class(self.config.objective)

    @property
    def objective_text(self) -> str:
        """DPO · sigmoid · beta 0.1"""
        section = getattr(self.config.objective, self.objective.name)
        return " · ".join(filter(None, [self.objective.name.upper(), self.objective.describe(section)]))

    @property
    def last_sign(self) -> str:
        """When and from where a run that is not over gave its last sign of life; "" for one that is."""
        return last_sign(self.status) if self.status.get("status") == RUNNING else ""

    def series(self, key: str, *, held_out: bool = False) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged and finite."""
        rows = self.evaluations if held_out else self.steps
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def keys(self, prefix: str) -> list[str]:
        """The step metrics that begin with `prefix`, sorted."""
        return sorted({key for row in self.steps for key in row if key.startswith(prefix)})

    @property
    def training_s(self) -> float:
        """Seconds spent in steps, from the logged rates: without evaluations, saving and interruptions."""
        seconds, before = 0.0, 0
        for row in self.steps:
            rate = row.get("perf/pairs_per_s")
            if rate:
                seconds += (row["step"] - before) * self.config.train.global_batch_size / rate
            before = row["step"]
        return seconds


def read_run(folder: str | Path) -> ReportedRun:
    """The run in `folder`. Raises ValueError where there is none."""
    folder = Path(folder)
    for name in ("config.yaml", "log.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}, so it is no run; expected a run's output_dir")
    rows, not_rows = read_rows(folder / "log.jsonl", is_log_row)
    samples, not_samples = read_rows(folder / "samples.jsonl", is_sample)
    status = read_object(folder / "status")
    return ReportedRun(
        folder=folder,
        config=read_settings(folder / "config.yaml"),
        start=next((row for row in reversed(rows) if row.get("event") == "start"), {}),
        end=next((row for row in reversed(rows) if row.get("event") == "end"), {}),
        steps=_newest(row for row in rows if "event" not in row),
        saves=_newest(row for row in rows if row.get("event") == "save"),
        evaluations=_newest(row for row in rows if row.get("event") == "eval"),
        skipped=_newest(row for row in rows if row.get("event") == "skipped"),
        spikes=_newest(row for row in rows if row.get("event") == "spike"),
        answers={(row["step"], row["row"]): row for row in samples},
        status=status if isinstance(status.get("status"), str) else {},
        passed_over={"log.jsonl": not_rows, "samples.jsonl": not_samples},
    )


def _newest(rows: Iterable[LogRow]) -> list[LogRow]:
    newest = {row["step"]: row for row in rows}
    return [newest[step] for step in sorted(newest)]


def find_previous(run: ReportedRun) -> list[ReportedRun]:
    """The runs that `run` goes back to, oldest first: as long as init_from is another run's export."""
    chain: list[ReportedRun] = []
    seen = {run.folder.resolve()}
    while run.config.init_from is not None:
        folder = Path(run.config.init_from).parent
        if folder.resolve() in seen or not all((folder / name).is_file() for name in ("config.yaml", "log.jsonl")):
            break
        seen.add(folder.resolve())
        run = read_run(folder)
        chain.insert(0, run)
    return chain
