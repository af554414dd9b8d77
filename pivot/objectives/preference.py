"""Preference optimisation: one loss of losses.py, or a weighted mix of them with an SFT term (MPO).

    objective.dpo.loss: sigmoid
    objective.dpo.loss: {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}      # MPO, arxiv.org/abs/2411.10442

Letters: N targets, C completions, P pairs.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pivot.batch import CHOSEN, REJECTED, PackedBatch
from pivot.objectives.losses import LOSSES, READ_BY, REFERENCE_FREE, LossOptions, NumTokens
from pivot.objectives.objective import Outcome, Term

if TYPE_CHECKING:
    from pivot.config import DPOConfig

SFT = "sft"  # the mix's NLL on the chosen completions, per chosen token; the other terms are per pair


class PairScores(NamedTuple):
    """Summed log-probs of each pair, float32[P]; zeros where the pair is masked, and where there is no reference."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


class PreferenceObjective:
    """Sums of the mix's terms and of TRL's metrics over a micro-batch; a masked pair adds exactly zero to each.

    Where the mix needs no reference (simpo, sft), the rewards shown are SimPO's: beta times the mean log-prob.
    `bco_shift: running_mean` makes BCO's shift the mean reward of all steps so far: the one thing kept here between
    steps. The first step's shift is 0, which is its true value when the run starts from its reference.
    """

    roles: tuple[str, ...] = (CHOSEN, REJECTED)

    def __init__(self, section: DPOConfig) -> None:
        self.mix = _read_mix(section.loss)
        _refuse_unread_options(section, set(self.mix))
        self.options = LossOptions(section.beta, section.label_smoothing, section.simpo_gamma)
        self.needs_reference = bool(set(self.mix) - REFERENCE_FREE - {SFT})
        self.metrics_every_step = section.bco_shift == "running_mean"
        self._num_steps = 0
        if section.reference is not None and not self.needs_reference:
            raise ValueError(f"objective.dpo.reference: given, but {_names(self.mix)} needs no reference; remove it")

    def __call__(self, token_logps: Tensor, batch: PackedBatch, reference: Tensor | None) -> Outcome:
        weight = batch.pair_weight()
        num_tokens = NumTokens(*(batch.completion_tokens[batch.by_role[role]].clamp(min=1) for role in self.roles))
        scores = self._score(token_logps, batch, reference)
        terms = {name: self._term(name, scores, num_tokens, weight) for name in self.mix}
        metrics = self._metrics(scores, num_tokens, weight)
        if len(terms) > 1:
            metrics |= {f"loss/{name}": Term(term.total.detach(), term.unit) for name, term in terms.items()}
        return Outcome({name: (self.mix[name], term) for name, term in terms.items()}, metrics)

    def _score(self, token_logps: Tensor, batch: PackedBatch, reference: Tensor | None) -> PairScores:
        policy = batch.completion_logps(token_logps)
        if not self.needs_reference:
            reference = torch.zeros_like(policy)
        assert reference is not None, "the loss needs the reference's log-probs of the batch's completions"
        # Before any arithmetic: 0 * nan is nan, and so is the gradient of a where() around it.
        scored = batch.completion_weight > 0
        policy, reference = torch.where(scored, policy, 0.0), torch.where(scored, reference, 0.0)
        chosen, rejected = (batch.by_role[role] for role in self.roles)
        return PairScores(policy[chosen], policy[rejected], reference[chosen], reference[rejected])

    def _term(self, name: str, scores: PairScores, num_tokens: NumTokens, weight: Tensor) -> Term:
        if name == SFT:
            return Term(-(weight * scores.policy_chosen).sum(), "chosen_token")
        return Term((weight * LOSSES[name](*scores, num_tokens, self.options)).sum(), "pair")

    def _metrics(self, scores: PairScores, num_tokens: NumTokens, weight: Tensor) -> dict[str, Term]:
        scores = PairScores(*(score.detach() for score in scores))
        chosen = self.options.beta * (scores.policy_chosen - scores.ref_chosen)  # below eq. 7, arxiv.org/abs/2305.18290
        rejected = self.options.beta * (scores.policy_rejected - scores.ref_rejected)
        if not self.needs_reference:
            chosen, rejected = chosen / num_tokens.chosen, rejected / num_tokens.rejected
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),  # a tie is no success, as in TRL
            "rewards/margins": chosen - rejected,
            "logps/chosen": scores.policy_chosen,
            "logps/rejected": scores.policy_rejected,
        }
        return {name: Term((weight * value).sum(), "pair") for name, value in values.items()}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Move BCO's running shift by a finished step's mean reward; every step holds the same number of pairs.

        A reward that is not finite is left out: the mean of all steps would stay so.
        """
        reward = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2 if self.metrics_every_step else math.nan
        if not math.isfinite(reward):
            return
        self._num_steps += 1
        shift = self.options.bco_shift + (reward - self.options.bco_shift) / self._num_steps
        self.options = dataclasses.replace(self.options, bco_shift=shift)

    def state_dict(self) -> dict[str, Any]:
        return {"bco_shift": self.options.bco_shift, "num_steps": self._num_steps} if self.metrics_every_step else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; a mismatch means that the loss was changed, which a resume may not do."""
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"objective state: found {sorted(state)}, expected {sorted(self.state_dict())}; "
                "resume with the objective.dpo settings that the checkpoint was written with"
            )
        if self.metrics_every_step:
            if not math.isfinite(state["bco_shift"]):
                raise ValueError(
                    f"objective state: bco_shift is {state['bco_shift']}, so every loss would be; remove the newest "
                    "checkpoint's folder to go on from the one before it"
                )
            self.options = dataclasses.replace(self.options, bco_shift=float(state["bco_shift"]))
            self._num_steps = int(state["num_steps"])


def _read_mix(loss: str | Mapping[str, float]) -> dict[str, float]:
    mix = {loss: 1.0} if isinstance(loss, str) else {str(name): float(weight) for name, weight in loss.items()}
    known = [*LOSSES, SFT]
    for name in mix:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"objective.dpo.loss: found '{name}', expected one of {', '.join(known)}{hint}")
    if not any(weight > 0 for weight in mix.values()):
        raise ValueError(f"objective.dpo.loss: found {mix}, expected at least one weight above 0")
    return mix


def _refuse_unread_options(section: DPOConfig, names: set[str]) -> None:
    defaults = {"label_smoothing": 0.0, "simpo_gamma": LossOptions.simpo_gamma, "bco_shift": "none"}
    for option, default in defaults.items():
        value = getattr(section, option)
        if value != default and not names & READ_BY[option]:
            raise ValueError(
                f"objective.dpo.{option}: found {value}, but {_names(names)} does not read it; "
                f"remove it, or choose a loss that does: {', '.join(sorted(READ_BY[option]))}"
            )


def _names(names: Any) -> str:
    return f"the loss {' + '.join(sorted(names))}"
