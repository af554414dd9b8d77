"""An evaluation task: one module with what it measures and how; tasks.py lists them.

    MEASURES: tuple[Measure, ...]               the numbers it gives, and how tables and the report show them
    run(subject: Subject) -> Result             the numbers of one model on one held-out set

The evaluator, the tables of launch/evaluate.py and launch/demo.py and the report read the list, so a new task is a new
module, a line in tasks.py, and its test. What a task needs of the held-out set it takes from `subject.held_out`; where
the set lacks it, its result says so in `skipped`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from pivot.evaluate.held_out import HeldOut, Question
    from pivot.evaluate.outcomes import SampleAnswer
    from pivot.processor import Processor


@dataclass(frozen=True)
class Measure:
    """A number of an evaluation, and how people are shown it."""

    key: str  # in log.jsonl
    column: str  # its heading in tables on a terminal
    title: str = ""  # its heading in the report; without one it stands in launch/evaluate.py's table alone
    meaning: str = ""  # a line below that heading
    legend: str = ""  # its name beside a curve
    is_share: bool = True  # the mean of one outcome a sample, 0 to 1, which has an interval
    chance: float | None = None  # what guessing gives; where that depends on the set, `{key}_blind` in the log says it
    own_reference: bool = False  # measured against the run's own reference: not to be compared between runs


@dataclass(frozen=True)
class Result:
    """What a task gives. `outcomes` holds for each measure int64[n] rows of the set and float64[n] values 0 to 1."""

    metrics: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    answers: Sequence[SampleAnswer] = ()  # for people to read
    skipped: dict[str, str] = field(default_factory=dict)  # the key of a measure -> why there is none


class Subject(Protocol):
    """What a task may ask: the held-out set, and the model that is evaluated. Each rank asks the same in one order."""

    @property
    def held_out(self) -> HeldOut: ...
    @property
    def processor(self) -> Processor: ...
    @property
    def records(self) -> np.ndarray:
        """PAIR_RECORD[samples]: the log-probs of all samples that could be read, in the order of their rows."""

    @property
    def has_reference(self) -> bool:
        """Whether the records hold margins over a reference model."""

    def answer(self, questions: Sequence[Question]) -> dict[int, str]:
        """Row -> the text that the model generates; a question that cannot be read is left out. Collective."""


class Task(Protocol):
    @property
    def MEASURES(self) -> tuple[Measure, ...]: ...
    def run(self, subject: Subject, /) -> Result: ...
