"""Numbers of a step that are right across ranks, and where they go: log.jsonl always, the terminal, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pivot.counts import StepCounts
from pivot.distributed import World
from pivot.files import write_atomically
from pivot.objectives import Outcome
from pivot.redact import redact_values, tell


class StepMetrics:
    """One step's numbers over all ranks: sums kept on the device, facts of the host beside them, one gather at the end.

    Nothing but `reduce` waits for the device, so micro-batches follow each other without a gap.
    """

    def __init__(self, world: World, counts: StepCounts) -> None:
        self._world = world
        self.counts = counts
        self._sums: dict[str, Tensor] = {}
        self._counted: dict[str, float] = {}
        self._highest: dict[str, float] = {}
        self._squares: dict[str, Tensor] = {}

    def add(self, outcome: Outcome, loss: Tensor) -> None:
        """Add a micro-batch: its terms, and its share of the step's loss (already divided)."""
        self._accumulate("loss", loss.detach())
        for name, term in outcome.metrics.items():
            self._accumulate(name, term.total.detach() / self.counts.denominator(term.unit))

    def _accumulate(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value.float()

    def count(self, **values: float) -> None:
        """Numbers that this rank's host knows; `reduce` gives their sums over the ranks."""
        for name, value in values.items():
            self._counted[name] = self._counted.get(name, 0.0) + value

    def highest(self, **values: float) -> None:
        """The same, but `reduce` gives the highest of the ranks."""
        self._highest |= values

    def include(self, squares: dict[str, Tensor]) -> None:
        """Sums of this rank from elsewhere, float64[] each: `Engine.squares`."""
        self._squares |= squares

    def reduce(self) -> dict[str, float]:
        """The step's values, the same on every rank. Collective; the one place where the host waits for them."""
        names = sorted(self._sums, key=lambda name: (name != "loss", name))  # the loss first, as a reader looks for it
        on_device = torch.stack([self._sums[name] for name in names]).double()
        facts = torch.tensor([*self._counted.values(), *self._highest.values()], dtype=torch.float64)
        squares = [send(torch.stack(list(self._squares.values())), self._world.device)] if self._squares else []
        own = torch.cat([on_device, *squares, send(facts, self._world.device)])
        table = own.new_empty(self._world.size, len(own))  # a row a rank: sums and maxima in one collective
        torch.distributed.all_gather_into_tensor(table.view(-1), own)
        ranks = table.cpu()
        num_sums = len(names) + len(self._squares) + len(self._counted)
        values = [*ranks[:, :num_sums].sum(0).tolist(), *ranks[:, num_sums:].amax(0).tolist()]
        return dict(zip([*names, *self._squares, *self._counted, *self._highest], values, strict=True))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the host through page-locked memory, since a plain copy would wait for the GPU."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Timer:
    """Rates over the steps since the last log row, from numbers that are already those of all ranks."""

    def __init__(self, matmul_tflops: float | None = None) -> None:
        """`matmul_tflops`: what all ranks together multiply at, for MFU."""
        self._peak_flops = None if matmul_tflops is None else matmul_tflops * 1e12
        self._started = time.perf_counter()
        self._sums: dict[str, float] = {}
        self._peak_gib = 0.0

    def add(self, *, peak_memory_gib: float, **sums: float) -> None:
        """A finished step of all ranks: `pairs`, `tokens` and `room` (of the rows), `flops`, `hardware_flops`; `wait_s`
        for data, of the rank that waited longest."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._peak_gib = max(self._peak_gib, peak_memory_gib)

    def read(self) -> dict[str, float]:
        """`perf/...` of the steps added since the last call; then start afresh."""
        elapsed, sums = time.perf_counter() - self._started, self._sums
        self._started, self._sums = time.perf_counter(), {}
        if not sums:
            return {}
        rates = (
            {}
            if self._peak_flops is None
            else {
                "perf/mfu": sums["flops"] / elapsed / self._peak_flops,
                "perf/hardware_mfu": sums["hardware_flops"] / elapsed / self._peak_flops,
            }
        )
        return rates | {
            "perf/pairs_per_s": sums["pairs"] / elapsed,
            "perf/tokens_per_s": sums["tokens"] / elapsed,
            "perf/data_wait_ratio": sums["wait_s"] / elapsed,
            "perf/row_fill": sums["tokens"] / sums["room"],
            "perf/peak_memory_gib": self._peak_gib,
        }


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU where it runs on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows, where nothing here runs distributed anyway

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class RunLog:
    """Rank 0's log: a JSON object a line in log.jsonl, a line on the terminal, TensorBoard if asked for.

    A run that goes on from step `first_step` has its rows behind that step cut off first, since it makes them again.
    """

    def __init__(self, folder: Path, *, first_step: int, total_steps: int, is_main: bool, tensorboard: bool) -> None:
        self._total_steps = total_steps
        self._file: IO[str] | None = None
        self._board: Any = None
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
        shown = ["loss", "rewards/accuracies", "rewards/margins", "grad_norm", "perf/pairs_per_s", "perf/mfu"]
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


def _cut_back(folder: Path, step: int) -> tuple[set[int], int]:
    """Leave what log.jsonl and samples.jsonl hold up to `step`; gives the steps whose evaluation is there, and how many
    rows of steps were cut off.

    At step 0 nothing is left, since the settings may be others now. The end of a run goes, too: it has not ended. Of
    two rows of one step, as older versions left them behind a resume, the newer stays. A last line that a kill or a
    power cut left unfinished goes; other lines that are no rows stay.
    """
    rows: dict[Any, bytes] = {}
    evaluated: set[int] = set()
    num_cut = 0
    for number, (line, row) in enumerate(_read_rows(folder / "log.jsonl")):
        at, event = row.get("step"), row.get("event")
        if isinstance(at, int):
            if at > step or step == 0 or event == "end":
                num_cut += event is None
                continue
            if event == "eval":
                evaluated.add(at)
        key = (event, at) if isinstance(at, int) and event in (None, "eval") else number
        rows.pop(key, None)  # the newer row takes the newer place
        rows[key] = line
    _rewrite(folder / "log.jsonl", list(rows.values()))
    # An evaluation's answers are written before its row: without that row it is made again.
    samples = _read_rows(folder / "samples.jsonl")
    _rewrite(folder / "samples.jsonl", [line for line, row in samples if row.get("step") in (*evaluated, None)])
    return evaluated, num_cut


def _read_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The finished lines of a file, and the object of each, {} where it holds none."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = {}
        if line.endswith(b"\n"):
            yield line, row if isinstance(row, dict) else {}


def _rewrite(path: Path, lines: list[bytes]) -> None:
    content = b"".join(lines)
    if path.is_file() and path.stat().st_size != len(content):
        write_atomically(path, content)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"
