"""A lock ends with its holder, whatever was forked from it, and a file system without locks is no other process."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pivot.system import lock
from pivot.system.lock import FileLock, Held

HOLDER = """
import os, signal, sys, time
from pathlib import Path
from pivot.system.lock import FileLock
lock = FileLock(Path(sys.argv[1]))
lock.take()
if os.fork() == 0:
    print(os.getpid(), flush=True)  # by itself: before it has run, on a busy machine, it has let go of nothing
time.sleep(60)
"""


def test_the_second_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    first.take()
    with pytest.raises(Held, match=f"process {os.getpid()} on "):
        second.take()
    assert first.held and not second.held
    first.release()
    second.take()
    second.release()


def test_a_child_that_outlives_the_holder_does_not_keep_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "lock"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(Held, match=f"process {holder.pid} on "):
            FileLock(tmp_path / "lock").take()
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # still there
        try:
            FileLock(tmp_path / "lock").take()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_child_that_is_forked_meanwhile_does_not_keep_it(tmp_path: Path) -> None:
    """As when one thread fetches a shard and another starts workers."""
    with multiprocessing.get_context("fork").Pool(1) as before:
        held = FileLock(tmp_path / "lock")
        held.take()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply(os.getpid) != before.apply(os.getpid)
            held.release()
            other = FileLock(tmp_path / "lock")
            other.take()
            other.release()


def test_waiting_ends_when_the_holder_lets_go(tmp_path: Path) -> None:
    held, waiting, taken = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock"), threading.Event()
    held.take()
    thread = threading.Thread(target=lambda: (waiting.take(wait=True), taken.set()), daemon=True)
    thread.start()
    assert not taken.wait(0.3)
    held.release()
    assert taken.wait(30)
    waiting.release()


def test_a_lock_file_that_its_holder_removes_is_made_anew(tmp_path: Path) -> None:
    held, waiting = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    held.take()
    thread = threading.Thread(target=waiting.take, kwargs={"wait": True}, daemon=True)
    thread.start()
    time.sleep(0.3)
    held.path.unlink()
    held.release()
    thread.join(30)
    assert waiting.held and waiting.path.exists()
    with pytest.raises(Held):
        FileLock(tmp_path / "lock").take()
    waiting.release()


@pytest.mark.parametrize("unknown", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks_is_said_once(
    unknown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(getattr(errno, unknown), os.strerror(getattr(errno, unknown)))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lock, "_told", set())
    with caplog.at_level(logging.WARNING):
        for wait in (False, True, False):
            held = FileLock(tmp_path / "lock")
            held.take(wait=wait)
            held.release()
    assert len(caplog.records) == 1
    assert "knows no locks" in caplog.text and "no second process" in caplog.text


def test_another_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    held = FileLock(tmp_path / "lock")
    with pytest.raises(OSError, match="Input/output error"):
        held.take()
    assert not held.held
