"""Numbers of a step that are right across ranks: sums of what was learned, the rates that follow, and norms.

The norms, of gradients and updates per component, are read where they are cheap: inside the optimizer's own step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

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
        self.losses: list[Tensor] = []  # float32[] of each micro-batch of this rank, on the device
        self._on_device: dict[str, Tensor] = {}
        self._on_host: dict[str, float] = {}
        self._of_ranks: dict[str, Tensor] = {}

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
        self._of_ranks = dict(zip([*names, *told], ranks.T, strict=True))
        sums, highest = ranks.sum(0).tolist(), ranks.amax(0).tolist()
        values = {n: highest[i] if n in HIGHEST else sums[i] for i, n in enumerate([*names, *told])}
        return {name: values[name] for name in names}, {name: values[name] for name in told}

    def of_each_rank(self, name: str) -> list[float]:
        """What each rank added under `name`; after `reduce`."""
        return self._of_ranks[name].tolist()


class Timer:
    """Rates over the steps since the last log row, from numbers that are already those of all ranks."""

    def __init__(self, matmul_tflops: float | None = None) -> None:
        """`matmul_tflops`: what all ranks together multiply at, for MFU."""
        self._peak_flops = None if matmul_tflops is None else matmul_tflops * 1e12
        self._started = time.perf_counter()
        self._sums: dict[str, float] = {}
        self._peak_gib = 0.0

    def add(self, *, peak_memory_gib: float, **sums: float) -> None:
        """A finished step of all ranks: `pairs`, `tokens` and `room` (of the rows), `flops`; `wait_s` for data, of
        the rank that waited longest."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._peak_gib = max(self._peak_gib, peak_memory_gib)

    def read(self) -> dict[str, float]:
        """`perf/...` of the steps added since the last call; then start afresh."""
        elapsed, sums = time.perf_counter() - self._started, self._sums
        self._started, self._sums = time.perf_counter(), {}
        if not sums:
            return {}
        mfu = {} if self._peak_flops is None else {"perf/mfu": sums["flops"] / elapsed / self._peak_flops}
        return mfu | {
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


# Elements; the norms of a step take some ten tensors of this size. On a CPU they stay in the cache.
MEASURE_CHUNK = {"cpu": 2**17, "cuda": 2**22}


class ComponentMeter:
    """Sums of squares over one step, per component.

    `observe` runs as the optimizer's post-step hook, where each group holds this rank's flat partition (ZeRO 1-3)
    or the plain parameters (ZeRO 0). The update is worked out from the optimizer's state, chunk by chunk, so
    no copy of the weights is made.
    """

    GRADIENT, UPDATE, WEIGHT = range(3)

    def __init__(self, optimizer_name: str) -> None:
        self._is_sgd = optimizer_name == "sgd"
        self._enabled = False
        self._squares: dict[str, Tensor] = {}
        self._full_gradients: dict[str, Tensor] = {}

    def start(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._squares, self._full_gradients = {}, {}

    @torch.no_grad()
    def observe_full_gradients(self, groups: list[dict[str, Any]]) -> None:
        """ZeRO-0 only: the gradients before DeepSpeed clips them in place, which loses the factor."""
        for group in groups:
            gradients = [p.grad.view(-1) for p in group["params"] if p.grad is not None]
            squares = [_square(piece.double()) for grad in gradients for piece in grad.split(_chunk(grad))]
            self._full_gradients[group["component"]] = torch.stack(squares).sum().float()

    @torch.no_grad()
    def observe(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._enabled:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    squares = self._squares_of(parameter, optimizer.state[parameter], group)
                    name = group["component"]
                    self._squares[name] = squares + self._squares[name] if name in self._squares else squares

    def _squares_of(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """float64[3]: squared norms of the (clipped) gradient, of the update just made, of the weights."""
        flat, grad = parameter.view(-1), parameter.grad.view(-1)  # type: ignore[union-attr]  # observe checked it
        total = torch.zeros(3, dtype=torch.float64, device=flat.device)
        for start in range(0, flat.numel(), _chunk(flat)):
            rows = slice(start, start + _chunk(flat))
            weight, gradient = flat[rows].float(), grad[rows].float()
            update = self._update(weight, gradient, state, group, rows)
            parts = (gradient, update, weight)
            total += torch.stack([_square(part) for part in parts])
        return total

    def _update(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], rows: slice
    ) -> Tensor:
        """w_new - w_old, from w_new: w_new = (1 - lr * decay) * w_old - lr * direction."""
        lr, decay = group["lr"], group["weight_decay"]
        if self._is_sgd:  # torch's SGD adds decay * w_old to the gradient: the same formula
            direction = gradient
        else:
            step = state["step"]  # beside the weights where AdamW is fused: to read it the host would wait
            step = step.double() if isinstance(step, Tensor) else step
            unbias1, unbias2 = (1 - beta**step for beta in group["betas"])
            first = state["exp_avg"].view(-1)[rows].float() / unbias1
            second = state["exp_avg_sq"].view(-1)[rows].float() / unbias2
            direction = first / (second.sqrt() + group["eps"])  # arxiv.org/abs/1711.05101, algorithm 2
        return -lr * (direction + decay * weight) / (1 - lr * decay)

    def norms(self, world: World, *, partitioned: bool, total_norm: float | Tensor | None) -> dict[str, float]:
        """grad_norm (before clipping), in all and per component, and update_ratio = |update| / |weights|.

        {} where the step was not measured. Collective where it was: each rank holds its part (`partitioned`), or the
        whole. `total_norm` is DeepSpeed's own gradient norm.
        """
        if not self._enabled:
            return {}
        if not self._squares:  # the step was skipped
            return {"grad_norm": math.inf}
        names = sorted(self._squares)
        own = torch.stack([self._squares[name] for name in names])  # float64[components, 3]
        if not partitioned:  # each rank holds the whole
            own[:, self.GRADIENT] = torch.stack([self._full_gradients[name].double() for name in names])
            own /= world.size
        own = send(own, world.device)  # an offloaded optimizer works on the host
        torch.distributed.all_reduce(own)
        gradients, updates, weights = own.sqrt().T.tolist()
        clipped = math.hypot(*gradients)
        # DeepSpeed's norm is the one before clipping; the ratio of both is the factor to undo.
        whole = clipped if not partitioned or total_norm is None else float(total_norm)
        undo = whole / clipped if clipped > 0 else 1.0
        metrics = {"grad_norm": whole}
        for name, gradient, update, weight in zip(names, gradients, updates, weights, strict=True):
            metrics[f"grad_norm/{name}"] = gradient * undo
            metrics[f"update_ratio/{name}"] = update / weight if weight > 0 else 0.0
        return metrics


def _chunk(values: Tensor) -> int:
    return MEASURE_CHUNK[values.device.type]


def _square(values: Tensor) -> Tensor:
    """float64[]: the squared norm."""
    return values.square().sum(dtype=torch.float64)
