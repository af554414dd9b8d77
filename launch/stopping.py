"""Run DeepSpeed's launcher so that Ctrl-C lets its ranks save: `code, stopped = run_until_stopped(command, ...)`.

Left to itself the launcher would kill a rank that has not saved within 30 seconds, and return before the last is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

STOP_WITHIN_S = 120.0  # what is under way when the signal comes: an evaluation, a step, then saving
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_until_stopped(command: list[str], environment: dict[str, str], folder: Path) -> tuple[int, bool]:
    """The exit code of `command`, run in `folder`, and whether a signal came; none of its processes is left.

    It gets a process group of its own, which a terminal's Ctrl-C does not reach. The ranks alone are told to stop, and
    they are waited for; a second Ctrl-C, or STOP_WITHIN_S without an end, kills the group.
    """
    with (
        _remembered_signals() as received,
        subprocess.Popen(command, cwd=folder, env=environment, process_group=0) as launcher,
    ):
        told_at: float | None = None
        while (code := _wait(launcher)) is None:
            if received and told_at is None:
                told_at = time.monotonic()
                print("\nstopping, after saving; Ctrl-C again ends at once", file=sys.stderr)
                _tell_ranks(launcher.pid)
            elif received.count(signal.SIGINT) > 1 or (told_at and time.monotonic() > told_at + STOP_WITHIN_S):
                _kill(launcher.pid)
        _kill(launcher.pid)  # whoever outlived it
    return code, bool(received)


@contextlib.contextmanager
def _remembered_signals() -> Iterator[list[int]]:
    """The signals that came so far, instead of their usual effect; one that is ignored (nohup) stays so."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None


def _tell_ranks(launcher: int) -> None:
    """SIGTERM to the ranks: the children of the one child that the launcher has here. None yet: to the whole group."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        ranks = [rank for node in psutil.Process(launcher).children() for rank in node.children()]
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()
        if not ranks:
            os.killpg(launcher, signal.SIGTERM)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
