"""What an objective is: token log-probs in, sums with their units out. The caller divides once, by the global count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from pivot.batch import PackedBatch
from pivot.objectives.matching import Matching


class Term(NamedTuple):
    """A sum over one micro-batch, and what it is to be divided by, once, over the whole step."""

    total: Tensor  # float32[]
    unit: str  # one that the step's StepCounts hold: SAMPLE, CHOSEN_TOKEN, TARGET_TOKEN


class Outcome(NamedTuple):
    """The step's loss is the sum of weight * total / count[unit]; the metrics are total / count[unit]."""

    loss: dict[str, tuple[float, Term]]  # name -> (weight, term)
    metrics: dict[str, Term]  # without gradient


class Objective(Protocol):
    """What is learned, and all that the rest of a run has to know of it."""

    name: ClassVar[str]  # its section in the run's `objective`
    unit_name: ClassVar[str]  # what people call the samples that it learns from: pairs, samples

    roles: tuple[str, ...]  # the completions that it needs of each sample, in order
    learns_from_single_answers: bool  # a set whose samples have one labelled answer each will do
    needs_reference: bool  # the batch must hold `completion_values[REFERENCE]`
    reference_folder: str | None  # whose weights the reference has; None: those that the run starts from
    # Reward per nat of log-prob that a completion gained over the reference, where there are such rewards: when a run
    # starts from its reference, the margins between chosen and rejected, in this scale, must be zero. None: no margins.
    margin_scale: float | None
    metrics_every_step: bool  # `after_step` must see every step's metrics, also of steps that are not logged
    matching: Matching | None  # what must see a whole step before its losses can be computed; None: nothing

    def __init__(self, section: Any) -> None:
        """Of its own section; ValueError, with the key, for a setting that it cannot follow."""
        ...

    def __str__(self) -> str:
        """The setting that chose it, for messages: `objective.dpo.loss: sigmoid`."""
        ...

    @staticmethod
    def describe(section: Any) -> str:
        """What a report says of a run's section besides the name: `sigmoid · beta 0.1`; may be empty."""
        ...

    def __call__(self, token_logps: Tensor, batch: PackedBatch) -> Outcome:
        """float32[N] log-probs of the batch's targets -> sums over the batch; a masked completion adds exactly zero."""
        ...

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Take in a finished step's metrics, already averaged over all ranks; a skipped step is not one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: plain numbers, equal on all ranks."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
