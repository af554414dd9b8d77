"""The list of tasks: what stands in it runs, is logged with its interval, and is shown wherever numbers are shown."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pivot.evaluate import evaluator, tasks
from pivot.evaluate.intervals import share
from pivot.evaluate.outcomes import SampleAnswer
from pivot.evaluate.task import Measure, Result, Subject
from pivot.report import write_report
from tests.kit.answered import make_answered_set
from tests.kit.commands import ROOT
from tests.kit.runs import make_run
from tests.kit.tiny import tiny_llava

EVEN = "eval/even_rows"


class EvenRows:
    """A task as a module would be one: the share of samples whose row is even."""

    MEASURES = (Measure(EVEN, "even rows", title="Even rows", meaning="share of samples in even rows", legend="even"),)

    @staticmethod
    def run(subject: Subject) -> Result:
        rows = subject.records["row"]
        outcome = (rows % 2 == 0).astype(np.float64)
        return Result({EVEN: float(outcome.mean())}, {EVEN: (rows, outcome)})


@pytest.fixture
def with_even_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = (tasks.preference, tasks.vqa, tasks.rewards, EvenRows)
    monkeypatch.setattr(tasks, "TASKS", listed)
    monkeypatch.setattr(evaluator, "TASKS", listed)
    monkeypatch.setenv("COLUMNS", "200")


def script(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "launch"))  # as for a script
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("with_even_rows")
def test_a_listed_task_is_in_the_commands_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models of 8 samples: 4 of 8 rows are even under both, and each question's image is its own group of two."""
    tiny_llava(tmp_path / "a")
    tiny_llava(tmp_path / "b")
    make_answered_set(tmp_path, "set", 8)
    models = ["--model", str(tmp_path / "a"), "--model", str(tmp_path / "b")]
    command = ["held-out", *models, "--data", str(tmp_path / "set"), "--json", str(tmp_path / "out.json")]
    assert script("evaluate").main(command) == 0
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["models"]["a"]["metrics"][EVEN] == 0.5
    value, low, high = numbers["models"]["a"]["intervals"][EVEN]
    assert value == 0.5 and 0 < low < 0.5 < high < 1
    assert numbers["differences"][EVEN]["b"] == [0, 0, 0]
    shown = capsys.readouterr().out
    assert "even rows" in shown and f"0.500 [{low:.3f}, {high:.3f}]" in shown and "+0.000 [+0.000, +0.000]" in shown
    headings = [part.strip() for part in next(line for line in shown.splitlines() if "even rows" in line).split("┃")]
    assert headings[1:-1] == ["model", "preference accuracy", "per token", "VQA accuracy", "even rows"]


@pytest.mark.usefixtures("with_even_rows")
def test_a_listed_task_is_in_the_report_and_in_the_demos_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [SampleAnswer(row, f"id{row}", "What?", "red", "blue", False) for row in range(4)]
    for name in ("align", "sft"):
        run = make_run(tmp_path / name, "sft", questions, held_out="set", skill=(0.1, 0.2))
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for row in rows:
            if row.get("event") == "eval":
                row[EVEN] = 0.75
                row["intervals"][EVEN] = [0.75, 0.5, 0.875]
        (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path / "sft").read_text()
    assert "<h3>Even rows</h3>" in page and "share of samples in even rows" in page and "50.0–87.5" in page
    assert script("demo").main(["table", "sft", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "even rows" in shown and shown.count("0.750 [0.500, 0.875]") == 3


def test_old_runs_are_shown_as_they_were(tmp_path: Path) -> None:
    """A log of before the newest task has no number of it, and its report no heading without a number."""
    run = make_run(tmp_path / "run", "sft", [], held_out="set", skill=(0.1, 0.2))
    assert "Even rows" not in write_report(run).read_text()


def test_measures_are_told_apart() -> None:
    """Each has a key and a heading of its own; what the report shows has a meaning, and a share a name at its curve."""
    measures = tasks.all_measures()
    assert len({measure.key for measure in measures}) == len({measure.column for measure in measures}) == len(measures)
    for measure in tasks.titled_measures():
        assert not measure.is_share or (measure.meaning and measure.legend), measure.key


def test_an_interval_is_of_the_samples_that_the_task_scored() -> None:
    """Outcomes of 4 rows in groups of 2: the interval is Wilson's at the size that the groups leave."""
    held_out: Any = SimpleNamespace(groups={row: row // 2 for row in range(4)})
    evaluation = evaluator.Evaluation({})
    rows, values = np.arange(4), np.array([1.0, 1.0, 0.0, 1.0])
    vqa = tasks.vqa.VQA
    evaluation.add(Result({vqa: 0.75}, {vqa: (rows, values)}), held_out)
    assert evaluation.intervals == {vqa: share(values, rows // 2)}
    assert evaluation.outcomes[f"{vqa}/row"].tolist() == rows.tolist()
