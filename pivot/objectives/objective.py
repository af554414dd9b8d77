"""What an objective is: token log-probs in, sums with their units out. The caller divides once, by the global count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pivot.batch import PackedBatch


class Term(NamedTuple):
    """A sum over one micro-batch, and what it is to be divided by, once, over the whole step."""

    total: Tensor  # float32[]
    unit: str  # a field of StepCounts: pair | chosen_token | target_token


class Outcome(NamedTuple):
    """The step's loss is the sum of weight * total / count[unit]; the metrics are total / count[unit]."""

    loss: dict[str, tuple[float, Term]]  # name -> (weight, term)
    metrics: dict[str, Term]  # without gradient


class Objective(Protocol):
    """What is learned. `roles`: the completions it needs of each sample, in order."""

    roles: tuple[str, ...]
    needs_reference: bool  # `reference` must be given
    metrics_every_step: bool  # `after_step` must see every step's metrics, also of steps that are not logged

    def __call__(self, token_logps: Tensor, batch: PackedBatch, reference: Tensor | None) -> Outcome:
        """float32[N] log-probs of the targets, float32[C] of the completions under the reference -> sums."""
        ...

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Take in a finished step's metrics, already averaged over all ranks; a skipped step is not one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: plain numbers, equal on all ranks."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
