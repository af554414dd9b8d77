"""Encoded samples and their pixels to one PackedBatch: a row of trees, each a prompt with its completions as children.

A prompt may have any number of completions: a chosen and a rejected one, one alone, or many that were sampled for it.
With image trees, samples that follow each other and begin with the same tokens and images share that beginning: image,
then questions, then completions.

The shift by one lives here and nowhere else: the position that predicts a completion's first token is the last of the
prompt, for each of its completions alike; token i of a completion is predicted at the position of token i - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pivot.batch import ROLES, PackedBatch
from pivot.data.lengths import image_prefix
from pivot.trees import Segments

if TYPE_CHECKING:
    from pivot.encoders.facts import ImageGeometry


class Completion(NamedTuple):
    role: str  # one of ROLES
    token_ids: np.ndarray  # int64[n], n >= 1


@dataclass(frozen=True)
class Example:
    """A sample that is ready to be packed: a prompt, and the completions that continue it."""

    row: int  # of the data set, or DUMMY_SAMPLE
    prompt: np.ndarray  # int64[n], n >= 1
    completions: Sequence[Completion]
    pixels: Sequence[Tensor] = ()  # uint8[3, H, W] for each image of the prompt
    image_ids: Sequence[str] = ()  # equal ids are the same image: encoded once
    weight: float = 1.0


def masked_example(row: int, roles: Sequence[str], image_token_id: int) -> Example:
    """What stands for a sample that cannot be read, or (row DUMMY_SAMPLE) for none: a token a segment, weight 0."""
    filler = np.array([0 if image_token_id != 0 else 1])  # any token that is not an image
    return Example(row, filler, [Completion(role, filler) for role in roles], weight=0.0)


def collate(
    examples: Sequence[Example], geometry: ImageGeometry, image_token_id: int, *, image_trees: bool = False
) -> PackedBatch:
    """The micro-batch of `examples`, at least one; each is a group of the batch.

    Raises ValueError, naming the row, when the image tokens of a prompt do not match its images.
    """
    row = _RowBuilder(image_token_id, geometry.num_tokens, image_trees)
    for example in examples:
        row.add(example)
    black = torch.zeros(3, geometry.size, geometry.size, dtype=torch.uint8)
    segments = Segments(np.array(row.start), np.array(row.end), np.array(row.parent))
    num_targets = torch.tensor(row.completion_tokens)
    return PackedBatch(
        token_ids=_join(row.token_ids),
        position_ids=torch.from_numpy(segments.position_ids()),
        segments=segments,
        pixel_values=torch.stack(row.pixels or [black]),
        image_positions=_join(row.image_positions),
        feature_index=_join(row.feature_index),
        target_positions=_join(row.target_positions),
        target_ids=_join(row.target_ids),
        target_completion=torch.arange(len(num_targets)).repeat_interleave(num_targets),
        role=torch.tensor(row.role),
        group=torch.tensor(row.group),
        completion_tokens=num_targets,
        completion_weight=torch.tensor(row.completion_weight, dtype=torch.float32),
        sample_index=torch.tensor(row.sample_index),
    )


class _Trunk(NamedTuple):
    """The beginning of a prompt up to its last image token."""

    image_ids: tuple[str, ...]
    tokens: bytes
    segment: int


class _RowBuilder:
    """The row as it grows, one example after the other."""

    def __init__(self, image_token_id: int, num_image_tokens: int, image_trees: bool) -> None:
        self.image_token_id, self.num_image_tokens = image_token_id, num_image_tokens
        self.image_trees = image_trees
        self.length = 0
        self.trunk: _Trunk | None = None  # of the last example, which the next one may share
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
        self.role: list[int] = []
        self.group: list[int] = []
        self.completion_tokens: list[int] = []
        self.completion_weight: list[float] = []
        self.sample_index: list[int] = []

    def add(self, example: Example) -> None:
        group = len(self.sample_index)
        self.sample_index.append(example.row)
        prompt = self._add_prompt(example)
        for completion in example.completions:
            self.role.append(ROLES.index(completion.role))
            self.group.append(group)
            self.completion_weight.append(example.weight)
            self._add_completion(completion.token_ids, prompt)

    def _add_prompt(self, example: Example) -> int:
        """The segment that the completions continue: the prompt's, or its last one."""
        prompt = example.prompt
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

    def _add_completion(self, token_ids: np.ndarray, prompt: int) -> None:
        last_of_prompt = self.end[prompt] - 1
        segment = self._add_segment(token_ids, parent=prompt)
        inside = np.arange(self.start[segment], self.end[segment] - 1)
        self.target_positions.append(np.concatenate([[last_of_prompt], inside]))
        self.target_ids.append(token_ids)
        self.completion_tokens.append(len(token_ids))

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
