"""Encoded pairs and their pixels to one PackedBatch: a row of trees, each a prompt with its completions as children.

With image trees, pairs that follow each other and begin with the same tokens and images share that beginning: image,
then questions, then completions.

The shift by one lives here and nowhere else: the position that predicts a completion's first token is the last of the
prompt, for chosen and for rejected alike; token i of a completion is predicted at the position of token i - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pivot.batch import DUMMY_SAMPLE, PackedBatch
from pivot.data.lengths import image_prefix
from pivot.trees import Segments

if TYPE_CHECKING:
    from pivot.encoders.facts import ImageGeometry
    from pivot.processor import EncodedPair


@dataclass(frozen=True)
class Example:
    """One pair ready to be packed; `encoded` is None for a dummy and for a masked sample, which have weight 0."""

    row: int  # of the data set, or DUMMY_SAMPLE
    encoded: EncodedPair | None
    pixels: Sequence[Tensor] = ()  # uint8[3, H, W] for each image of the prompt
    image_ids: Sequence[str] = ()  # equal ids are the same image: encoded once


DUMMY = Example(DUMMY_SAMPLE, None)


def collate(
    examples: Sequence[Example],
    roles: tuple[str, ...],
    geometry: ImageGeometry,
    image_token_id: int,
    *,
    image_trees: bool = False,
) -> PackedBatch:
    """The micro-batch of `examples`; none gives a row with one weight-0 dummy.

    Raises ValueError, naming the row, when the image tokens of a prompt do not match its images.
    """
    row = _Row(image_token_id, geometry.num_tokens, image_trees)
    for example in examples or [DUMMY]:
        row.add(example, roles)
    black = torch.zeros(3, geometry.size, geometry.size, dtype=torch.uint8)
    segments = Segments(np.array(row.start), np.array(row.end), np.array(row.parent))
    num_completions = len(row.completion_tokens)
    by_role = {role: torch.arange(i, num_completions, len(roles)) for i, role in enumerate(roles)}
    return PackedBatch(
        token_ids=_join(row.token_ids),
        position_ids=torch.from_numpy(segments.position_ids()),
        segments=segments,
        pixel_values=torch.stack(row.pixels or [black]),
        image_positions=_join(row.image_positions),
        feature_index=_join(row.feature_index),
        target_positions=_join(row.target_positions),
        target_ids=_join(row.target_ids),
        target_completion=torch.arange(num_completions).repeat_interleave(torch.tensor(row.completion_tokens)),
        by_role=by_role,
        completion_tokens=torch.tensor(row.completion_tokens),
        completion_weight=torch.tensor(row.completion_weight, dtype=torch.float32),
        sample_index=torch.tensor(row.sample_index),
    )


class _Trunk(NamedTuple):
    """The beginning of a prompt up to its last image token."""

    image_ids: tuple[str, ...]
    tokens: bytes
    segment: int


class _Row:
    """The row as it grows, one example after the other."""

    def __init__(self, image_token_id: int, num_image_tokens: int, image_trees: bool) -> None:
        self.image_token_id, self.num_image_tokens = image_token_id, num_image_tokens
        self.image_trees = image_trees
        self.length = 0
        self.trunk: _Trunk | None = None  # of the last pair, which the next one may share
        self.start: list[int] = []
        self.end: list[int] = []
        self.parent: list[int] = []
        self.token_ids: list[np.ndarray] = []
        self.pixels: list[Tensor] = []
        self.image_numbers: dict[str, int] = {}
        self.image_positions: list[np.ndarray] = []
        self.feature_index: list[np.ndarray] = []
        self.target_positions: list[np.ndarray] = []
        self.target_ids: list[np.ndarray] = []
        self.completion_tokens: list[int] = []
        self.completion_weight: list[float] = []
        self.sample_index: list[int] = []

    def add(self, example: Example, roles: tuple[str, ...]) -> None:
        self.sample_index.append(example.row)
        if example.encoded is None:
            filler = np.array([0 if self.image_token_id != 0 else 1])  # any token that is not an image
            self.trunk = None
            prompt, completions, weight = self._add_segment(filler, parent=-1), dict.fromkeys(roles, filler), 0.0
        else:
            prompt = self._add_prompt(example, example.encoded.prompt)
            completions, weight = example.encoded.completions, 1.0
        for role in roles:
            self._add_completion(completions[role], prompt, weight)

    def _add_prompt(self, example: Example, prompt: np.ndarray) -> int:
        """The segment that the completions continue: the prompt's, or its last one."""
        cut = image_prefix(prompt, self.image_token_id) if self.image_trees else 0
        if cut in (0, len(prompt)):
            self.trunk = None
            self._add_images(example, prompt)
            return self._add_segment(prompt, parent=-1)
        trunk = _Trunk(tuple(example.image_ids), prompt[:cut].tobytes(), len(self.start))
        if self.trunk is None or trunk[:2] != self.trunk[:2]:
            self.trunk = trunk
            self._add_images(example, prompt)
            self._add_segment(prompt[:cut], parent=-1)
        return self._add_segment(prompt[cut:], parent=self.trunk.segment)

    def _add_segment(self, token_ids: np.ndarray, parent: int) -> int:
        self.token_ids.append(token_ids)
        self.start.append(self.length)
        self.length += len(token_ids)
        self.end.append(self.length)
        self.parent.append(parent)
        return len(self.start) - 1

    def _add_completion(self, token_ids: np.ndarray, prompt: int, weight: float) -> None:
        last_of_prompt = self.end[prompt] - 1
        segment = self._add_segment(token_ids, parent=prompt)
        inside = np.arange(self.start[segment], self.end[segment] - 1)
        self.target_positions.append(np.concatenate([[last_of_prompt], inside]))
        self.target_ids.append(token_ids)
        self.completion_tokens.append(len(token_ids))
        self.completion_weight.append(weight)

    def _add_images(self, example: Example, prompt: np.ndarray) -> None:
        positions = np.flatnonzero(prompt == self.image_token_id)
        if len(positions) != len(example.pixels) * self.num_image_tokens:
            raise ValueError(
                f"row {example.row}: the prompt holds {len(positions)} image tokens, expected "
                f"{self.num_image_tokens} for each of {len(example.pixels)} images"
            )
        self.image_positions.append(positions + self.length)
        for image_id, pixels in zip(example.image_ids, example.pixels, strict=True):
            number = self.image_numbers.setdefault(image_id, len(self.pixels))
            if number == len(self.pixels):
                self.pixels.append(pixels)
            first = number * self.num_image_tokens
            self.feature_index.append(np.arange(first, first + self.num_image_tokens))


def _join(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))
