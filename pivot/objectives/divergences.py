"""What holds the policy to the reference in place of DPO's reverse KL: f-DPO, arxiv.org/abs/2309.16240, as in TRL.

A loss of the margin is a function of the difference of two log ratios u = log(policy / reference). Another divergence
f puts f'(e^u) in the place of u, up to a constant that the difference loses. At the reference, u = 0, each is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_POWER = (
    80.0  # e^80 is 5e34, near float32's end: beyond it a score stands still. TRL caps alpha_divergence alone.
)


def reverse_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    """f'(t) = log t + 1: plain DPO."""
    return log_ratio


def forward_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    """f'(t) = -1 / t, and 1: an answer that became less likely than under the reference weighs exponentially."""
    return -torch.expm1((-log_ratio).clamp(max=LARGEST_POWER))


def js_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    """f'(t) = log(2t / (1 + t)): of an answer that became likelier no more than log 2 counts."""
    return math.log(2) + F.logsigmoid(log_ratio)


def alpha_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    """f'(t) = (t^(alpha - 1) - 1) / (alpha - 1), TRL's alpha: 0 gives forward_kl, 1 reverse_kl."""
    if abs(alpha - 1) < 1e-6:
        return log_ratio
    return torch.expm1(((alpha - 1) * log_ratio).clamp(max=LARGEST_POWER)) / (alpha - 1)


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
