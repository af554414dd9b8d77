"""Reward accuracy: how often the chosen completion gained more over the reference than the rejected one.

The objective gives these numbers with its loss; this task says how they are shown, and keeps each pair's outcome.
"""

from __future__ import annotations

import numpy as np

from pivot.evaluate.task import Measure, Result, Subject

REWARDS = "eval/rewards/accuracies"
MARGINS = "eval/rewards/margins"

MEASURES = (
    Measure(
        REWARDS,
        "reward accuracy",
        title="Reward accuracy",
        meaning="share of pairs whose right answer gained on the wrong one",
        legend="rewards",
        chance=0.5,
        own_reference=True,
    ),
    Measure(MARGINS, "reward margin", title="Reward margin", is_share=False, own_reference=True),
)


def run(subject: Subject) -> Result:
    """One outcome a pair; nothing without a reference."""
    records = subject.records
    if not subject.has_reference or not subject.held_out.has_pairs or not len(records):
        return Result()
    return Result(outcomes={REWARDS: (records["row"], (records["margin"] > 0).astype(np.float64))})
