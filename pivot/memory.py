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
from pivot.distributed import World
from pivot.logprobs import CHUNK_LOGITS
from pivot.models.skeleton import Skeleton

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
    activation_checkpointing: bool

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
    """What autograd keeps from forward to backward, plus what one block needs at work.

    Counted off the modules as transformers runs them: RMSNorm in fp32 with its input and its normed copy, keys and
    values repeated for the query heads, SwiGLU's four wide tensors; LayerNorm and GELU in the encoder.
    """
    size, row, skeleton = setup.dtype.itemsize, setup.row, setup.skeleton
    text, tower = skeleton.text_config, skeleton.vision_tower
    hidden, wide = int(text.hidden_size), int(text.intermediate_size)
    queries = skeleton.head_size * int(text.num_attention_heads)
    layers = int(text.num_hidden_layers)
    norm = (4 + 2 * size) * hidden  # the fp32 input, the normed copy, the result
    text_block = row.tokens * (2 * norm + size * (6 * queries + 4 * wide))
    patches = row.images * (tower.num_features + int(tower.facts.has_cls))
    mlp = max(p.shape[0] for p in skeleton.encoder_blocks()[0].parameters() if p.ndim == 2)
    vision_block = patches * size * (9 * tower.width + 2 * mlp)
    text_input, vision_input = row.tokens * size * hidden, patches * size * tower.width
    ends = 6 * text_input + row.images * tower.num_features * size * 3 * hidden  # embeddings, last norm, projector
    trains_vision = "vision_tower" in setup.trained
    if setup.activation_checkpointing:
        kept = layers * text_input + trains_vision * tower.num_blocks * vision_input
        return ends + kept + 2 * max(text_block, vision_block)
    return ends + layers * text_block + (trains_vision * (tower.num_blocks - 1) + 1) * vision_block


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


def _remedy(setup: Setup, there: float, advice: str) -> str:
    recomputing = estimate(replace(setup, activation_checkpointing=True)).total
    if not setup.activation_checkpointing and recomputing <= there:
        return f"set train.activation_checkpointing=true ({_gib(recomputing)} GiB, about a third more time)"
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
