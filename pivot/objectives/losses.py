"""The preference losses: pure functions of summed log-probs, one value per pair. Imports torch alone.

Each is `f(policy_chosen, policy_rejected, ref_chosen, ref_rejected, num_tokens, *, OPTIONS) -> float32[P]`: the first
four are float32[P], the log-prob of a completion (summed over its tokens) under the policy and under the reference. Its
options are fields of the run's `objective.dpo`, where their defaults and meanings stand; an option that no loss of the
run's mix takes is refused. `LOSSES` names the losses as TRL does. To add one: a function, its line in `LOSSES`, a test;
for a new option also its field in `DPOConfig`.

DPO's own stands here; margin_losses.py holds the others of the margin between the two answers of a pair,
answer_losses.py those that take each answer by itself, reference_free.py those without a reference, and step_losses.py
those of a whole step's answers.

Letters: P pairs; w the chosen and l the rejected completion; h the difference of their log ratios.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from pivot.objectives.answer_losses import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from pivot.objectives.margin_losses import discopop, exo_pair, hinge, ipo, log_ratio_margin, robust, sigmoid_norm
from pivot.objectives.reference_free import orpo, simpo


class NumTokens(NamedTuple):
    """Scored tokens of each pair's completions, int64[P]; at least 1."""

    chosen: Tensor
    rejected: Tensor


PreferenceLoss = Callable[..., Tensor]  # as above


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


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
    "bco_pair": bco_pair,
    "nca_pair": nca_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "simpo": simpo,
    "orpo": orpo,
}
REFERENCE_FREE = frozenset({"simpo", "orpo"})
OF_THE_MARGIN = frozenset({"sigmoid", "robust", "ipo", "hinge", "exo_pair", "discopop", "sigmoid_norm"})


def options_of(loss: PreferenceLoss) -> tuple[str, ...]:
    """The options that a loss takes: the names of its keyword-only parameters, but for those with a default."""
    parameters = inspect.signature(loss).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)
