"""Who may say how a run ended, and what a sign of life tells."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pivot.run import status as module
from pivot.run.status import RunStatus, is_status, last_sign
from pivot.system.distributed import FailedElsewhere
from pivot.system.lock import FileLock

GONE = RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:24739")


@pytest.fixture
def rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStatus:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(module, "OWN_WORDS_S", 0.2)
    monkeypatch.setattr(module, "RANK_0_S", 0.5)
    status = RunStatus(tmp_path, FileLock(tmp_path / "lock"))
    status._lock.take()
    status.begin()
    return status


def rank_1_of(rank_0: RunStatus) -> RunStatus:
    status = RunStatus(rank_0.path.parent, FileLock(rank_0.path.parent / "lock"))
    status.owner = rank_0.owner
    return status


def read(status: RunStatus) -> dict[str, Any]:
    return json.loads(status.path.read_text())


def test_running_says_who_and_when(rank_0: RunStatus) -> None:
    now = read(rank_0)
    assert (now["status"], now["host"], now["pid"], now["job"]) == ("running", socket.gethostname(), os.getpid(), "7")
    assert last_sign(now).endswith(f"ago (process {os.getpid()} on {socket.gethostname()}, job 7)")


@pytest.mark.parametrize(("age", "said"), [(20, "20 s"), (600, "10 min"), (3 * 3600, "3 h"), (4 * 86400, "4 d")])
def test_a_last_sign_tells_its_age(age: int, said: str) -> None:
    then = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
    assert last_sign({"status": "running", "host": "a", "pid": 3, "time": then}) == (
        f"its last sign of life was {said} ago (process 3 on a)"
    )


def test_files_of_earlier_versions_are_taken() -> None:
    for old in ({"status": "running"}, {"status": "done", "step": 3}, {"status": "failed", "reason": "x"}):
        assert is_status(old) and last_sign(old) == ""


def test_a_rank_speaks_for_one_that_was_killed(rank_0: RunStatus) -> None:
    rank_0.close()
    rank_0._lock.release()  # as the kernel does
    rank_1_of(rank_0).fail(1, GONE)
    assert read(rank_0)["reason"].startswith("another rank died and left no reason")


def test_a_ranks_own_error_stands(rank_0: RunStatus) -> None:
    """Rank 1 wrote its own; rank 0, and a third rank, only saw that it went."""
    rank_1_of(rank_0).fail(1, ValueError("data.train: mend me"))
    for echo in (GONE, FailedElsewhere("reading failed on rank 1: ...")):
        rank_0.fail(0, echo)
        rank_1_of(rank_0).fail(2, echo)
    assert read(rank_0)["reason"] == "ValueError: data.train: mend me"


@pytest.mark.parametrize("end", ["done", "preempted"])
def test_what_was_seen_late_changes_no_end(rank_0: RunStatus, end: str) -> None:
    rank_0.end(end, step=4)
    rank_1_of(rank_0).fail(1, GONE)
    assert (read(rank_0)["status"], read(rank_0)["step"]) == (end, 4)


def test_another_starts_status_is_left_alone(rank_0: RunStatus) -> None:
    rank_1 = rank_1_of(rank_0)
    rank_0.write("running", host="elsewhere", pid=1)
    rank_1.fail(1, GONE)
    assert read(rank_0) == {"status": "running", "host": "elsewhere", "pid": 1}


def test_a_sign_of_life_is_renewed_until_the_end(rank_0: RunStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    rank_0.close()
    rank_0.begin()
    rank_0.write("running", **rank_0.owner, time="long ago")
    for _ in range(500):
        if read(rank_0)["time"] != "long ago":
            break
        rank_0._over.wait(0.01)
    # The file tells whole seconds, so that a sign of just now may be rounded to one.
    assert last_sign(read(rank_0)).startswith(
        ("its last sign of life was 0 s ago", "its last sign of life was 1 s ago")
    )
    rank_0.end("done", step=1)
    rank_0._over.wait(0.1)
    assert read(rank_0)["status"] == "done"
