"""Supervised fine-tuning: the negative log-likelihood of the completions, per target token of the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pivot.batch import CHOSEN, SAMPLE, TARGET_TOKEN, PackedBatch
from pivot.objectives.matching import Matching
from pivot.objectives.objective import Outcome, Term


class SFTObjective:
    """Mean NLL over the step's target tokens (TRL's mean is per micro-batch; this one does not depend on the cut).

    On a preference set it trains on the chosen completions alone: the twin of a DPO run, with the same samples at the
    same steps.
    """

    name: ClassVar[str] = "sft"
    unit_name: ClassVar[str] = "samples"
    roles: tuple[str, ...] = (CHOSEN,)
    learns_from_single_answers = False
    needs_reference = False
    reference_folder: str | None = None
    margin_scale: float | None = None
    metrics_every_step = False
    matching: Matching | None = None

    def __init__(self, section: Any) -> None:
        """There is nothing to set."""

    def __str__(self) -> str:
        return "objective.sft"

    @staticmethod
    def describe(section: Any) -> str:
        return ""

    def __call__(self, token_logps: Tensor, batch: PackedBatch) -> Outcome:
        chosen = batch.completions_of[CHOSEN]
        weight, logps = batch.completion_weight[chosen], batch.completion_logps(token_logps)[chosen]
        total = (weight * torch.where(weight > 0, logps, 0.0)).sum()  # where: 0 * nan of a masked sample is nan
        nll = -total
        return Outcome(
            loss={"sft": (1.0, Term(nll, TARGET_TOKEN))},
            metrics={"logps/chosen": Term(total.detach(), SAMPLE)},
        )

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Nothing is learned from a step's metrics."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""
