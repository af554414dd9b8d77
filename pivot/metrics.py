"""Numbers of a step that are right across ranks, and where they go: log.jsonl always, the terminal, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pivot.counts import StepCounts
from pivot.distributed import World
from pivot.objectives import Outcome


class StepMetrics:
    """Sums of one step's terms, kept on the device; one all-reduce gives their means over the planned counts."""

    def __init__(self, world: World, counts: StepCounts) -> None:
        self._world = world
        self._counts = counts
        self._sums: dict[str, Tensor] = {}

    def add(self, outcome: Outcome, loss: Tensor) -> None:
        """Add a micro-batch: its terms, and its share of the step's loss (already divided)."""
        self._accumulate("loss", loss.detach())
        for name, term in outcome.metrics.items():
            self._accumulate(name, term.total.detach() / self._counts.denominator(term.unit))

    def _accumulate(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value.float()

    def reduce(self) -> dict[str, float]:
        """The step's values, the same on every rank. Collective; the one place where the host waits for them."""
        names = sorted(self._sums, key=lambda name: (name != "loss", name))  # the loss first, as a reader looks for it
        values = torch.stack([self._sums[name] for name in names]).double()
        torch.distributed.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))


class Timer:
    """Rates over the steps since the last log row."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._started = time.perf_counter()
        self._wait_s, self._pairs, self._tokens = 0.0, 0, 0

    def add(self, *, wait_s: float, pairs: int, tokens: int) -> None:
        """A step: seconds this rank waited for data, pairs of the whole step, row tokens of this rank."""
        self._wait_s += wait_s
        self._pairs += pairs
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """`perf/...`, reduced over ranks; then start afresh. Collective."""
        elapsed = time.perf_counter() - self._started
        device = self._world.device
        tokens = torch.tensor(float(self._tokens), dtype=torch.float64, device=device)
        worst = torch.tensor([self._wait_s / elapsed, peak_memory_gib()], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(tokens)
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
        pairs = self._pairs
        self._started, self._wait_s, self._pairs, self._tokens = time.perf_counter(), 0.0, 0, 0
        return {
            "perf/pairs_per_s": pairs / elapsed,
            "perf/tokens_per_s": float(tokens) / elapsed,
            "perf/data_wait_ratio": float(worst[0]),
            "perf/peak_memory_gib": float(worst[1]),
        }


def peak_memory_gib() -> float:
    """The most memory this process has held: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows, where nothing here runs distributed anyway

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class RunLog:
    """Rank 0's log: a JSON object a line in log.jsonl, a line on the terminal, TensorBoard if asked for."""

    def __init__(self, folder: Path, *, total_steps: int, is_main: bool, tensorboard: bool) -> None:
        self._total_steps = total_steps
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8") if is_main else None
        self._board: Any = None
        self._clock: tuple[int, float] | None = None  # (first step seen, when)
        if is_main and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def event(self, event: str, **facts: Any) -> None:
        """A row that is not a step, such as {"event": "start", ...}."""
        self._write({"event": event} | facts)

    def say(self, text: str) -> None:
        """A line for the reader at the terminal."""
        if self._file is not None:
            print(text, flush=True)

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
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def _progress(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        first, when = self._clock = self._clock or (step, now)
        eta = _clock((now - when) / (step - first) * (self._total_steps - step)) if step > first else "--:--"
        shown = ["loss", "rewards/accuracies", "rewards/margins", "grad_norm", "perf/pairs_per_s"]
        values = "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
        line = f"step {step}/{self._total_steps}  {values}  left {eta}"
        if self._file is None:
            return
        # One line rewritten on a terminal, plain lines in a job's output file.
        rewrite = sys.stdout.isatty() and step < self._total_steps
        print(f"\r{line}\033[K" if rewrite else line, end="" if rewrite else "\n", flush=True)

    def close(self) -> None:
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"
