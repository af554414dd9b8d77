"""Useful floating-point operations of a training step, from the model's shapes: they balance the ranks, and give MFU.

Useful are one forward and one backward of what a batch shares, 2 operations a multiply-add and matrix products alone.
What a step recomputes to save memory is work of the machine's, not of the user's, and is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pivot.batch import DUMMY_SAMPLE, PackedBatch
from pivot.data.units import Costs
from pivot.models.decoder import query_matrix, reads_at_targets, target_matrices
from pivot.models.skeleton import Skeleton
from pivot.trees import Segments

MEASURE_S = {"cpu": 0.15, "cuda": 0.3}
MEASURE_SIZE = {"cpu": 1024, "cuda": 8192}  # large enough to run at full rate, small enough to repeat in that time
REPEATS = {"cpu": 1, "cuda": 10}  # products per reading of the clock: waiting for a GPU takes a while, too


@dataclass(frozen=True)
class Forward:
    """One forward pass, in FLOPs."""

    patches: float  # an image: the patch embedding
    encoder: float  # an image: the blocks
    projector_in: float  # an image token: the first layer
    projector_rest: float
    blocks: float  # a token: the language model's, but for what the last block runs where it is read alone
    attention: float  # a query that attends to a key, over the layers in which every token asks
    # Of the last block, where the model reads at targets; else nothing, and it is in the two above:
    read_query: float  # a query
    read_attention: float  # one that attends to a key
    read_target: float  # a target: behind its attention
    head: float  # a target


def count_forward(skeleton: Skeleton) -> Forward:
    """A frozen or a trained model alike."""
    language_model = skeleton.language_model
    layers = language_model.model.layers
    reads = reads_at_targets(language_model.config)
    read_query = 2.0 * query_matrix(layers[-1]).numel() if reads else 0.0
    read_target = sum(2.0 * p.numel() for p in target_matrices(layers[-1])) if reads else 0.0
    first, *rest = (2.0 * p.numel() for p in skeleton.projector.parameters() if p.ndim == 2)
    patches, encoder = _encoder_flops(skeleton)
    attention = 4.0 * skeleton.head_size * int(skeleton.text_config.num_attention_heads)
    return Forward(
        patches=patches,
        encoder=encoder,
        projector_in=first,
        projector_rest=sum(rest),
        blocks=_block_flops(layers) - read_query - read_target,
        attention=(len(layers) - reads) * attention,
        read_query=read_query,
        read_attention=reads * attention,
        read_target=read_target,
        head=2.0 * language_model.lm_head.weight.numel(),
    )


def _encoder_flops(skeleton: Skeleton) -> tuple[float, float]:
    """An image's patch embedding, and its blocks."""
    tower, blocks = skeleton.vision_tower, skeleton.encoder_blocks()
    facts = tower.facts
    if any(isinstance(module, nn.Conv2d) for module in blocks.modules()):  # a map, whose size changes on the way
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower(torch.empty(1, 3, facts.size, facts.size, dtype=torch.uint8, device="meta"))
        return 0.0, float(counter.get_total_flops())
    convolutions = [m for m in tower.model.modules() if isinstance(m, nn.Conv2d)]
    patches = sum(2.0 * facts.num_patches * convolution.weight.numel() for convolution in convolutions)
    attention = 4.0 * facts.num_positions**2 * tower.width * tower.num_blocks
    return patches, facts.num_positions * _block_flops(blocks) + attention


def _block_flops(blocks: nn.Module) -> float:
    """One forward of all blocks' matrices on a token."""
    return sum(2.0 * p.numel() for p in blocks.parameters() if p.ndim == 2)


def training_costs(skeleton: Skeleton, trained: Sequence[str]) -> Costs:
    """Useful FLOPs of a training step, forward and backward.

    A part that trains pays a product for its weights' gradient; one with something trained in front of it, or inside,
    pays one for its input's.
    """
    forward, tokens_per_image = count_forward(skeleton), skeleton.vision_tower.num_features
    vision, projector = (float(name in trained) for name in ("vision_tower", "projector"))
    reached = max(vision, projector)  # a gradient runs back into the embeddings of the row
    through = float(bool(trained))
    encoder = (1 + vision) * forward.patches + (1 + 2 * vision) * forward.encoder
    image_token = (1 + vision + projector) * forward.projector_in + (1 + reached + projector) * forward.projector_rest
    num_products = _num_products(trained)
    return Costs(
        per_token=num_products * forward.blocks,
        per_image_token=encoder / tokens_per_image + image_token,
        per_query=num_products * forward.read_query,
        per_target=num_products * (forward.read_target + forward.head),
        per_attention=(1 + 2 * through) * forward.attention,
        per_read_attention=(1 + 2 * through) * forward.read_attention,
    )


def _num_products(trained: Sequence[str]) -> float:
    """How often a matrix of the language model multiplies: forward, for its input's gradient, and for its own."""
    return 1.0 + bool(trained) + ("language_model" in trained)


@dataclass(frozen=True)
class WorkCounter:
    """Useful FLOPs of batches, from their shapes and host integers alone.

    The plan's cost is the same, but for pairs that happen to share an image in a row: it counts each one's.
    """

    costs: Costs
    tokens_per_image: int

    def useful(self, batch: PackedBatch) -> float:
        """Forward and backward of what the row holds, once; nothing for a dummy."""
        if bool((batch.sample_index == DUMMY_SAMPLE).all()):
            return 0.0
        images = batch.pixel_values.shape[0] if len(batch.image_positions) else 0
        return (
            self.costs.per_token * batch.num_tokens
            + self.costs.per_image_token * images * self.tokens_per_image
            + self.costs.per_query * batch.reading.queries.shape[0]
            + self.costs.per_target * batch.target_ids.shape[0]
            + self.costs.per_attention * attended(batch.segments)
            + self.costs.per_read_attention * attended(batch.reading.segments)
        )


def attended(segments: Segments) -> float:
    """Pairs of a query and a key that it attends to, over the row: causal within each chain, full to its ancestors."""
    own, prefix = 0.0, 0
    for chain in segments.chains:
        queries = chain.num_queries
        own += queries * (queries + 1) / 2
        prefix += queries * (chain.num_keys - queries)
    return own + prefix


def build_work_counter(skeleton: Skeleton, trained: Sequence[str]) -> WorkCounter:
    return WorkCounter(training_costs(skeleton, trained), skeleton.vision_tower.num_features)


def describe_flops(flops: float) -> str:
    """12.2 TFLOP"""
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if flops >= unit:
            return f"{flops / unit:.3g} {name}FLOP"
    return f"{flops / 1e6:.3g} MFLOP"


def measure_matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product here and now, in the run's precision: what MFU is measured against.

    The best of several, in about a quarter of a second; all ranks at once, since they share a machine when they train.
    """
    size, limit_s = MEASURE_SIZE[device.type], MEASURE_S[device.type]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a resume has put its random state back
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best_s, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < limit_s or best_s == float("inf"):
        before = time.perf_counter()
        for _ in range(REPEATS[device.type]):
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, (time.perf_counter() - before) / REPEATS[device.type])
    return 2.0 * size**3 / best_s / 1e12
