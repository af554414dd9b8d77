"""Numbers of a step that are right across ranks, and the rates that follow from them."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from pivot.batch import StepCounts
from pivot.objectives import Outcome
from pivot.system.distributed import World


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
