"""Numbers of a step that are right across ranks, and the rates that follow from them."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from pivot.system.distributed import World, send

HIGHEST = ("wait_s", "peak_memory_gib")  # of these a step has its highest rank's, of all others the sum over the ranks


class StepMetrics:
    """One step's numbers over all ranks: sums kept on the device, facts of the host beside them, one gather at the end.

    Nothing but `reduce` waits for the device, so micro-batches follow each other without a gap.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._on_device: dict[str, Tensor] = {}
        self._on_host: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add this rank's part of the step's numbers: float[] tensors on the device, or what the host knows."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                own = self._on_device.get(name)
                self._on_device[name] = value.float() if own is None else own + value
            else:
                self._on_host[name] = self._on_host.get(name, 0.0) + value

    def reduce(self) -> tuple[dict[str, float], dict[str, float]]:
        """(what the device summed, what the hosts told), the same on every rank: sums, or maxima for HIGHEST.

        Collective; the one place where the host waits for the step.
        """
        names = sorted(self._on_device, key=lambda name: (name != "loss", name))  # as a reader looks for them
        told = sorted(self._on_host)
        on_host = torch.tensor([self._on_host[name] for name in told], dtype=torch.float64)
        on_device = torch.stack([self._on_device[name] for name in names]).double()
        own = torch.cat([on_device, send(on_host, self._world.device)])
        table = own.new_empty(self._world.size, len(own))  # a row a rank: sums and maxima in one collective
        torch.distributed.all_gather_into_tensor(table.view(-1), own)
        ranks = table.cpu()
        sums, highest = ranks.sum(0).tolist(), ranks.amax(0).tolist()
        values = {n: highest[i] if n in HIGHEST else sums[i] for i, n in enumerate([*names, *told])}
        return {name: values[name] for name in names}, {name: values[name] for name in told}


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
