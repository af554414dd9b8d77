"""The preference losses: pure functions of summed log-probs, one value per pair. Imports torch alone.

Each is `f(policy_chosen, policy_rejected, ref_chosen, ref_rejected, num_tokens, *, OPTIONS) -> float32[P]`: the first
four are float32[P], the log-prob of a completion (summed over its tokens) under the policy and under the reference. Its
options are fields of the run's `objective.dpo`, where their defaults and meanings stand; an option that no loss of the
run's mix takes is refused. `LOSSES` names the losses as TRL does. To add one: a function, its line in `LOSSES`, a test;
for a new option also its field in `DPOConfig`.

Letters: P pairs; w the chosen and l the rejected completion; h the difference of their log ratios.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class NumTokens(NamedTuple):
    """Scored tokens of each pair's completions, int64[P]; at least 1."""

    chosen: Tensor
    rejected: Tensor


PreferenceLoss = Callable[..., Tensor]  # as above


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
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """DPO; with label smoothing e, conservative DPO, whose minimum lies at the finite margin log((1 - e) / e)."""
    reward_margin = beta * log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    as_labelled = -F.logsigmoid(reward_margin)  # eq. 7, arxiv.org/abs/2305.18290
    flipped = -F.logsigmoid(-reward_margin)
    return (1 - label_smoothing) * as_labelled + label_smoothing * flipped  # ericmitchell.ai/cdpo.pdf


def robust(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Robust DPO: over labels flipped with probability e its mean is the DPO loss of the clean labels."""
    reward_margin = beta * log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    as_labelled = -F.logsigmoid(reward_margin)
    flipped = -F.logsigmoid(-reward_margin)
    # ((1 - e) L(w, l) - e L(l, w)) / (1 - 2e), arxiv.org/abs/2403.00409
    return ((1 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
) -> Tensor:
    """IPO as printed, with summed log-probs: the margin aimed at is 1 / (2 beta) nat, whatever the length.

    TRL divides each log ratio by its completion's length, so its beta means something else: to come from there,
    divide beta by the typical number of tokens.
    """
    margin = log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return (margin - 1 / (2 * beta)).square()  # eq. 17, arxiv.org/abs/2310.12036, tau = beta


def hinge(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
) -> Tensor:
    """RSO's hinge on the log ratios (SLiC's, normalised by the reference): no gradient from margin 1 / beta on."""
    reward_margin = beta * log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return torch.relu(1 - reward_margin)  # hinge-norm, arxiv.org/abs/2309.06657, gamma = beta


def bco_pair(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
    bco_shift: float,
) -> Tensor:
    """BCO: chosen and rejected classified each by itself, around the shift; shift 0 is TRL's `bco_pair`."""
    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    keep = -F.logsigmoid(reward_chosen - bco_shift)  # arxiv.org/abs/2404.04656, delta = bco_shift
    drop = -F.logsigmoid(-(reward_rejected - bco_shift))
    return keep + drop


def simpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
    simpo_gamma: float,
) -> Tensor:
    """SimPO: rewards are mean log-probs, without a reference. The paper's beta is 2 to 10, its gamma 0.3 to 1.6."""
    reward_chosen = beta * policy_chosen / num_tokens.chosen
    reward_rejected = beta * policy_rejected / num_tokens.rejected
    return -F.logsigmoid(reward_chosen - reward_rejected - simpo_gamma)  # eq. 6, arxiv.org/abs/2405.14734


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "bco_pair": bco_pair,
    "simpo": simpo,
}
REFERENCE_FREE = frozenset({"simpo"})


def options_of(loss: PreferenceLoss) -> tuple[str, ...]:
    """The options that a loss takes: the names of its keyword-only parameters."""
    parameters = inspect.signature(loss).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
