"""Savings of the prefix tree taken back, one by one, on a finished micro-batch: what each of them is worth.

Every function maps a PackedBatch to one with the same completions, the same losses and more work.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from pivot.batch import COMPLETION, ROLES, PackedBatch
from pivot.trees import Segments


def unroll(batch: PackedBatch) -> PackedBatch:
    """Each completion behind its own copy of the prompt; images are still encoded once."""
    segments = batch.segments
    parents = set(segments.parent.tolist())
    leaves = [segment for segment in range(len(segments)) if segment not in parents]
    assert len(leaves) == batch.num_completions, "a leaf is a completion"
    paths = []
    for leaf in leaves:
        spans = [(segments.start[s], segments.end[s]) for s in (*segments.ancestors(leaf), leaf)]
        paths.append(np.concatenate([np.arange(start, end) for start, end in spans]))
    ends = np.cumsum([len(path) for path in paths])
    starts = ends - [len(path) for path in paths]
    places = torch.from_numpy(np.concatenate(paths))  # old position of each new one

    feature_at = torch.full((batch.num_tokens,), -1)
    feature_at[batch.image_positions] = batch.feature_index
    features = feature_at[places]
    # A position counts its ancestors' tokens, so it is also the place within the unrolled path.
    targets = torch.from_numpy(starts)[batch.target_completion] + batch.position_ids[batch.target_positions]
    return dataclasses.replace(
        batch,
        token_ids=batch.token_ids[places],
        position_ids=batch.position_ids[places],
        segments=Segments(starts, ends, np.full(len(paths), -1)),
        image_positions=(features >= 0).nonzero()[:, 0],
        feature_index=features[features >= 0],
        target_positions=targets,
    )


def encode_each_time(batch: PackedBatch, tokens_per_image: int) -> PackedBatch:
    """An own copy of its images for every completion of an unrolled batch."""
    pixels, index = [], batch.feature_index.clone()
    for start, end in zip(batch.segments.start, batch.segments.end, strict=True):
        inside = (batch.image_positions >= int(start)) & (batch.image_positions < int(end))
        images, local = torch.unique(batch.feature_index[inside] // tokens_per_image, return_inverse=True)
        offset = batch.feature_index[inside] % tokens_per_image
        index[inside] = (len(pixels) + local) * tokens_per_image + offset
        pixels += [batch.pixel_values[image] for image in images.tolist()]
    if not pixels:
        return batch
    return dataclasses.replace(batch, pixel_values=torch.stack(pixels), feature_index=index)


def score_everything(batch: PackedBatch) -> PackedBatch:
    """The head also on the positions whose log-probs nobody reads, as one more completion of weight 0."""
    others = torch.ones(batch.num_tokens, dtype=torch.bool)
    others[batch.target_positions] = False
    positions = others.nonzero()[:, 0]
    extra = torch.full_like(positions, batch.num_completions)
    return dataclasses.replace(
        batch,
        target_positions=torch.cat([batch.target_positions, positions]),
        target_ids=torch.cat([batch.target_ids, torch.zeros_like(positions)]),
        target_completion=torch.cat([batch.target_completion, extra]),
        role=torch.cat([batch.role, torch.tensor([ROLES.index(COMPLETION)])]),
        group=torch.cat([batch.group, batch.group[-1:]]),
        completion_tokens=torch.cat([batch.completion_tokens, torch.tensor([len(positions)])]),
        completion_weight=torch.cat([batch.completion_weight, torch.zeros(1)]),
    )
