"""The stop signal, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, signal, sys
from pivot.distributed import StopSignal
stop = StopSignal()
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
    print(stop.received, flush=True)
"""


def send(*names: str) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True)
    return done.returncode, done.stdout.split()


def test_a_stop_is_remembered_and_a_second_ctrl_c_ends_at_once() -> None:
    """DeepSpeed's launcher answers Ctrl-C with a SIGTERM to the ranks, which have had the Ctrl-C already."""
    assert send("SIGINT", "SIGTERM") == (0, ["SIGINT", "SIGTERM"])
    assert send("SIGTERM", "SIGUSR2", "SIGINT") == (0, ["SIGTERM", "SIGUSR2", "SIGINT"])
    assert send("SIGINT", "SIGTERM", "SIGINT") == (130, ["SIGINT", "SIGTERM"])
