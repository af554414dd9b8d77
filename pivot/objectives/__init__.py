"""What is learned: SFT, or a preference loss, or a mix of them, behind one protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pivot.objectives.objective import Objective, Outcome, Term
from pivot.objectives.preference import PreferenceObjective
from pivot.objectives.sft import SFTObjective

if TYPE_CHECKING:
    from pivot.config import ObjectiveConfig

__all__ = ["Objective", "Outcome", "PreferenceObjective", "SFTObjective", "Term", "build_objective"]


def build_objective(section: ObjectiveConfig) -> Objective:
    """The objective of the run's `objective` section; ValueError, with the key, for a setting it cannot follow."""
    if section.dpo is not None:
        return PreferenceObjective(section.dpo)
    if section.sft is not None:
        return SFTObjective()
    raise ValueError("objective: none is given; expected objective.sft or objective.dpo")
