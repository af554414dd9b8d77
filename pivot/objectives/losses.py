"""The preference losses: pure functions of summed log-probs, one value per pair. Imports torch alone.

Each is `f(policy_chosen, policy_rejected, ref_chosen, ref_rejected, num_tokens, options) -> float32[P]`: the four are
float32[P], the log-prob of a completion (summed over its tokens) under the policy and under the reference.
`LOSSES` names them as TRL does. To add one: a function, its line in `LOSSES`, a field in `LossOptions` and in the
run's `objective.dpo` if it needs one, a test.

Letters: P pairs; w the chosen and l the rejected completion; h the difference of their log ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class NumTokens(NamedTuple):
    """Scored tokens of each pair's completions, int64[P]; at least 1."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class LossOptions:
    beta: float = 0.1  # how far the policy may go from its reference: reward per nat of log ratio
    label_smoothing: float = 0.0  # the assumed share of flipped pairs, below 0.5
    simpo_gamma: float = 0.5  # SimPO's target margin, in units of reward
    bco_shift: float = 0.0  # BCO's reward shift, in units of reward


PreferenceLoss = Callable[[Tensor, Tensor, Tensor, Tensor, NumTokens, LossOptions], Tensor]


def log_ratio_margin(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """h = log(policy_w / ref_w) - log(policy_l / ref_l), float32[P]: small numbers are subtracted first."""
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def sigmoid(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    options: LossOptions,
) -> Tensor:
    """DPO; with label smoothing e, conservative DPO, whose minimum lies at the finite margin log((1 - e) / e)."""
    reward_margin = options.beta * log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    as_labelled = -F.logsigmoid(reward_margin)  # eq. 7, arxiv.org/abs/2305.18290
    flipped = -F.logsigmoid(-reward_margin)
    return (1 - options.label_smoothing) * as_labelled + options.label_smoothing * flipped  # ericmitchell.ai/cdpo.pdf


def robust(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    options: LossOptions,
) -> Tensor:
    """Robust DPO: over labels flipped with probability e its mean is the DPO loss of the clean labels."""
    reward_margin = options.beta * log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    as_labelled = -F.logsigmoid(reward_margin)
    flipped = -F.logsigmoid(-reward_margin)
    smoothing = options.label_smoothing
    # ((1 - e) L(w, l) - e L(l, w)) / (1 - 2e), arxiv.org/abs/2403.00409
    return ((1 - smoothing) * as_labelled - smoothing * flipped) / (1 - 2 * smoothing)


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    options: LossOptions,
) -> Tensor:
    """IPO as printed, with summed log-probs: the margin aimed at is 1 / (2 beta) nat, whatever the length.

    TRL divides each log ratio by its completion's length, so its beta means something else: to come from there,
    divide beta by the typical number of tokens.
    """
    margin = log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return (margin - 1 / (2 * options.beta)).square()  # eq. 17, arxiv.org/abs/2310.12036, tau = beta


def hinge(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    options: LossOptions,
) -> Tensor:
    """RSO's hinge on the log ratios (SLiC's, normalised by the reference): no gradient from margin 1 / beta on."""
    reward_margin = options.beta * log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return torch.relu(1 - reward_margin)  # hinge-norm, arxiv.org/abs/2309.06657, gamma = beta


def bco_pair(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    options: LossOptions,
) -> Tensor:
    """BCO: chosen and rejected classified each by itself, around the shift; shift 0 is TRL's `bco_pair`."""
    reward_chosen = options.beta * (policy_chosen - ref_chosen)
    reward_rejected = options.beta * (policy_rejected - ref_rejected)
    keep = -F.logsigmoid(reward_chosen - options.bco_shift)  # arxiv.org/abs/2404.04656, delta = bco_shift
    drop = -F.logsigmoid(-(reward_rejected - options.bco_shift))
    return keep + drop


def simpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    options: LossOptions,
) -> Tensor:
    """SimPO: rewards are mean log-probs, without a reference. The paper's beta is 2 to 10, its gamma 0.3 to 1.6."""
    reward_chosen = options.beta * policy_chosen / num_tokens.chosen
    reward_rejected = options.beta * policy_rejected / num_tokens.rejected
    return -F.logsigmoid(reward_chosen - reward_rejected - options.simpo_gamma)  # eq. 6, arxiv.org/abs/2405.14734


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "bco_pair": bco_pair,
    "simpo": simpo,
}
REFERENCE_FREE = frozenset({"simpo"})
# Which losses read an option: one that no loss of the mix reads is refused rather than ignored.
READ_BY = {
    "label_smoothing": frozenset({"sigmoid", "robust"}),
    "simpo_gamma": frozenset({"simpo"}),
    "bco_shift": frozenset({"bco_pair"}),
}
