"""What a run will take of each rank's memory, worked out before any weight is read; and which ZeRO stage to take.

States (weights, gradients, optimizer) are exact up to padding; activations are measured on the model's shapes
(pivot/startup/activations.py). Bytes, of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pivot.config import ConfigError
from pivot.engine.settings import MASTER_BYTES, MOMENT_BYTES
from pivot.models.skeleton import Skeleton
from pivot.system import host_memory
from pivot.system.distributed import World, num_local_ranks

GIB = 2**30
OFFLOAD_FILE = "ds_configs/zero3_offload.json"


@dataclass(frozen=True)
class Estimate:
    """Bytes a rank; `host` is what offloading moves to the machine's own memory, `copy` what a checkpoint takes there
    while it is written in the background."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float  # of communication, and under ZeRO-3 the weights that are whole at a time
    activations: float
    host: float = 0.0
    copy: float = 0.0

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.states + self.buckets + self.activations


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a run."""

    skeleton: Skeleton
    trained: Sequence[str]
    optimizer: str  # a key of MOMENT_BYTES
    dtype: torch.dtype
    world_size: int
    zero: dict[str, Any]  # zero_optimization of the DeepSpeed JSON
    checkpointing: str  # none | selective | full
    activations: Callable[[str], float]  # peak bytes of the fullest row, by `checkpointing`; asked for more than once
    local_ranks: int = 1  # on one machine
    read_ahead: float = 0.0  # bytes of the micro-batches that a rank's loader holds ready
    copies: bool = False  # whether ranks copy their share of a checkpoint, to write it while training goes on

    @property
    def stage(self) -> int:
        return int(self.zero.get("stage", 0))

    def at_stage(self, stage: int) -> Setup:
        """The same run on another stage, nothing offloaded."""
        kept = {name: value for name, value in self.zero.items() if not name.startswith("offload_")}
        return replace(self, zero=kept | {"stage": stage})


def estimate(setup: Setup) -> Estimate:
    size, ranks, stage = setup.dtype.itemsize, setup.world_size, setup.stage
    every = sum(p.numel() for p in setup.skeleton.parameters())
    trained = sum(p.numel() for name in setup.trained for p in setup.skeleton.components[name].parameters())
    weights = every * size / (ranks if stage == 3 else 1)
    gradients = 4.0 * trained / (ranks if stage >= 2 else 1)  # accumulated in fp32
    if stage == 1 and size < 4:
        gradients += size * trained  # autograd's own, which stay beside the sums until the step
    master = MASTER_BYTES if stage > 0 else 0
    optimizer = float((master + MOMENT_BYTES[setup.optimizer]) * trained / (ranks if stage > 0 else 1))
    copy = _copied_bytes(setup, every, trained, optimizer)
    host = 0.0
    if _is_offloaded(setup, "offload_optimizer"):
        host, gradients, optimizer = optimizer + gradients, 0.0, 0.0
    if _is_offloaded(setup, "offload_param"):
        host, weights = host + weights, 0.0
    return Estimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buckets=_bucket_bytes(setup, every, trained),
        activations=setup.activations(setup.checkpointing),
        host=host,
        copy=copy,
    )


def _copied_bytes(setup: Setup, every: int, trained: int, optimizer: float) -> float:
    """What the ranks of rank 0's machine copy of a checkpoint, by rank; below ZeRO-3 rank 0 alone saves the weights."""
    size, stage = setup.dtype.itemsize, setup.stage
    if not setup.copies:
        return 0.0
    if stage == 3:
        return (every - trained) * size / setup.world_size + optimizer
    alone = every * size + (0.0 if stage else optimizer)
    return alone / setup.local_ranks + (optimizer if stage else 0.0)


def _is_offloaded(setup: Setup, key: str) -> bool:
    return (setup.zero.get(key) or {}).get("device", "none") != "none"


def _bucket_bytes(setup: Setup, every: int, trained: int) -> float:
    """As DeepSpeed allocates them, in full whatever the model's size; twice where they overlap with backward."""
    size, zero = setup.dtype.itemsize, setup.zero
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    if setup.stage == 0:
        return 4.0 * trained if setup.world_size > 1 else 0.0
    if setup.stage == 3:
        live = int(zero.get("stage3_max_live_parameters", 1e9)) + int(zero.get("stage3_prefetch_bucket_size", 5e7))
        return 4.0 * bucket + size * min(every, live)
    return (4.0 if setup.stage == 1 else size) * bucket * (1 + bool(zero.get("overlap_comm")))


# -- what the machine has ------------------------------------------------------------------------------------------


def available_memory(world: World) -> tuple[float, float]:
    """(bytes of this rank's device, bytes of the node's memory a rank); on a CPU both are the same."""
    host = host_memory.total_bytes() / num_local_ranks(world)
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory), host
    return host, host


# -- words ---------------------------------------------------------------------------------------------------------


def describe_memory(setup: Setup, available: float, host: float, where: str, machine: str = "machine") -> list[str]:
    """What the run takes and which stage to take, in one to four lines of the first screen.

    `available`: bytes of a rank's device; `host`: of the machine's memory, a rank; `where`: what the device is called,
    a GPU or the machine itself; `machine`: what the machine is called.

    Raises ConfigError when weights, gradients and optimizer state alone do not fit.
    """
    own = estimate(setup)
    advice = _advise(setup, available, where)
    for name, needed, limit in ((where, own.states, available), (f"{machine}, for what is offloaded,", own.host, host)):
        if needed > limit:
            raise ConfigError(
                f"deepspeed: on ZeRO stage {setup.stage} and {setup.world_size} rank(s), weights, gradients and "
                f"optimizer state take {_gib(needed)} GiB a rank and the {name} has {_gib(limit)}; {advice}"
            )
    parts = ("weights", "gradients", "optimizer", "buckets", "activations")
    listed = ", ".join(f"{name} {_gib(getattr(own, name))}" for name in parts if getattr(own, name))
    lines = [f"memory     about {_gib(own.total)} of {_gib(available)} GiB a rank: {listed}"]
    if own.host:
        lines.append(f"           and {_gib(own.host)} of {_gib(host)} GiB of the machine's, offloaded")
    if own.copy:
        taken = own.host + (own.total if where == "machine" else 0.0)
        fits = "" if taken + own.copy <= host else "; that does not fit, so training waits for each"
        lines.append(
            f"           and {_gib(own.copy)} GiB of the machine's for a checkpoint that is being written{fits}"
        )
    if own.total > available:
        lines.append(f"           WARNING: it may run out of memory; {_remedy(setup, available, advice)}")
    elif advice:
        lines.append(f"           {advice}")
    if where != machine:
        lines += _warn_of_host(setup, own, host, machine)
    return lines


def _warn_of_host(setup: Setup, own: Estimate, host: float, machine: str) -> list[str]:
    """A line where the machine's memory beside its GPUs may run out, in the course of the run or at its end.

    Weights that are read in the precision of their files are not counted: they stay pages of these, which all ranks
    share and the system takes back. What is exported is a copy of the whole model, on rank 0's machine.
    """
    weights = sum(p.numel() for p in setup.skeleton.parameters()) * setup.dtype.itemsize
    parts = {"offloaded": own.host, "the model to export": weights / setup.local_ranks, "read ahead": setup.read_ahead}
    total = sum(parts.values())
    if total <= COMFORTABLE * host:
        return []
    listed = ", ".join(f"{name} {_gib(part)}" for name, part in parts.items() if part)
    return [
        f"           WARNING: the {machine} may run out of memory beside its GPUs: {listed}, {_gib(total)} in all of "
        f"{_gib(host)} GiB a rank; ask for more (SLURM: --mem=0), or lower data.workers"
    ]


PRICES = {"selective": "a few percent more time", "full": "about a third more time"}  # of recomputing


def _remedy(setup: Setup, available: float, advice: str) -> str:
    own = estimate(setup).total
    for granularity, price in PRICES.items():
        lower = estimate(replace(setup, checkpointing=granularity)).total
        if lower < own and lower <= available:
            return f"set train.activation_checkpointing={granularity} ({_gib(lower)} GiB, {price})"
    return f"lower train.max_tokens_per_micro_batch; {advice or 'freeze a component (optim.COMPONENT.lr=null)'}"


# Of a device's memory: the driver's context, NCCL's buffers and the allocator's gaps are in no estimate, and nobody
# should be sent to a stage that fits on paper alone.
COMFORTABLE = 0.9
WHY_LOWER = {
    2: "ZeRO-2 sends gradients in every micro-batch, ZeRO-1 once a step",
    3: "ZeRO-3 sends every weight twice in every micro-batch",
}


def _advise(setup: Setup, available: float, where: str) -> str:
    """The smallest stage that fits, where that is another one than the run's: a higher one sends more."""
    offloads = _is_offloaded(setup, "offload_optimizer") or _is_offloaded(setup, "offload_param")
    alone = setup.world_size == 1  # nothing to share, and nothing to send
    stages = (2,) if alone else (1, 2, 3)  # 2: less than 1 for bf16, since its gradients go at once
    fitting = {stage: estimate(setup.at_stage(stage)).total for stage in stages}
    fitting = {stage: total for stage, total in fitting.items() if total <= COMFORTABLE * available}
    if not fitting:
        if offloads and estimate(setup).total <= available:
            return ""
        return f"take {OFFLOAD_FILE} or more ranks, or freeze a component (optim.COMPONENT.lr=null)"
    best = min(fitting)
    needs = f"ds_configs/zero{best}.json takes {_gib(fitting[best])} GiB a rank"
    if offloads:
        return f"it fits without offloading, which waits for the {where}'s link to its host: {needs}"
    if best > setup.stage and estimate(setup).total > available:
        return f"take a higher stage: {needs}"
    if best < setup.stage and not alone:
        return f"a lower stage fits and sends less: {needs}; {WHY_LOWER[setup.stage]}"
    return ""


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.095 * GIB else f"{size / GIB:.2g}"
