"""Random scored pairs for the objectives' tests: a batch whose model part is empty, and the log-probs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pivot.batch import (
    CHOSEN,
    CHOSEN_TOKEN,
    REFERENCE,
    REJECTED,
    ROLES,
    SAMPLE,
    TARGET_TOKEN,
    PackedBatch,
    StepCounts,
)
from pivot.objectives import Outcome
from pivot.trees import Segments


@dataclass
class Pair:
    """One pair as the plan would hold it: float32 log-probs of its targets, summed ones of its reference."""

    chosen: Tensor
    rejected: Tensor
    reference: tuple[float, float]
    weight: float = 1.0

    @property
    def counts(self) -> StepCounts:
        chosen = len(self.chosen)
        return StepCounts({SAMPLE: 1, CHOSEN_TOKEN: chosen, TARGET_TOKEN: chosen + len(self.rejected)})


def random_pairs(num_pairs: int, seed: int = 0) -> list[Pair]:
    """Completions of 1 to 12 tokens; the reference is off by about a nat."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(num_pairs):
        chosen, rejected = (-rng.exponential(2.0, rng.integers(1, 13)) for _ in range(2))
        reference = (chosen.sum() + rng.normal(), rejected.sum() + rng.normal())
        pairs.append(Pair(torch.tensor(chosen).float(), torch.tensor(rejected).float(), reference))
    return pairs


def batch_of(pairs: list[Pair], roles: tuple[str, ...] = (CHOSEN, REJECTED)) -> tuple[Tensor, PackedBatch]:
    """(token_logps float32[N] that wants a gradient, the batch with its reference values)."""
    completions = [pair.chosen if role == CHOSEN else pair.rejected for pair in pairs for role in roles]
    lengths = torch.tensor([len(logps) for logps in completions])
    reference = [pair.reference[(CHOSEN, REJECTED).index(role)] for pair in pairs for role in roles]
    width = len(roles)
    num_targets = int(lengths.sum())
    batch = PackedBatch(
        token_ids=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        segments=Segments(np.array([0]), np.array([1]), np.array([-1])),
        pixel_values=torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
        image_positions=torch.zeros(0, dtype=torch.int64),
        feature_index=torch.zeros(0, dtype=torch.int64),
        target_positions=torch.zeros(num_targets, dtype=torch.int64),
        target_ids=torch.zeros(num_targets, dtype=torch.int64),
        target_completion=torch.repeat_interleave(torch.arange(len(completions)), lengths),
        role=torch.tensor([ROLES.index(role) for role in roles]).repeat(len(pairs)),
        group=torch.arange(len(pairs)).repeat_interleave(width),
        completion_tokens=lengths,
        completion_weight=torch.tensor([pair.weight for pair in pairs for _ in roles]),
        sample_index=torch.arange(len(pairs)),
        completion_values={REFERENCE: torch.tensor(reference, dtype=torch.float32)},
    )
    return torch.cat(completions).requires_grad_(), batch


def step_counts(pairs: list[Pair]) -> StepCounts:
    return sum((pair.counts for pair in pairs), StepCounts())


def step_loss(outcome: Outcome, counts: StepCounts) -> Tensor:
    """The loss as the trainer forms it from one micro-batch's sums."""
    terms = [weight * term.total / counts.denominator(term.unit) for weight, term in outcome.loss.values()]
    return torch.stack(terms).sum()


def step_metrics(outcome: Outcome, counts: StepCounts) -> dict[str, float]:
    return {name: float(term.total) / counts.denominator(term.unit) for name, term in outcome.metrics.items()}
