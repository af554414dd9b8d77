"""Prefix trees for tests: built by hand into batches, and unrolled into plain sequences to compare with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pivot.batch import PackedBatch
from pivot.trees import Segments

IMAGE_SIZE = 32


def build_batch(
    token_ids: list[list[int]],
    parents: list[int],
    *,
    image_token_id: int = -1,
    num_images: int = 0,
    pixel_values: Tensor | None = None,
) -> PackedBatch:
    """A batch of the trees given segment by segment; every leaf is a completion, scored on all of its tokens.

    Leaves are taken in order as chosen, rejected, chosen, ... Image tokens take the features in order.
    """
    ends = np.cumsum([len(ids) for ids in token_ids])
    starts = ends - [len(ids) for ids in token_ids]
    segments = Segments(starts, ends, np.asarray(parents))
    flat = torch.tensor([i for ids in token_ids for i in ids])
    leaves = [i for i in range(len(parents)) if i not in parents]
    positions, targets, completion = [], [], []
    for order, leaf in enumerate(leaves):
        first = [int(ends[parents[leaf]]) - 1] if parents[leaf] >= 0 else []
        own = list(range(int(starts[leaf]), int(ends[leaf])))
        positions += (first + own)[:-1]
        targets += token_ids[leaf] if first else token_ids[leaf][1:]
        completion += [order] * (len(token_ids[leaf]) - (not first))
    image_positions = (flat == image_token_id).nonzero()[:, 0]
    if pixel_values is None:
        shape = (max(1, num_images), 3, IMAGE_SIZE, IMAGE_SIZE)
        generator = torch.Generator().manual_seed(5)
        pixel_values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return PackedBatch(
        token_ids=flat.clamp(min=0),
        position_ids=torch.from_numpy(segments.position_ids()),
        segments=segments,
        pixel_values=pixel_values,
        image_positions=image_positions,
        feature_index=torch.arange(len(image_positions)),
        target_positions=torch.tensor(positions),
        target_ids=torch.tensor(targets),
        target_completion=torch.tensor(completion),
        role=torch.arange(len(leaves)) % 2,  # chosen, rejected, ...
        group=torch.arange(len(leaves)) // 2,
        completion_tokens=torch.bincount(torch.tensor(completion), minlength=len(leaves)),
        completion_weight=torch.ones(len(leaves)),
        sample_index=torch.arange(-(-len(leaves) // 2)),
    )


def unroll(token_ids: list[list[int]], parents: list[int]) -> list[tuple[list[int], int]]:
    """Each leaf's whole sequence from the root, and how many of its last tokens are the leaf's own."""
    found = []
    for leaf in range(len(parents)):
        if leaf in parents:
            continue
        path, node = [], leaf
        while node != -1:
            path.append(node)
            node = parents[node]
        sequence = [i for node in reversed(path) for i in token_ids[node]]
        found.append((sequence, len(token_ids[leaf]) - (parents[leaf] == -1)))
    return found


def random_segments(lengths: list[int], vocabulary: int = 250, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


# name -> (lengths of the segments, parents): depth one to three, several trees, single-token segments, wide branching
TREES: dict[str, tuple[list[int], list[int]]] = {
    "one sequence": ([9], [-1]),
    "two sequences": ([5, 7], [-1, -1]),
    "pair": ([6, 4, 5], [-1, 0, 0]),
    "two pairs": ([6, 4, 5, 3, 1, 7], [-1, 0, 0, -1, 3, 3]),
    "rejected far longer": ([3, 2, 17], [-1, 0, 0]),
    "image tree": ([8, 3, 4, 5, 2, 6, 1], [-1, 0, 1, 1, 0, 4, 4]),
    "group of four": ([6, 3, 4, 5, 2], [-1, 0, 0, 0, 0]),
}
