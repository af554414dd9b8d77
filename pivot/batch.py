"""What travels from the data to the model and the objective: one padding-free row of tokens in prefix trees.

Letters used for shapes: T tokens, S segments, I images, F image tokens (one image feature each), N targets,
C completions, G groups, P pairs. A group is one sample of the data set with all its completions: a preference pair, the
one answer of an SFT sample, an answer alone that is good (chosen) or bad (rejected), the many answers that were sampled
for one prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pivot.system.distributed import send
from pivot.trees import Reading, Segments

CHOSEN = "chosen"
REJECTED = "rejected"
COMPLETION = "completion"  # one of many of its prompt, neither preferred nor rejected: its value is a number
MISMATCHED = "mismatched"  # the answer to another sample's prompt: KTO tells from it how far the policy has moved
ROLES = (CHOSEN, REJECTED, COMPLETION, MISMATCHED)  # `PackedBatch.role` holds the places of the names in here
DUMMY_SAMPLE = -1  # `sample_index` of the weight-0 group that a rank runs when it has nothing to do

REFERENCE = "reference"  # the name, in `completion_values`, of a completion's log-prob under the reference model


# The units of a step: what a sum may be divided by.
SAMPLE = "sample"  # a group: a pair, an SFT sample
CHOSEN_TOKEN = "chosen_token"  # a target of a chosen completion
TARGET_TOKEN = "target_token"  # a target of any completion that the objective scores
CHOSEN_ANSWER = "chosen_answer"  # a chosen completion
REJECTED_ANSWER = "rejected_answer"  # a rejected completion
ANSWER = "answer"  # either of them


class StepCounts(dict[str, int]):
    """unit -> how many of it a whole step holds, over all ranks: what each sum of an objective is divided by, once.

    A plan knows the counts from stored lengths before the step, a source that makes its completions only afterwards; an
    objective may name any unit that its source counts. A masked sample of a plan is counted: it adds zero to the sums
    and leaves the denominators as planned, so that every rank knows them without talking to the others.
    """

    def denominator(self, unit: str) -> int:
        """The count of `unit`, at least 1: a step without any has a sum of zero, and a mean of zero."""
        return max(1, self[unit])

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts({unit: self.get(unit, 0) + other.get(unit, 0) for unit in {**self, **other}})


class Pairs(NamedTuple):
    """A batch seen as preference pairs: the completions of every group that holds both roles, in the groups' order."""

    chosen: Tensor  # int64[P]: which of the C completions
    rejected: Tensor  # int64[P]


@dataclass
class PackedBatch:
    """One micro-batch: a row of T tokens in prefix trees, its distinct images and the targets to score.

    `completion_values` and `token_values` hold what an objective reads besides the log-probs, by name. They are added
    to a batch on the host and move with it. `completions_of` and `pairs` follow from `role` and `group`; they are made
    on the host, so that an objective can take completions by their role without a wait for the device.
    """

    token_ids: Tensor  # int64[T]; image tokens hold the image-token id
    position_ids: Tensor  # int64[T]
    segments: Segments

    pixel_values: Tensor  # uint8[I, 3, H, W], I >= 1: a black dummy when the row holds no image
    image_positions: Tensor  # int64[F]: the row position that takes a feature
    feature_index: Tensor  # int64[F]: which of the I * num_image_tokens features it takes

    target_positions: Tensor  # int64[N]: the position whose hidden state predicts
    target_ids: Tensor  # int64[N]
    target_completion: Tensor  # int64[N], in [0, C), not decreasing

    role: Tensor  # int64[C]: places in ROLES
    group: Tensor  # int64[C], in [0, G)
    completion_tokens: Tensor  # int64[C]: targets per completion
    completion_weight: Tensor  # float32[C]: 0 for a dummy or a masked bad sample, else 1
    sample_index: Tensor  # int64[G], on the host: the row of the data set, DUMMY_SAMPLE for a dummy
    completion_values: dict[str, Tensor] = field(default_factory=dict)  # name -> float32[C]
    token_values: dict[str, Tensor] = field(default_factory=dict)  # name -> float32[N], in the order of the targets

    reading: Reading = field(init=False)  # of the targets; made here, on the host, and moved with the batch
    completions_of: dict[str, Tensor] = field(init=False)  # role -> int64[..]: the completions that play it, in order
    pairs: Pairs = field(init=False)

    def __post_init__(self) -> None:
        self.reading = Reading.at(self.target_positions, self.segments)
        role, group = self.role.numpy(), self.group.numpy()
        places = {name: np.flatnonzero(role == code) for code, name in enumerate(ROLES)}
        self.completions_of = {name: torch.from_numpy(index) for name, index in places.items()}
        chosen, rejected = places[CHOSEN], places[REJECTED]
        _, first, second = np.intersect1d(group[chosen], group[rejected], return_indices=True)
        self.pairs = Pairs(torch.from_numpy(chosen[first]), torch.from_numpy(rejected[second]))

    @property
    def num_completions(self) -> int:
        return self.completion_weight.shape[0]

    @property
    def num_groups(self) -> int:
        return self.sample_index.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def completion_rows(self) -> Tensor:
        """int64[C] of a batch on the host: the data set's row of each completion, DUMMY_SAMPLE for a dummy."""
        return self.sample_index[self.group]

    def completion_logps(self, token_logps: Tensor) -> Tensor:
        """Sum float32[N] log-probs into float32[C], one per completion."""
        sums = torch.zeros(self.num_completions, dtype=token_logps.dtype, device=token_logps.device)
        return sums.index_add(0, self.target_completion, token_logps)

    def counts(self, roles: tuple[str, ...] = ROLES) -> StepCounts:
        """What a batch on the host holds of `roles`, without what has weight 0: for whoever cannot know it before."""
        real = self.completion_weight > 0
        tokens = torch.where(real, self.completion_tokens, 0)
        taken = {role: int(tokens[self.completions_of[role]].sum()) for role in {*roles, CHOSEN}}
        chosen, rejected = (
            int(real[self.completions_of[role]].sum()) if role in roles else 0 for role in (CHOSEN, REJECTED)
        )
        return StepCounts(
            {
                SAMPLE: len(self.group[real].unique()),
                CHOSEN_TOKEN: taken[CHOSEN],
                TARGET_TOKEN: sum(taken[role] for role in roles),
                CHOSEN_ANSWER: chosen,
                REJECTED_ANSWER: rejected,
                ANSWER: chosen + rejected,
            }
        )

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from where it travels to a GPU while that computes."""
        return self.move(Tensor.pin_memory)

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`; `sample_index` and the segments' integers stay on the host."""
        return self.move(lambda tensor: send(tensor, device))

    def move(self, how: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch, `how` applied to its tensors; `sample_index` stays."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "sample_index":
                setattr(moved, name, how(value))
            elif isinstance(value, dict):
                setattr(moved, name, {key: how(tensor) for key, tensor in value.items()})
        moved.pairs = Pairs(*map(how, self.pairs))
        moved.segments, moved.reading = self.segments.move(how), self.reading.move(how)
        return moved
