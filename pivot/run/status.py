"""RUN/status: what job scripts test, since launchers lose exit codes; and RUN/stop and RUN/save, by which people ask.

    {"status": "running", "host": "node1", "pid": 12, "job": "7", "time": "2026-11-25T13:44:49+00:00"}

`time` is renewed every minute while rank 0 lives: of one that is an hour old nobody is at work any more. The other
states are done, preempted and failed, with the steps that are safe (`step`) or the `reason`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pivot.system import preemption
from pivot.system.distributed import GONE, SILENT, FailedElsewhere, is_echo
from pivot.system.files import read_object, write_atomically
from pivot.system.hang import Hang
from pivot.system.lock import FileLock, Held
from pivot.system.redact import redact

DONE, PREEMPTED, FAILED, RUNNING = "done", "preempted", "failed", "running"
BEAT_S = 60.0  # between two signs of life
LOOK_S = 2.0  # between two looks for RUN/stop
OWN_WORDS_S = 2.0  # in which a rank that failed by itself has said so, before the others speak for it
RANK_0_S = 10.0  # in which rank 0, if it lives, has written what the others only saw


class RunStatus:
    """The status of the run in `folder`. Rank 0, which holds `lock`, begins it; any rank may write how it failed."""

    def __init__(self, folder: Path, lock: FileLock) -> None:
        self.path, self._stop_file, self._save_file = folder / "status", folder / "stop", folder / "save"
        self.owner: dict[str, Any] = {}  # host, pid and job of this start's rank 0; {} before the run is claimed
        self._lock, self._writing, self._over = lock, threading.RLock(), threading.Event()

    def write(self, status: str, **facts: Any) -> None:
        """running, done, preempted or failed."""
        facts = {name: redact(value) if isinstance(value, str) else value for name, value in facts.items()}
        write_atomically(self.path, json.dumps({"status": status} | facts) + "\n")

    def begin(self) -> None:
        """`running`, with a sign of life every minute, until `end` or `fail`; looks for RUN/stop meanwhile."""
        job = os.environ.get("SLURM_JOB_ID")
        self.owner = {"host": socket.gethostname(), "pid": os.getpid()} | ({"job": job} if job else {})
        self.write(RUNNING, **self.owner, time=_now())
        self._over.clear()
        threading.Thread(target=self._live, name="sign of life", daemon=True).start()
        preemption.last_words = self._say_interrupted

    def _live(self) -> None:
        beaten = time.monotonic()
        while not self._over.wait(LOOK_S):
            if self._stop_file.exists() and preemption.reason() is None:
                preemption.ask(f"the file {self._stop_file}")
            if time.monotonic() >= beaten + BEAT_S:
                beaten = time.monotonic()
                with self._writing, contextlib.suppress(OSError):
                    if self._over.is_set() or not self._is_running():
                        return
                    self.write(RUNNING, **self.owner, time=_now())

    def _is_running(self) -> bool:
        """Whether the file still says that this start runs."""
        now = read_object(self.path)
        return now.get("status") == RUNNING and {name: now.get(name) for name in self.owner} == self.owner

    def end(self, status: str, **facts: Any) -> None:
        """Write how it ended; RUN/stop, if that was it, is obeyed and goes."""
        self.close()
        self.write(status, **facts, time=_now())
        self._stop_file.unlink(missing_ok=True)

    def close(self) -> None:
        """No more signs of life."""
        with self._writing:
            self._over.set()
        preemption.last_words = lambda: None

    def fail(self, rank: int, error: BaseException) -> None:
        """Write `failed` and why, from whichever rank; nothing before the run is claimed.

        A rank that only sees that another is gone gives that one the time for its own words. Where there are none, it
        was killed, and one of the others says so: rank 0, or whoever gets the lock that rank 0 has let go of.
        """
        self.close()
        if not self.owner:
            return
        started, echo = time.monotonic(), is_echo(error)
        while echo and self._is_running():
            waited = time.monotonic() - started
            if waited > RANK_0_S or (waited > OWN_WORDS_S and self._may_speak()):
                break
            time.sleep(0.1)
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            if not echo or self._is_running():
                self.write(FAILED, reason=_explain(rank, error), time=_now())

    def has_failed(self) -> bool:
        """Whether a rank of this start has written that it failed."""
        return bool(self.owner) and read_object(self.path).get("status") == FAILED

    def _may_speak(self) -> bool:
        try:
            if not self._lock.held:
                self._lock.take()
        except (Held, OSError):
            return False
        return True

    def _say_interrupted(self) -> None:
        self.write(FAILED, reason="a second Ctrl-C ended it at once", time=_now())

    # -- what people ask for -------------------------------------------------------------------------------------

    def asks_to_save(self) -> bool:
        """Whether somebody made the file RUN/save."""
        return self._save_file.exists()

    def forget_save(self) -> None:
        self._save_file.unlink(missing_ok=True)

    def forget_requests(self, say: Callable[[str], None]) -> None:
        """Remove what was asked of a start before this one."""
        for file in (self._stop_file, self._save_file):
            if file.exists():
                file.unlink(missing_ok=True)
                say(f"warning: {file} was there before this start and is removed; make it while the run is at work")


def _explain(rank: int, error: BaseException) -> str:
    if isinstance(error, Hang):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if not isinstance(error, FailedElsewhere):
        if any(part in str(error) for part in GONE):
            return (
                f"another rank died and left no reason (killed, out of memory, machine lost?); rank {rank} saw {text}"
            )
        if any(part in str(error) for part in SILENT):
            return f"another rank did not answer within train.timeout_s; rank {rank} saw {text}"
    return text


def is_status(found: dict[str, Any]) -> bool:
    """Whether `found` is what `RunStatus` writes, or an earlier version wrote."""
    step = found.get("step", 0)
    whole = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    named = found.get("status") in (DONE, PREEMPTED, FAILED, RUNNING)
    return named and whole and ("step" in found or found["status"] not in (DONE, PREEMPTED))


def last_sign(status: dict[str, Any]) -> str:
    """When and from where a run that is `running` gave its last sign of life; "" where it does not tell."""
    try:
        age = (datetime.now(UTC) - datetime.fromisoformat(status["time"])).total_seconds()
    except (KeyError, TypeError, ValueError):
        return ""
    job = f", job {status['job']}" if "job" in status else ""
    where = f"process {status.get('pid')} on {status.get('host')}{job}"
    return f"its last sign of life was {_ago(max(age, 0.0))} ago ({where})"


def _ago(seconds: float) -> str:
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
