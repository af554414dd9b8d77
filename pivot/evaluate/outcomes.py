"""What a run keeps of an evaluation: answers for people, and every sample's outcome for paired comparisons.

RUN/samples.jsonl                       the answers to a fixed few questions, a line for each at each evaluation
RUN/held_out/step-00000100.npz          per metric the outcomes, rows and groups of all samples
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pivot.evaluate import intervals
from pivot.evaluate.intervals import Interval
from pivot.system.files import write_atomically

# METRIC -> float64[samples] of 0, 1/2 or 1; METRIC/row -> int64, its row; METRIC/group -> uint64, equal for one image
Outcomes = dict[str, np.ndarray]


@dataclass(frozen=True)
class SampleAnswer:
    """What the model said to one held-out question; `right` is None where the sample carries no answer."""

    row: int
    id: str
    question: str
    answer: str
    generated: str
    right: bool | None


def keep(answers: list[SampleAnswer], outcomes: Outcomes, folder: Path, step: int) -> None:
    """Add the answers to `folder`/samples.jsonl, and write every sample's outcome to `folder`/held_out/."""
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        for answer in answers:
            file.write(json.dumps({"step": step} | asdict(answer), ensure_ascii=False) + "\n")
    arrays: dict[str, Any] = {name.replace("/", ":"): values for name, values in outcomes.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(outcomes_path(folder, step), content.getvalue())


def outcomes_path(folder: Path, step: int) -> Path:
    return folder / "held_out" / f"step-{step:08d}.npz"


def read_outcomes(folder: Path, step: int) -> Outcomes:
    """The outcomes that `keep` wrote; {} where there is nothing."""
    path = outcomes_path(folder, step)
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {name.replace(":", "/"): file[name] for name in file.files}


def compare(before: Outcomes, after: Outcomes, name: str) -> Interval | None:
    """after - before in metric `name`, paired over the samples that both have; None where they share none."""
    if name not in before or name not in after:
        return None
    _, first, second = np.intersect1d(before[f"{name}/row"], after[f"{name}/row"], return_indices=True)
    groups = before[f"{name}/group"][first]
    if not len(first) or not np.array_equal(groups, after[f"{name}/group"][second]):
        return None
    return intervals.difference(before[name][first], after[name][second], groups)
