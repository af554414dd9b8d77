"""What two runs differ in, from what they wrote: settings, the samples of their steps, how many steps there were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pivot.config import flatten
from pivot.report.read import ReportedRun, read_run

OWN = ("output_dir", "data.cache_dir", "log.", "checkpoint.", "data.workers")  # says nothing about what is computed


def describe_differences(one: Path, other: Path) -> list[str]:
    """A line for each difference; [] where there is none. Raises ValueError where a folder holds no run."""
    runs = read_run(one), read_run(other)
    lines = [f"{name}: {first!r} and {second!r}" for name, first, second in differing_settings(*runs)]
    lines += _other_samples(*runs)
    steps = [run.steps[-1]["step"] if run.steps else 0 for run in runs]
    if steps[0] != steps[1]:
        lines.append(f"steps that are done: {steps[0]} and {steps[1]}")
    return lines


def differing_settings(one: ReportedRun, other: ReportedRun) -> list[tuple[str, Any, Any]]:
    """(key, value of one, value of the other), without keys that change nothing in what a step computes."""
    first, second = flatten(one.config), flatten(other.config)
    return [
        (name, first.get(name), second.get(name))
        for name in {**first, **second}
        if not name.startswith(OWN) and first.get(name) != second.get(name)
    ]


def _other_samples(one: ReportedRun, other: ReportedRun) -> list[str]:
    """Whether each step of both holds the same samples: the plan's fingerprint and the batch size decide it."""
    plans = [str(run.start.get("plan_fingerprint", "")) for run in (one, other)]
    if "" in plans:
        return ["the samples of their steps: not known, for a run whose log has no start"]
    if plans[0] == plans[1] and one.config.train.global_batch_size == other.config.train.global_batch_size:
        return []
    return [
        f"the samples of their steps: plans {plans[0][:16]} and {plans[1][:16]} (`python -m data_tools twins "
        f"{one.folder}/config.yaml {other.folder}/config.yaml` compares the ids)"
    ]
