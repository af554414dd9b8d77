"""Random scored answers for KTO's tests: a batch whose model part is empty, and the log-probs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pivot.batch import (
    ANSWER,
    CHOSEN,
    CHOSEN_ANSWER,
    MISMATCHED,
    REFERENCE,
    REJECTED,
    REJECTED_ANSWER,
    ROLES,
    SAMPLE,
    PackedBatch,
    StepCounts,
)
from pivot.trees import Segments


@dataclass
class Answer:
    """One sample as the plan would hold it: its own answer, and one to another prompt; reference log-probs summed."""

    logps: Tensor  # float32[n]
    reference: float
    desirable: bool
    other_logps: Tensor
    other_reference: float
    weight: float = 1.0

    @property
    def counts(self) -> StepCounts:
        units = {CHOSEN_ANSWER: int(self.desirable), REJECTED_ANSWER: int(not self.desirable)}
        return StepCounts({SAMPLE: 1, ANSWER: 1, **units})


def random_answers(num: int, seed: int = 0) -> list[Answer]:
    """Answers of 1 to 12 tokens, three of five desirable; the policy has gained about a nat on the reference."""
    rng = np.random.default_rng(seed)
    answers = []
    for number in range(num):
        own, other = (-rng.exponential(2.0, rng.integers(1, 13)) for _ in range(2))
        references = [float(logps.sum() + rng.normal(-1.0, 2.0)) for logps in (own, other)]
        own, other = torch.tensor(own).float(), torch.tensor(other).float()
        answers.append(Answer(own, references[0], number % 5 < 3, other, references[1]))
    return answers


def batch_of(answers: list[Answer], *, borrowed: bool = True) -> tuple[Tensor, PackedBatch]:
    """(token_logps float32[N] that wants a gradient, the batch with its reference values)."""
    completions, roles, groups, reference, weights = [], [], [], [], []
    for group, answer in enumerate(answers):
        own = (CHOSEN if answer.desirable else REJECTED, answer.logps, answer.reference)
        for role, logps, value in (own, (MISMATCHED, answer.other_logps, answer.other_reference))[: 1 + borrowed]:
            completions.append(logps)
            roles.append(ROLES.index(role))
            groups.append(group)
            reference.append(value)
            weights.append(answer.weight)
    lengths = torch.tensor([len(logps) for logps in completions])
    empty, targets = torch.zeros(0, dtype=torch.int64), torch.zeros(int(lengths.sum()), dtype=torch.int64)
    batch = PackedBatch(
        token_ids=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        segments=Segments(np.array([0]), np.array([1]), np.array([-1])),
        pixel_values=torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
        image_positions=empty,
        feature_index=empty,
        target_positions=targets,
        target_ids=targets,
        target_completion=torch.repeat_interleave(torch.arange(len(completions)), lengths),
        role=torch.tensor(roles),
        group=torch.tensor(groups),
        completion_tokens=lengths,
        completion_weight=torch.tensor(weights),
        sample_index=torch.arange(len(answers)),
        completion_values={REFERENCE: torch.tensor(reference, dtype=torch.float32)},
    )
    return torch.cat(completions).requires_grad_(), batch


def step_counts(answers: list[Answer]) -> StepCounts:
    return sum((answer.counts for answer in answers), StepCounts())
