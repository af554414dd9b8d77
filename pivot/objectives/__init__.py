"""What is learned: SFT, a preference loss or a mix of them, or KTO, behind one protocol.

`OBJECTIVES` is the only list of objectives. What the rest of a run has to know of one, it asks the objective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pivot.objectives.kto import KTOObjective
from pivot.objectives.matching import Matching
from pivot.objectives.objective import Objective, Outcome, Term
from pivot.objectives.preference import PreferenceObjective
from pivot.objectives.sft import SFTObjective

if TYPE_CHECKING:
    from pivot.config import ObjectiveConfig

__all__ = [
    "OBJECTIVES",
    "KTOObjective",
    "Matching",
    "Objective",
    "Outcome",
    "PreferenceObjective",
    "SFTObjective",
    "Term",
    "build_objective",
    "objective_class",
]

OBJECTIVES: dict[str, type[Objective]] = {  # section -> class
    "sft": SFTObjective,
    "dpo": PreferenceObjective,
    "kto": KTOObjective,
}


def objective_class(section: ObjectiveConfig) -> type[Objective]:
    """The class that the run's `objective` section asks for, its settings unread. ValueError where there is none."""
    for name, objective in OBJECTIVES.items():
        if getattr(section, name) is not None:
            return objective
    raise ValueError(f"objective: none is given; expected {' or '.join(f'objective.{name}' for name in OBJECTIVES)}")


def build_objective(section: ObjectiveConfig) -> Objective:
    """The objective of the run's `objective` section; ValueError, with the key, for a setting it cannot follow."""
    objective = objective_class(section)
    return objective(getattr(section, objective.name))
