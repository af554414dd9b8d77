"""What a run will take of each rank's memory, worked out before any weight is read; and which ZeRO stage to take.

States (weights, gradients, optimizer) are exact up to padding; activations are an estimate of what autograd keeps
for the fullest row of the first step, seen within a third of the measured peak. Bytes, of one rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pivot.config import ConfigError
from pivot.models.decoder import reads_at_targets
from pivot.models.head import CHUNK_LOGITS
from pivot.models.skeleton import Skeleton
from pivot.system.distributed import World

MASTER = 4  # bytes of an fp32 copy of a trained weight, which ZeRO 1-3 keep in fp32 runs, too
MOMENTS = {"adamw": 8, "sgd": 0}
GIB = 2**30
OFFLOAD_FILE = "ds_configs/zero3_offload.json"


@dataclass(frozen=True)
class Row:
    """The fullest row of a rank."""

    tokens: int
    images: int
    targets: int


@dataclass(frozen=True)
class Estimate:
    """Bytes a rank; `host` is what offloading moves to the machine's own memory."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float  # of communication, and under ZeRO-3 the weights that are whole at a time
    activations: float
    head: float
    host: float = 0.0

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.states + self.buckets + self.activations + self.head


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a run; `zero` is the DeepSpeed JSON's zero_optimization."""

    skeleton: Skeleton
    trained: Sequence[str]
    optimizer: str  # a key of MOMENTS
    dtype: torch.dtype
    world_size: int
    zero: dict[str, Any]
    row: Row
    activation_checkpointing: str  # none | selective | full

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
    master = MASTER if stage > 0 else 0
    optimizer = float((master + MOMENTS[setup.optimizer]) * trained / (ranks if stage > 0 else 1))
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
        activations=activation_bytes(setup),
        head=_head_bytes(setup),
        host=host,
    )


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


def activation_bytes(setup: Setup) -> float:
    """What autograd keeps from forward to backward, plus what one block needs at work (two where it is run again)."""
    size, row, skeleton = setup.dtype.itemsize, setup.row, setup.skeleton
    text, tower = skeleton.text_config, skeleton.vision_tower
    hidden = int(text.hidden_size)
    patches = row.images * (tower.num_features + int(tower.facts.has_cls))
    again = setup.activation_checkpointing
    text_blocks = {how: row.tokens * width for how, width in _text_block_bytes(text, skeleton.head_size, size).items()}
    vision_blocks = {how: patches * size * width for how, width in _encoder_block_widths(skeleton).items()}
    ends = size * hidden * (6 * row.tokens + 3 * row.images * tower.num_features)  # embeddings, last norm, projector
    kept = int(text.num_hidden_layers) * text_blocks[again]
    if "vision_tower" in setup.trained:
        kept += tower.num_blocks * vision_blocks[again]
    at_work = max(text_blocks["none"], vision_blocks["none"])
    return ends + kept + at_work * (2 if again == "full" else 1)


def _text_block_bytes(text: Any, head_size: int, size: int) -> dict[str, float]:
    """Of a token, by what is computed again."""
    hidden, wide, queries = (
        int(text.hidden_size),
        int(text.intermediate_size),
        head_size * int(text.num_attention_heads),
    )
    keys = head_size * int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    if not reads_at_targets(text):  # as transformers runs it: fp32 copies in the norms, rotations and SiLU one by one
        every = 2.0 * (4 + 2 * size) * hidden + size * (6 * queries + 4 * wide)
        return {"none": every, "selective": every, "full": float(size * hidden)}
    inputs = size * (2 * hidden + 2 * queries + 2 * keys + 2 * wide)  # of norms, attention, SiLU; attention's output
    gathered = 4 * size * keys  # each completion's copy of its prompt's
    return {
        "none": float(inputs + size * (2 * hidden + wide) + gathered),  # and the results of norms and MLP
        "selective": float(inputs),
        "full": float(size * hidden),
    }


def _encoder_block_widths(skeleton: Skeleton) -> dict[str, int]:
    """Values a patch, by what is computed again: inputs of norms, attention and GELU; then their results."""
    width = skeleton.vision_tower.width
    mlp = max(p.shape[0] for p in skeleton.encoder_blocks()[0].parameters() if p.ndim == 2)
    return {"none": 9 * width + 2 * mlp, "selective": 7 * width + mlp, "full": width}


def _head_bytes(setup: Setup) -> float:
    """Logits of a chunk and their gradient, twice in fp32 and once in the run's precision, and the head's gradient."""
    head = setup.skeleton.language_model.lm_head.weight
    chunk = min(setup.row.targets * head.shape[0], CHUNK_LOGITS)
    gradient = setup.dtype.itemsize * head.numel() if "language_model" in setup.trained else 0.0
    return chunk * (8.0 + setup.dtype.itemsize) + gradient


# -- what there is -------------------------------------------------------------------------------------------------


def memory_there(world: World) -> tuple[float, float]:
    """(bytes of this rank's device, bytes of the node's memory a rank); on a CPU both are the same."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size)
    host = _host_bytes() / local_ranks
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory), host
    return host, host


def _host_bytes() -> float:
    """The machine's memory, or what a container leaves of it."""
    found = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).is_file() else "max"
        if text != "max":
            found = min(found, float(text))
    return found


# -- words ---------------------------------------------------------------------------------------------------------


def judge(setup: Setup, there: float, host: float, where: str) -> list[str]:
    """What is taken and which stage to take, in two or three lines of the first screen; `where`: "GPU" or "machine".

    Raises ConfigError when weights, gradients and optimizer state alone do not fit.
    """
    own = estimate(setup)
    advice = _advise(setup, there, where)
    for name, needed, limit in ((where, own.states, there), ("machine, for what is offloaded,", own.host, host)):
        if needed > limit:
            raise ConfigError(
                f"deepspeed: on ZeRO stage {setup.stage} and {setup.world_size} rank(s), weights, gradients and "
                f"optimizer state take {_gib(needed)} GiB a rank and the {name} has {_gib(limit)}; {advice}"
            )
    parts = ("weights", "gradients", "optimizer", "buckets", "activations", "head")
    listed = ", ".join(f"{name} {_gib(getattr(own, name))}" for name in parts if getattr(own, name))
    lines = [f"memory     about {_gib(own.total)} of {_gib(there)} GiB a rank: {listed}"]
    if own.host:
        lines.append(f"           and {_gib(own.host)} of {_gib(host)} GiB of the machine's, offloaded")
    if own.total > there:
        lines.append(f"           WARNING: it may run out of memory; {_remedy(setup, there, advice)}")
    elif advice:
        lines.append(f"           {advice}")
    return lines


PRICES = {"selective": "a few percent more time", "full": "about a third more time"}  # of recomputing


def _remedy(setup: Setup, there: float, advice: str) -> str:
    own = estimate(setup).total
    for granularity, price in PRICES.items():
        lower = estimate(replace(setup, activation_checkpointing=granularity)).total
        if lower < own and lower <= there:
            return f"set train.activation_checkpointing={granularity} ({_gib(lower)} GiB, {price})"
    return f"lower train.max_tokens_per_micro_batch; {advice or 'freeze a component (optim.COMPONENT.lr=null)'}"


# Of a device's memory: the driver's context, NCCL's buffers and the allocator's gaps are in no estimate, and nobody
# should be sent to a stage that fits on paper alone.
COMFORTABLE = 0.9
WHY_LOWER = {
    2: "ZeRO-2 sends gradients in every micro-batch, ZeRO-1 once a step",
    3: "ZeRO-3 sends every weight twice in every micro-batch",
}


def _advise(setup: Setup, there: float, where: str) -> str:
    """The smallest stage that fits, where that is another one than the run's: a higher one sends more."""
    offloads = _is_offloaded(setup, "offload_optimizer") or _is_offloaded(setup, "offload_param")
    alone = setup.world_size == 1  # nothing to share, and nothing to send
    stages = (2,) if alone else (1, 2, 3)  # 2: less than 1 for bf16, since its gradients go at once
    fitting = {stage: estimate(setup.at_stage(stage)).total for stage in stages}
    fitting = {stage: total for stage, total in fitting.items() if total <= COMFORTABLE * there}
    if not fitting:
        if offloads and estimate(setup).total <= there:
            return ""
        return f"take {OFFLOAD_FILE} or more ranks, or freeze a component (optim.COMPONENT.lr=null)"
    best = min(fitting)
    needs = f"ds_configs/zero{best}.json takes {_gib(fitting[best])} GiB a rank"
    if offloads:
        return f"it fits without offloading, which waits for the {where}'s link to its host: {needs}"
    if best > setup.stage and estimate(setup).total > there:
        return f"take a higher stage: {needs}"
    if best < setup.stage and not alone:
        return f"a lower stage fits and sends less: {needs}; {WHY_LOWER[setup.stage]}"
    return ""


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.095 * GIB else f"{size / GIB:.2g}"
