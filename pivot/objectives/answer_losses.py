"""Preference losses that take each answer of a pair by itself, against the reference; in the form of losses.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from pivot.objectives.losses import NumTokens


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


def nca_pair(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
) -> Tensor:
    """NCA for pairs: the chosen reward shall rise in itself; both are held back from moving away from the reference."""
    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    held_back = F.logsigmoid(-reward_chosen) + F.logsigmoid(-reward_rejected)
    return -F.logsigmoid(reward_chosen) - 0.5 * held_back  # arxiv.org/abs/2402.05369, K = 2, preference data


def sppo_hard(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
) -> Tensor:
    """SPPO with hard labels: log ratios aim at 1 / (2 beta) and -1 / (2 beta), as if the chosen answer always won.

    The paper's eta is 1 / beta; its soft win rates would need a model that ranks answers.
    """
    log_ratio_chosen, log_ratio_rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    aim = 0.5 / beta
    # eq. 4.7, arxiv.org/abs/2405.00675, with P = 1 and 0
    return (log_ratio_chosen - aim).square() + (log_ratio_rejected + aim).square()


def apo_zero(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
) -> Tensor:
    """APO-zero: chosen up and rejected down, for chosen answers that are better than what the model says by itself."""
    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    return torch.sigmoid(-reward_chosen) + torch.sigmoid(reward_rejected)  # eq. 7, arxiv.org/abs/2408.06266


def apo_down(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
) -> Tensor:
    """APO-down: both down, rejected more, for chosen answers that are worse than what the model says by itself."""
    reward_chosen = beta * (policy_chosen - ref_chosen)
    reward_rejected = beta * (policy_rejected - ref_rejected)
    # eq. 8, arxiv.org/abs/2408.06266
    return torch.sigmoid(reward_chosen) + torch.sigmoid(reward_rejected - reward_chosen)
