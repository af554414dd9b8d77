"""Preference losses without a reference model, of mean log-probs per token; in the form of losses.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from pivot.objectives.losses import NumTokens


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


def orpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
) -> Tensor:
    """ORPO, whole: the chosen answer's NLL, and beta times the odds ratio's loss, both of mean log-probs per token.

    beta is the paper's lambda. The NLL is each pair's own mean, as the paper defines it; TRL's is the mean over all
    tokens of a micro-batch, those of the prompts among them.
    """
    chosen, rejected = policy_chosen / num_tokens.chosen, policy_rejected / num_tokens.rejected  # eq. 1
    log_odds_ratio = (chosen - _log_of_rest(chosen)) - (rejected - _log_of_rest(rejected))  # eq. 4 and 5
    return -chosen - beta * F.logsigmoid(log_odds_ratio)  # eq. 6 and 7, arxiv.org/abs/2403.07691


def _log_of_rest(logp: Tensor) -> Tensor:
    """log(1 - p) of log p <= 0, by whichever form keeps its digits; finite also for p = 1, where TRL's is not."""
    logp = logp.clamp(max=-1e-7)
    small = logp < -0.693  # p below a half; each form is fed only what it can take, or its gradient would be NaN
    of_small = torch.log1p(-torch.exp(torch.where(small, logp, -1.0)))
    of_large = torch.log(-torch.expm1(torch.where(small, -0.5, logp)))
    return torch.where(small, of_small, of_large)
