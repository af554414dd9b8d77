"""What travels from the data to the model and the objective: one padding-free row of tokens in prefix trees.

Letters used for shapes: T tokens, S segments, I images, F image tokens (one image feature each), N targets,
C completions, P pairs (for SFT: samples).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pivot.trees import Reading, Segments

CHOSEN = "chosen"
REJECTED = "rejected"
DUMMY_SAMPLE = -1  # `sample_index` of the weight-0 pair that a rank runs when it has nothing to do


@dataclass
class PackedBatch:
    """One micro-batch: a row of T tokens in prefix trees, its distinct images and the targets to score."""

    token_ids: Tensor  # int64[T]; image tokens hold the image-token id
    position_ids: Tensor  # int64[T]
    segments: Segments

    pixel_values: Tensor  # uint8[I, 3, H, W], I >= 1: a black dummy when the row holds no image
    image_positions: Tensor  # int64[F]: the row position that takes a feature
    feature_index: Tensor  # int64[F]: which of the I * num_image_tokens features it takes

    target_positions: Tensor  # int64[N]: the position whose hidden state predicts
    target_ids: Tensor  # int64[N]
    target_completion: Tensor  # int64[N], in [0, C), not decreasing

    by_role: dict[str, Tensor]  # role -> int64[P]: the completion that plays it in pair p, in the order of the pairs
    completion_tokens: Tensor  # int64[C]: targets per completion
    completion_weight: Tensor  # float32[C]: 0 for a dummy or a masked bad sample, else 1
    sample_index: Tensor  # int64[P], on the host: the row of the data set, DUMMY_SAMPLE for a dummy
    reading: Reading = field(init=False)  # of the targets; made here, on the host, and moved with the batch

    def __post_init__(self) -> None:
        self.reading = Reading.at(self.target_positions, self.segments)

    @property
    def num_completions(self) -> int:
        return self.completion_weight.shape[0]

    @property
    def num_pairs(self) -> int:
        return self.sample_index.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def completion_logps(self, token_logps: Tensor) -> Tensor:
        """Sum float32[N] log-probs into float32[C], one per completion."""
        sums = torch.zeros(self.num_completions, dtype=token_logps.dtype, device=token_logps.device)
        return sums.index_add(0, self.target_completion, token_logps)

    def pair_weight(self) -> Tensor:
        """float32[P]: the weight of each pair, which its completions share."""
        return self.completion_weight[self.by_role[CHOSEN]]

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from where it travels to a GPU while that computes."""
        return self._move(Tensor.pin_memory)

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`; `sample_index` and the segments' integers stay on the host."""
        return self._move(lambda tensor: tensor.to(device, non_blocking=True))

    def _move(self, how: Callable[[Tensor], Tensor]) -> PackedBatch:
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "sample_index":
                setattr(moved, name, how(value))
        moved.by_role = {role: how(index) for role, index in self.by_role.items()}
        moved.segments, moved.reading = self.segments.move(how), self.reading.move(how)
        return moved


@dataclass(frozen=True)
class StepCounts:
    """Planned numbers of pairs (for SFT: samples) and targets; the field names are the units of a `Term`.

    A masked pair is counted: it adds zero to the sums and leaves the denominators as planned, so that every rank
    knows them without talking to the others.
    """

    pair: int
    chosen_token: int  # targets of the chosen completions
    target_token: int  # targets of all completions

    def denominator(self, unit: str) -> int:
        """The count of `unit`, at least 1: a step without any has a sum of zero, and a mean of zero."""
        return max(1, int(getattr(self, unit)))

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts(
            pair=self.pair + other.pair,
            chosen_token=self.chosen_token + other.chosen_token,
            target_token=self.target_token + other.target_token,
        )
