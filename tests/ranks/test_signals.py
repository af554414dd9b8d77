"""Law: whatever signal comes in whatever phase, nothing is lost: saved, `preempted`, exit code 75, and it goes on.

`make test ARGS="-m slow tests/ranks/test_signals.py -s"` prints the table of all signals and phases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.kit.ranks import run_ranks
from tests.kit.ranks.scenarios_signals import ONCE, PHASES, WAIT_S
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

pytestmark = pytest.mark.timeout(1800)
BEFORE_THE_CLAIM = "counting"  # the run's folder is not there yet, or another start's
Found = list[dict[str, Any]]


def start_all(folder: Path, scenario: str, limit_s: float) -> Path:
    tiny_llava(folder / "llava")
    make_set(folder)
    run_ranks(f"tests.kit.ranks.scenarios_signals:{scenario}", 2, folder, limit_s=limit_s)
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_all(tmp_path_factory.mktemp("once"), "once", 900)


def read(folder: Path, rank: int) -> Found:
    return json.loads((folder / f"starts-{rank}.json").read_text())


def check_starts(folder: Path, phase: str) -> None:
    """Every start that was signalled, on both ranks; then the one that nobody signalled, and what all of them made."""
    for rank in (0, 1):
        *signalled, last = [start for start in read(folder, rank) if start["phase"] == phase]
        for start in signalled:
            check_start(start, phase)
        assert last["code"] == 0 and last["status"]["status"] == "done"
    name = phase.replace(" ", "-")
    log = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "event" not in row] == list(range(1, 10))
    assert [row["step"] for row in log if row.get("event") == "eval"] == [0, 2, 4, 6, 8, 9]
    made = sum(start["steps"] for start in read(folder, 0) if start["phase"] == phase)
    assert made == 9, "a step was made twice"


def check_start(start: dict[str, Any], phase: str) -> None:
    if phase == "writing the export":  # it is the last thing to do, and is done
        assert (start["code"], start["status"]["status"]) == (0, "done")
        return
    assert start["code"] == 75
    assert start["steps"] == start["saved"], "a step was lost"
    if phase != BEFORE_THE_CLAIM:
        where = {"0": " on rank 0", "1": " on rank 1", "01": ""}[start["struck"]]
        assert start["status"]["status"] == "preempted"
        assert start["status"]["reason"] == f"stopped by {start['signal']}{where}"
    if phase == "save":
        assert start["steps"] == 1, "a signal during a save costs no further step"
    if "data wait" in phase:
        assert start["seconds"] < WAIT_S, "the wait was not broken off"


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_each_phase_loses_nothing(once: Path, phase: str) -> None:
    check_starts(once, phase)


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "loading"])
def test_interrupted_runs_end_with_equal_weights(once: Path, phase: str) -> None:
    """That of the phase `loading` was stopped before its first step: it trained unbroken."""
    expected, found = (
        load_file(once / name.replace(" ", "-") / "export/model.safetensors") for name in ("loading", phase)
    )
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_stop_before_the_first_step_says_that_nothing_was_there(once: Path) -> None:
    told = (once / "once-rank0.log").read_text()
    sentence = "stopped    by {} before there was anything to save; the same command starts anew"
    assert sentence.format(ONCE["loading"]) in told
    assert "which is saved; the same command goes on" in told


@pytest.mark.slow
def test_every_signal_in_every_phase(tmp_path: Path) -> None:
    folder = start_all(tmp_path, "every", 1500)
    print("\nphase               signal   ranks  code  status     steps lost  seconds")
    for start in read(folder, 0):
        if start["signal"]:
            status, lost = start["status"].get("status", "none yet"), start["steps"] - start["saved"]
            print(
                f"{start['phase']:<20}{start['signal']:<9}{start['struck']:<7}{start['code']:<6}{status:<11}{lost:<12}"
                f"{start['seconds']:.1f}"
            )
    for phase in PHASES:
        check_starts(folder, phase)


def test_people_ask_by_files(tmp_path: Path) -> None:
    """RUN/save: saved behind that step, and the run goes on. RUN/stop: as a signal. One from before the start goes."""
    folder = start_all(tmp_path, "files", 600)
    told = json.loads((folder / "files-0.json").read_text())
    assert told["codes"] == [75, 0]
    assert told["seen"][:2] == [[1, 0, False], [2, 1, False]]
    assert told["newest"] == told["status"]["step"] >= 3
    assert told["status"]["reason"] == f"stopped by the file {folder}/files/stop on rank 0"
    assert told["left"] == []
    output = (folder / "files-rank0.log").read_text()
    assert f"saved      as the file {folder}/files/save asked, which is removed\n" in output
    assert f"warning: {folder}/files/stop was there before this start and is removed" in output
