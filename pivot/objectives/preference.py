"""Preference optimisation: one loss of losses.py, or a weighted mix of them with an SFT term (MPO).

    objective.dpo.loss: sigmoid
    objective.dpo.loss: {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}      # MPO, arxiv.org/abs/2411.10442
    objective.dpo: {loss: sigmoid, f_divergence_type: js_divergence}  # f-DPO; one divergence for all losses of a mix

Letters: N targets, C completions, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pivot.batch import CHOSEN, CHOSEN_TOKEN, REFERENCE, REJECTED, SAMPLE, PackedBatch
from pivot.objectives.divergences import DIVERGENCES
from pivot.objectives.losses import OF_THE_MARGIN, REFERENCE_FREE, NumTokens, options_of
from pivot.objectives.matching import Matching
from pivot.objectives.mix import ALL_LOSSES, REVERSE_KL, SFT, check_options, names_text, read_mix
from pivot.objectives.objective import Outcome, Term
from pivot.objectives.step_losses import MATCHES, STEP_LOSSES, Partners

if TYPE_CHECKING:
    from pivot.config import DPOConfig


class PairScores(NamedTuple):
    """Summed log-probs of each pair, float32[P]; zeros where the pair is masked, and where there is no reference."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


class PreferenceObjective:
    """Sums of the mix's terms and of TRL's metrics over a micro-batch; a masked pair adds exactly zero to each.

    Where the mix needs no reference (simpo, orpo, sft), the rewards shown are SimPO's: beta times the mean log-prob.
    With aot or aot_unpaired in the mix, what a pair is compared with follows from all pairs of its step: `matching`.
    `bco_shift: running_mean` makes BCO's shift the mean reward of all steps so far: the one thing kept here between
    steps. The first step's shift is 0, which is its true value when the run starts from its reference.
    """

    name: ClassVar[str] = "dpo"
    unit_name: ClassVar[str] = "pairs"
    roles: tuple[str, ...] = (CHOSEN, REJECTED)
    learns_from_single_answers = False

    def __init__(self, section: DPOConfig) -> None:
        self._section = section
        self.mix = read_mix(section.loss)
        check_options(section, set(self.mix))
        self._taken = {name: options_of(ALL_LOSSES[name]) for name in self.mix if name != SFT}
        self._step_losses = [name for name in self.mix if name in STEP_LOSSES]
        self.matching: Matching | None = self if self._step_losses else None
        self.needs_reference = bool(set(self.mix) - REFERENCE_FREE - {SFT})
        self.reference_folder = section.reference
        self.margin_scale = section.beta if self.needs_reference else None
        self.metrics_every_step = section.bco_shift == "running_mean"
        self.bco_shift = 0.0  # BCO's reward shift, in units of reward; the section says whether it moves
        self._num_steps = 0
        if section.reference is not None and not self.needs_reference:
            raise ValueError(
                f"objective.dpo.reference: given, but {names_text(self.mix)} needs no reference; remove it"
            )

    def __str__(self) -> str:
        return f"objective.dpo.loss: {self._section.loss}"

    @staticmethod
    def describe(section: DPOConfig) -> str:
        loss = section.loss if isinstance(section.loss, str) else " + ".join(map(str, section.loss))
        divergence = "" if section.f_divergence_type == REVERSE_KL else f" · {section.f_divergence_type}"
        return f"{loss} · beta {section.beta}{divergence}"

    def __call__(self, token_logps: Tensor, batch: PackedBatch) -> Outcome:
        weight = batch.completion_weight[batch.pairs.chosen]
        num_tokens = NumTokens(*(batch.completion_tokens[index].clamp(min=1) for index in batch.pairs))
        scores = self._score(token_logps, batch)
        terms = {name: self._term(name, scores, num_tokens, weight, batch) for name in self.mix}
        metrics = self._metrics(scores, num_tokens, weight)
        if len(terms) > 1:
            metrics |= {f"loss/{name}": Term(term.total.detach(), term.unit) for name, term in terms.items()}
        return Outcome({name: (self.mix[name], term) for name, term in terms.items()}, metrics)

    def _score(self, token_logps: Tensor, batch: PackedBatch) -> PairScores:
        policy = batch.completion_logps(token_logps)
        reference = torch.zeros_like(policy)
        if self.needs_reference:
            assert REFERENCE in batch.completion_values, "the loss needs the reference's log-probs of the completions"
            reference = batch.completion_values[REFERENCE]
        # Before any arithmetic: 0 * nan is nan, and so is the gradient of a where() around it.
        scored = batch.completion_weight > 0
        policy, reference = torch.where(scored, policy, 0.0), torch.where(scored, reference, 0.0)
        chosen, rejected = batch.pairs
        return PairScores(policy[chosen], policy[rejected], reference[chosen], reference[rejected])

    def _term(self, name: str, scores: PairScores, num_tokens: NumTokens, weight: Tensor, batch: PackedBatch) -> Term:
        if name == SFT:
            return Term(-(weight * scores.policy_chosen).sum(), CHOSEN_TOKEN)
        options: dict[str, Any] = {option: self._option(option) for option in self._taken[name]}
        if name in STEP_LOSSES:
            partners = batch.completion_values[_partners_of(name)]
            options["partners"] = Partners(*(partners[index] for index in batch.pairs))
        elif name in OF_THE_MARGIN:
            scores = self._diverge(scores)
        return Term((weight * ALL_LOSSES[name](*scores, num_tokens, **options)).sum(), SAMPLE)

    def _diverge(self, scores: PairScores) -> PairScores:
        """The scores whose log ratios are what the divergence makes of them; DPO's own go through as they are."""
        kind, alpha = self._section.f_divergence_type, self._section.f_alpha_divergence_coef
        if kind == REVERSE_KL:
            return scores
        chosen = DIVERGENCES[kind](scores.policy_chosen - scores.ref_chosen, alpha)
        rejected = DIVERGENCES[kind](scores.policy_rejected - scores.ref_rejected, alpha)
        return PairScores(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected))

    def pair_scores(self, token_logps: Tensor, batch: PackedBatch) -> Tensor:
        """float32[P, 5]: the four scores of each pair and its weight, of a batch and its log-probs."""
        return torch.stack([*self._score(token_logps, batch), batch.completion_weight[batch.pairs.chosen]], dim=1)

    def match(self, pair_scores: Tensor) -> dict[str, Tensor]:
        """name -> float32[P, 2]: what the sides of all pairs of a step are compared with, of their `pair_scores`.

        A masked pair is compared with nothing, and nothing with it.
        """
        scored = pair_scores[:, 4] > 0
        partners = {}
        for name in self._step_losses:
            of_name = torch.zeros(len(pair_scores), 2)
            of_name[scored] = torch.stack(MATCHES[name](*pair_scores[scored, :4].unbind(1)), dim=1)
            partners[_partners_of(name)] = of_name
        return partners

    def _option(self, name: str) -> float:
        return self.bco_shift if name == "bco_shift" else getattr(self._section, name)

    def _metrics(self, scores: PairScores, num_tokens: NumTokens, weight: Tensor) -> dict[str, Term]:
        scores = PairScores(*(score.detach() for score in scores))
        beta = self._section.beta
        chosen = beta * (scores.policy_chosen - scores.ref_chosen)  # below eq. 7, arxiv.org/abs/2305.18290
        rejected = beta * (scores.policy_rejected - scores.ref_rejected)
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
        return {name: Term((weight * value).sum(), SAMPLE) for name, value in values.items()}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Move BCO's running shift by a finished step's mean reward; every step holds the same number of pairs.

        A reward that is not finite is left out: the mean of all steps would stay so.
        """
        reward = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2 if self.metrics_every_step else math.nan
        if not math.isfinite(reward):
            return
        self._num_steps += 1
        self.bco_shift += (reward - self.bco_shift) / self._num_steps

    def state_dict(self) -> dict[str, Any]:
        return {"bco_shift": self.bco_shift, "num_steps": self._num_steps} if self.metrics_every_step else {}

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
            self.bco_shift = float(state["bco_shift"])
            self._num_steps = int(state["num_steps"])


def _partners_of(name: str) -> str:
    """Where a batch's `completion_values` hold what a loss of the step compares each answer with."""
    return f"{name}/partner"
