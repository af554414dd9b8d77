"""The log of a run that goes on: every step once, evaluations with their answers, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pivot.run.log import RunLog

START = {"event": "start", "step": 0}


def write(path: Path, *rows: Any, end: str = "") -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows) + end)


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_log(folder: Path, first_step: int) -> RunLog:
    return RunLog(folder, first_step=first_step, total_steps=9, is_main=True, tensorboard=False)


def test_rows_behind_the_checkpoint_are_cut_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluations = [{"event": "eval", "step": step, "eval/loss": 1.0} for step in (0, 2, 4)]
    steps = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)]
    write(tmp_path / "log.jsonl", START, evaluations[0], *steps[:2], evaluations[1], *steps[2:], evaluations[2])
    write(tmp_path / "samples.jsonl", *({"step": step, "row": 7} for step in (0, 2, 4)))
    log = open_log(tmp_path, 2)
    log.step(3, {"loss": 2.0})
    log.close()
    assert read(tmp_path / "log.jsonl") == [START, evaluations[0], *steps[:2], evaluations[1], {"step": 3, "loss": 2.0}]
    assert [row["step"] for row in read(tmp_path / "samples.jsonl")] == [0, 2]
    assert log.has_evaluation(2) and not log.has_evaluation(4)
    assert "cut back to step 2; rows of steps that are made again: 2" in capsys.readouterr().out


def test_an_evaluation_that_was_not_finished_is_made_again(tmp_path: Path) -> None:
    """Its answers are written first, so that answers without a row are half of one."""
    write(tmp_path / "log.jsonl", START, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0})
    write(tmp_path / "samples.jsonl", {"step": 2, "row": 7}, end='{"step": 2, "ro')
    log = open_log(tmp_path, 2)
    assert not log.has_evaluation(2)
    assert (tmp_path / "samples.jsonl").read_text() == ""


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "\0\0\0"])
def test_a_last_row_that_was_cut_short_goes(tmp_path: Path, rest: str) -> None:
    write(tmp_path / "log.jsonl", START, {"step": 1, "loss": 1.0}, "not a row", end=rest)
    log = open_log(tmp_path, 1)
    log.step(2, {"loss": 2.0})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines == [json.dumps(START), '{"step": 1, "loss": 1.0}', "not a row", '{"step": 2, "loss": 2.0}']


def test_no_step_stands_twice_and_no_end_in_the_middle(tmp_path: Path) -> None:
    """As resumes of older versions left a log: the newer row of a step stays."""
    old, new = {"step": 2, "loss": 1.0}, {"step": 2, "loss": 2.0}
    write(
        tmp_path / "log.jsonl", START, {"step": 1}, old, {"event": "start", "step": 1}, new, {"event": "end", "step": 2}
    )
    open_log(tmp_path, 2).close()
    assert read(tmp_path / "log.jsonl") == [START, {"step": 1}, {"event": "start", "step": 1}, new]


def test_a_run_that_begins_again_begins_its_log_again(tmp_path: Path) -> None:
    """Without a checkpoint its settings may be others now: a held-out score of before is none of this run's."""
    write(tmp_path / "log.jsonl", START, {"event": "eval", "step": 0, "eval/loss": 1.0}, {"step": 1, "loss": 1.0})
    assert not open_log(tmp_path, 0).has_evaluation(0)
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_whole_log_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", START, {"step": 1, "loss": 1.0})
    before = (tmp_path / "log.jsonl").stat()
    open_log(tmp_path, 1).close()
    after = (tmp_path / "log.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns, before.st_size) == (after.st_ino, after.st_mtime_ns, after.st_size)
