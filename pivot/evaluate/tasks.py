"""The evaluation tasks in the order in which they run and are shown. A new one is a module and a line here."""

from __future__ import annotations

from collections.abc import Container

from pivot.evaluate import preference, rewards, vqa
from pivot.evaluate.task import Measure, Task

TASKS: tuple[Task, ...] = (preference, vqa, rewards)


def all_measures() -> tuple[Measure, ...]:
    """The measures of all tasks, in their order."""
    return tuple(measure for task in TASKS for measure in task.MEASURES)


def measures_of_tasks_in(keys: Container[str]) -> tuple[Measure, ...]:
    """All measures of those tasks of which `keys` holds one."""
    return tuple(
        measure for task in TASKS if any(measure.key in keys for measure in task.MEASURES) for measure in task.MEASURES
    )


def titled_measures() -> tuple[Measure, ...]:
    """Those that the report and the demo's table show."""
    return tuple(measure for measure in all_measures() if measure.title)


def compared_measures() -> tuple[Measure, ...]:
    """Those whose outcomes are compared sample by sample between models."""
    return tuple(measure for measure in all_measures() if measure.is_share and not measure.own_reference)
