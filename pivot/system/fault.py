"""A fault on purpose, for tests: PIVOT_FAULT="rank=1,step=3,kind=sigkill|sigstop|raise|slow:4"; unset, nothing.

It comes when the rank begins the step (counted from 1); slow:4 makes it wait for four seconds.
"""

from __future__ import annotations

import os
import signal
import time


def inject(rank: int, step: int) -> None:
    """Do to this process what PIVOT_FAULT says, if it names this rank and step."""
    text = os.environ.get("PIVOT_FAULT")
    if text:
        told = dict(part.split("=", 1) for part in text.split(","))
        if (rank, step) == (int(told["rank"]), int(told["step"])):
            _strike(*told["kind"].split(":"))


def _strike(kind: str, seconds: str = "0") -> None:
    if kind == "raise":
        raise RuntimeError("PIVOT_FAULT asked for this error")
    if kind == "slow":
        time.sleep(float(seconds))
    else:
        os.kill(os.getpid(), {"sigkill": signal.SIGKILL, "sigstop": signal.SIGSTOP}[kind])
