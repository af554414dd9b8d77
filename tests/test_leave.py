"""A process that ran torch's threads ends with its own code, not with an abort."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# A thread that asks for the interpreter's lock, on its way out of torch, while the interpreter ends.
BUSY = """
import atexit, sys, threading, time, torch
from pivot.leave import leave

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
