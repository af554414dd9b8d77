"""AOT: losses of the distributions of a whole step's answers, arxiv.org/abs/2406.05882.

The answers of a step are sorted on both sides of a comparison, and the smallest is compared with the smallest, and so
on: the loss is low where one distribution lies above the other at every quantile. What a pair is compared with depends
on all other pairs of its optimizer step, over all ranks and micro-batches; TRL sorts a rank's micro-batch alone.

The functions have the form of losses.py, and one argument more: `partners` are the values that each pair is compared
with, constants of the step that `match_*` gives for all of its pairs. Without them the pairs given are the whole step.
The gradient is that of sorting: a value moves, and with it its place in the order, not what stands there on the other
side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pivot.objectives.losses import NumTokens, PreferenceLoss


class Partners(NamedTuple):
    """What the chosen and the rejected side of each pair are compared with, float32[P]."""

    chosen: Tensor
    rejected: Tensor


def aot(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
    label_smoothing: float,
    partners: Partners | None = None,
) -> Tensor:
    """Paired AOT: the policy's margins between chosen and rejected shall lie above the reference's."""
    scores = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    partners = partners or match_aot(*scores)
    return _smoothed(beta * (policy_chosen - policy_rejected - partners.chosen), label_smoothing)


def aot_unpaired(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    num_tokens: NumTokens,
    *,
    beta: float,
    label_smoothing: float,
    partners: Partners | None = None,
) -> Tensor:
    """Unpaired AOT: the log ratios of chosen answers shall lie above those of rejected ones, of whichever prompt."""
    partners = partners or match_aot_unpaired(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    chosen = _smoothed(beta * (policy_chosen - ref_chosen - partners.chosen), label_smoothing)
    rejected = _smoothed(beta * (partners.rejected - (policy_rejected - ref_rejected)), label_smoothing)
    # Over a step both sum up to the same comparisons: one gives the value, each the gradient of its own side.
    return chosen + (rejected - rejected.detach())


def match_aot(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Partners:
    """Of all pairs of a step: the reference's margin of the same rank as each pair's own margin."""
    partners = _of_same_rank(policy_chosen - policy_rejected, ref_chosen - ref_rejected)
    return Partners(partners, partners)


def match_aot_unpaired(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Partners:
    """Of all pairs of a step: the rejected log ratio of the same rank as each chosen one, and the other way round."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return Partners(_of_same_rank(chosen, rejected), _of_same_rank(rejected, chosen))


def _of_same_rank(values: Tensor, others: Tensor) -> Tensor:
    """float32[P]: of `others` the one that stands where each of `values` does when both are sorted."""
    found = torch.empty_like(others)
    found[values.detach().argsort(stable=True)] = others.detach().sort().values
    return found


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


STEP_LOSSES: dict[str, PreferenceLoss] = {"aot": aot, "aot_unpaired": aot_unpaired}
MATCHES: dict[str, Callable[..., Partners]] = {"aot": match_aot, "aot_unpaired": match_aot_unpaired}
