"""What a run writes about itself while it runs: log.jsonl always, the terminal, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import IO, Any

from pivot.run.weights_and_biases import Feed
from pivot.system.files import read_json_lines, write_atomically
from pivot.system.redact import redact_values, tell

SKIPPED = "skipped.jsonl"  # the samples of steps that were not finite: see guard.py


class RunLog:
    """Rank 0's log: a JSON object a line in log.jsonl, a line on the terminal, TensorBoard and W&B if asked for.

    A run that goes on from step `first_step` has its rows behind that step cut off first, since it makes them again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        total_steps: int,
        is_main: bool,
        tensorboard: bool,
        wandb: str | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._file: IO[str] | None = None
        self._board: Any = None
        self._feed: Feed | None = None
        self._clock: tuple[int, float] | None = None  # (first step seen, when)
        self._evaluated: set[int] = set()
        if not is_main:
            return
        self._evaluated, num_cut = _cut_back(folder, first_step)
        if num_cut:
            tell(f"log        cut back to step {first_step}; rows of steps that are made again: {num_cut}")
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        if wandb:
            self._feed = Feed(folder, wandb)

    def has_evaluation(self, step: int) -> bool:
        """Whether the log has the held-out numbers after `step` steps from an earlier start; on rank 0."""
        return step in self._evaluated

    def event(self, event: str, **facts: Any) -> None:
        """A row that is not a step, such as {"event": "start", ...}."""
        self._write({"event": event} | facts)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Log optimizer step `step` (counted from 1 once done). A value that is not finite is written as null."""
        self._write({"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()})
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        self._progress(step, metrics)

    def evaluation(self, step: int, metrics: dict[str, float], **facts: Any) -> None:
        """A row {"event": "eval"}: the held-out numbers after `step` steps, and what else there is to say of them."""
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._write({"event": "eval", "step": step} | values | facts)
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(redact_values(row)) + "\n")
            self._file.flush()

    def _progress(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        first, when = self._clock = self._clock or (step, now)
        eta = _clock((now - when) / (step - first) * (self._total_steps - step)) if step > first else "--:--"
        shown = ["loss", "rewards/accuracies", "rewards/margins", "kl", "grad_norm", "perf/pairs_per_s", "perf/mfu"]
        values = "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
        line = f"step {step}/{self._total_steps}  {values}  left {eta}"
        if self._file is None:
            return
        # One line rewritten on a terminal, plain lines in a job's output file.
        rewrite = sys.stdout.isatty() and step < self._total_steps
        print(f"\r{line}\033[K" if rewrite else line, end="" if rewrite else "\n", flush=True)

    def close(self) -> None:
        for sink in (self._file, self._board, self._feed):
            if sink is not None:
                sink.close()


def _cut_back(folder: Path, step: int) -> tuple[set[int], int]:
    """Leave what log.jsonl, samples.jsonl and skipped.jsonl hold up to `step`; gives the steps whose evaluation is
    there, and how many rows of steps were cut off.

    At step 0 nothing is left, since the settings may be others now. The end of a run goes, too: it has not ended. Of
    two rows of one step, as older versions left them behind a resume, the newer stays. A last line that a kill or a
    power cut left unfinished goes; other lines that are no rows stay.
    """
    rows: dict[Any, bytes] = {}
    evaluated: set[int] = set()
    num_cut = 0
    for number, (line, row) in enumerate(_finished_lines(folder / "log.jsonl")):
        at, event = row.get("step"), row.get("event")
        if _is_made_again(row, step) or (event == "end" and isinstance(at, int)):
            num_cut += event is None
            continue
        if event == "eval" and isinstance(at, int):
            evaluated.add(at)
        key = (event, at) if isinstance(at, int) and event in (None, "eval") else number
        rows.pop(key, None)  # the newer row takes the newer place
        rows[key] = line
    _rewrite(folder / "log.jsonl", list(rows.values()))
    # An evaluation's answers are written before its row: without that row it is made again.
    samples = _finished_lines(folder / "samples.jsonl")
    _rewrite(folder / "samples.jsonl", [line for line, row in samples if row.get("step") in (*evaluated, None)])
    skipped = _finished_lines(folder / SKIPPED)
    _rewrite(folder / SKIPPED, [line for line, row in skipped if not _is_made_again(row, step)])
    return evaluated, num_cut


def _is_made_again(row: dict[str, Any], step: int) -> bool:
    """Whether a run that goes on from `step` writes the row anew."""
    at = row.get("step")
    return isinstance(at, int) and (at > step or step == 0)


def _finished_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a file that have their line break, and the object of each, {} where it holds none."""
    return [(line, row or {}) for line, row in read_json_lines(path) if line.endswith(b"\n")]


def _rewrite(path: Path, lines: list[bytes]) -> None:
    content = b"".join(lines)
    if path.is_file() and path.stat().st_size != len(content):
        write_atomically(path, content)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"
