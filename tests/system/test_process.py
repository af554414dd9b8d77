"""A process that ran torch's threads ends with its own code, not with an abort."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# A thread that asks for the interpreter's lock, on its way out of torch, while the interpreter ends.
BUSY = """
import atexit, sys, threading, time, torch
from pivot.system.process import leave

class SlowToGo:
    def __del__(self):
        time.sleep(0.5)

def add_up():
    while True:
        torch.ones(200_000).sum()

torch.set_num_threads(1)
threading.Thread(target=add_up, daemon=True).start()
sys.kept = SlowToGo()
atexit.register(print, "registered", end="")
print("finished, ", end="")
"""


@pytest.mark.parametrize("code", [0, 75])
def test_the_end_is_not_an_abort(code: int) -> None:
    """With `sys.exit` in place of `leave` it is one nearly every time."""
    process = subprocess.run(
        [sys.executable, "-c", f"{BUSY}leave({code})"],
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == code, process.stderr
    assert process.stdout == "finished, registered"


# A worker that ignores SIGTERM, as a loader's does, and hangs in a read.
STUCK = """
import multiprocessing, os, signal, sys
from pivot.system.process import leave

def work(pipe):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send(os.getpid())
    signal.pause()

ours, theirs = multiprocessing.Pipe()
multiprocessing.get_context("fork").Process(target=work, args=(theirs,), daemon=True).start()
os.kill(ours.recv(), signal.SIGSTOP)
leave(7)
"""

# What is registered with atexit never returns.
ENDLESS = """
import atexit, time
from pivot.system import process as leave
leave.LIMIT_S = 0.5
atexit.register(time.sleep, 600)
leave.leave(7)
"""


@pytest.mark.parametrize("script", [STUCK, ENDLESS], ids=["worker", "atexit"])
def test_every_end_has_a_limit(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
