"""KTO: each answer learned from by itself, as desirable or undesirable, measured from how far the policy has moved.

Kahneman-Tversky optimisation, arxiv.org/abs/2402.01306. The reference point z0 is the KL between policy and reference,
estimated from answers to other prompts, which nobody trains on: the mean of log(policy / reference) over one such
answer a sample.

TRL takes that mean over a micro-batch, by a forward pass of its own ahead of it. Here these answers are further
branches of the trees that are computed anyway; the mean is that of the whole step, over all ranks, and it serves the
next step. So it has less noise, needs no second pass over prompts and images, and is the same however a step is cut;
the price is that it comes one step late. The first step's z0 is 0, its true value where the run starts from its
reference.

Letters: N targets, C completions, K answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

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
    SAMPLE,
    PackedBatch,
)
from pivot.objectives.matching import Matching
from pivot.objectives.objective import Outcome, Term

if TYPE_CHECKING:
    from pivot.config import KTOConfig


def desirable_loss(log_ratio: Tensor, kl: float, *, beta: float) -> Tensor:
    """float32[K]: how far the value of good answers is from its most, of their log(policy / reference)."""
    return torch.sigmoid(-beta * (log_ratio - kl))  # 1 - v, eq. 7 and 8, arxiv.org/abs/2402.01306, z0 = kl


def undesirable_loss(log_ratio: Tensor, kl: float, *, beta: float) -> Tensor:
    """float32[K]: the same for bad answers, whose value is what they lost."""
    return torch.sigmoid(-beta * (kl - log_ratio))


class KTOObjective:
    """Sums over a micro-batch of the loss, of TRL's metrics and of the KL; a masked answer adds exactly zero.

    The loss is a mean over the step's answers, as TRL's: a pair counts as two. `kl` is what a step measured, in nats;
    where it is above 0 it is the reference point of the next step, the one thing kept here between steps. With
    `baseline: none` it stays 0, which is TRL's `apo_zero_unpaired`.
    """

    name: ClassVar[str] = "kto"
    unit_name: ClassVar[str] = "samples"
    needs_reference = True
    learns_from_single_answers = True
    matching: Matching | None = None

    def __init__(self, section: KTOConfig) -> None:
        self._section = section
        self.metrics_every_step = section.baseline == MISMATCHED
        self.roles: tuple[str, ...] = (CHOSEN, REJECTED, *((MISMATCHED,) if self.metrics_every_step else ()))
        self.reference_folder = section.reference
        self.margin_scale: float | None = section.beta
        self.kl = 0.0  # the reference point, in nats
        if not section.desirable_weight and not section.undesirable_weight:
            raise ValueError(
                "objective.kto: desirable_weight and undesirable_weight are both 0; give at least one of them a weight"
            )

    def __str__(self) -> str:
        return "objective.kto"

    @staticmethod
    def describe(section: KTOConfig) -> str:
        return f"beta {section.beta} · weights {section.desirable_weight:g} : {section.undesirable_weight:g}"

    def __call__(self, token_logps: Tensor, batch: PackedBatch) -> Outcome:
        policy = batch.completion_logps(token_logps)
        assert REFERENCE in batch.completion_values, "the loss needs the reference's log-probs of the completions"
        weight = batch.completion_weight
        # Before any arithmetic: 0 * nan is nan, and so is the gradient of a where() around it.
        policy = torch.where(weight > 0, policy, 0.0)
        log_ratio = policy - torch.where(weight > 0, batch.completion_values[REFERENCE], 0.0)
        chosen, rejected, others = (batch.completions_of[role] for role in (CHOSEN, REJECTED, MISMATCHED))
        section, beta = self._section, self._section.beta
        desirable = weight[chosen] * desirable_loss(log_ratio[chosen], self.kl, beta=beta)
        undesirable = weight[rejected] * undesirable_loss(log_ratio[rejected], self.kl, beta=beta)
        total = section.desirable_weight * desirable.sum() + section.undesirable_weight * undesirable.sum()
        policy, log_ratio = policy.detach(), log_ratio.detach()
        metrics = {
            "rewards/chosen": Term((weight * beta * log_ratio)[chosen].sum(), CHOSEN_ANSWER),
            "rewards/rejected": Term((weight * beta * log_ratio)[rejected].sum(), REJECTED_ANSWER),
            "logps/chosen": Term((weight * policy)[chosen].sum(), CHOSEN_ANSWER),
            "logps/rejected": Term((weight * policy)[rejected].sum(), REJECTED_ANSWER),
        }
        if len(others):  # a held-out set has none
            metrics["kl"] = Term((weight * log_ratio)[others].sum(), SAMPLE)  # one a sample
        return Outcome({"kto": (1.0, Term(total, ANSWER))}, metrics)

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Make a finished step's KL the reference point of the next one; below 0, where no KL is, it counts as 0."""
        if self.metrics_every_step and math.isfinite(metrics["kl"]):
            self.kl = max(0.0, metrics["kl"])

    def state_dict(self) -> dict[str, Any]:
        return {"kl": self.kl} if self.metrics_every_step else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; a mismatch means that the baseline was changed, which a resume may not do."""
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"objective state: found {sorted(state)}, expected {sorted(self.state_dict())}; "
                "resume with the objective.kto settings that the checkpoint was written with"
            )
        if self.metrics_every_step:
            self.kl = float(state["kl"])
