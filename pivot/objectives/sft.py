"""Supervised fine-tuning: the negative log-likelihood of the completions, per target token of the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pivot.batch import CHOSEN, PackedBatch
from pivot.objectives.objective import Outcome, Term


class SFTObjective:
    """Mean NLL over the step's target tokens (TRL's mean is per micro-batch; this one does not depend on the cut).

    On a preference set it trains on the chosen completions alone: the twin of a DPO run, with the same samples at the
    same steps.
    """

    roles: tuple[str, ...] = (CHOSEN,)
    needs_reference = False
    metrics_every_step = False

    def __call__(self, token_logps: Tensor, batch: PackedBatch, reference: Tensor | None) -> Outcome:
        weight = batch.completion_weight[batch.by_role[CHOSEN]]
        logps = batch.completion_logps(token_logps)[batch.by_role[CHOSEN]]
        total = (weight * torch.where(weight > 0, logps, 0.0)).sum()  # where: 0 * nan of a masked sample is nan
        nll = -total
        return Outcome(
            loss={"sft": (1.0, Term(nll, "target_token"))},
            metrics={"logps/chosen": Term(total.detach(), "pair")},
        )

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Nothing is learned from a step's metrics."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no state."""
