"""Preference losses of the margin between the two answers of a pair; in the form of losses.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from pivot.objectives.losses import NumTokens


def log_ratio_margin(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """h = log(policy_w / ref_w) - log(policy_l / ref_l), float32[P]: small numbers are subtracted first."""
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


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


def exo_pair(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """EXO for pairs: KL from the policy's choice between the two answers to the label's, 1 - e for the chosen one.

    Other than DPO, which takes this KL the other way round. The paper's e is 1e-3; with e = 0 it would be infinite.
    """
    reward_margin = beta * log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    chosen, rejected = torch.sigmoid(reward_margin), torch.sigmoid(-reward_margin)
    log_chosen, log_rejected = F.logsigmoid(reward_margin), F.logsigmoid(-reward_margin)
    # eq. 16, arxiv.org/abs/2402.00856
    return chosen * (log_chosen - math.log1p(-label_smoothing)) + rejected * (log_rejected - math.log(label_smoothing))


def discopop(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
    discopop_tau: float,
) -> Tensor:
    """DiscoPOP's log-ratio modulated loss: a blend of DPO's logistic and of an exponential loss.

    It is not convex: with the paper's tau of 0.05 it rises around a margin of 0, so that there a pair is pushed the
    wrong way. `sigmoid(m / tau) * exp(-m)` is written as one power, since TRL's product is NaN for margins below -88.
    """
    reward_margin = beta * log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    logistic = torch.sigmoid(-reward_margin / discopop_tau) * -F.logsigmoid(reward_margin)
    exponential = torch.exp(F.logsigmoid(reward_margin / discopop_tau) - reward_margin)
    return logistic + exponential  # eq. 5, arxiv.org/abs/2406.08414


def sigmoid_norm(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
) -> Tensor:
    """Length-normalised DPO: each log ratio per token of its completion. Tulu 3's beta is 5."""
    chosen = (policy_chosen - ref_chosen) / num_tokens.chosen
    rejected = (policy_rejected - ref_rejected) / num_tokens.rejected
    return -F.logsigmoid(beta * (chosen - rejected))  # section 5.1, arxiv.org/abs/2411.15124
