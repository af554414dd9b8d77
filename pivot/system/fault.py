"""Faults on purpose, for tests: PIVOT_FAULT="rank=1,step=3,kind=sigkill"; unset, nothing happens and nothing is read.

The steps count from 1, and may be several (step=3-9); semicolons stand between several faults. They come when the rank
begins the step:

    sigkill, sigstop   the signal
    raise              an error of Python's
    slow:4             a wait of four seconds, in each of the steps
    nan                in each of the steps its loss is NaN, and so are its gradients
    enospc             the next time that it writes its part of a checkpoint, the disk is full
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "PIVOT_FAULT"
_FORMS = {  # part -> (how it is written, in words)
    "rank": (re.compile(r"(\d+)"), "a rank, from 0"),
    "step": (re.compile(r"([1-9]\d*)(?:-([1-9]\d*))?"), "a step, from 1, or steps such as 3-9"),
    "kind": (
        re.compile(r"(sigkill|sigstop|raise|nan|enospc)|(slow):(\d+(?:\.\d+)?)"),
        "sigkill, sigstop, raise, nan, enospc or slow:SECONDS",
    ),
}
_due: set[str] = set()  # "nan" during its step; "enospc" until a checkpoint is written


@dataclass(frozen=True)
class Fault:
    rank: int
    steps: range
    kind: str
    seconds: float = 0.0


def read() -> list[Fault]:
    """The faults that PIVOT_FAULT asks for. ValueError for a text that asks for none."""
    text = os.environ.get(VARIABLE)
    return [_parse(one) for one in text.split(";")] if text else []


def announce(say: Callable[[str], None]) -> None:
    """Say what will strike, so that nobody takes it for a fault of his own. ValueError as `read`."""
    for fault in read():
        steps = (
            f"step {fault.steps.start}" if len(fault.steps) == 1 else f"steps {fault.steps.start} to {fault.steps[-1]}"
        )
        say(f"warning: {VARIABLE} is set, for tests alone: {fault.kind} on rank {fault.rank} in {steps}")


def inject(rank: int, step: int) -> None:
    """Do to this process what PIVOT_FAULT says, if it names this rank and step."""
    _due.discard("nan")
    for fault in read():
        if fault.rank == rank and step in fault.steps:
            _strike(fault)


def spoil(loss: Tensor) -> Tensor:
    """The loss of a micro-batch, which is NaN in a step with the fault `nan`."""
    return loss * float("nan") if "nan" in _due else loss


def fill_disk(folder: Path) -> None:
    """Once after the fault `enospc`: the OSError of a full disk, for whoever is about to write into `folder`."""
    if "enospc" in _due:
        _due.remove("enospc")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _strike(fault: Fault) -> None:
    if fault.kind == "raise":
        raise RuntimeError("PIVOT_FAULT asked for this error")
    if fault.kind == "slow":
        time.sleep(fault.seconds)
    elif fault.kind in ("nan", "enospc"):
        _due.add(fault.kind)
    else:
        os.kill(os.getpid(), {"sigkill": signal.SIGKILL, "sigstop": signal.SIGSTOP}[fault.kind])


def _parse(text: str) -> Fault:
    parts = [part.strip().partition("=")[::2] for part in text.split(",")]
    found = {}
    for name, (form, expected) in _FORMS.items():
        values = [value for key, value in parts if key == name]
        match = form.fullmatch(values[0]) if len(values) == 1 else None
        if match is None:
            seen = " and ".join(values) or "nothing"
            raise ValueError(f"{VARIABLE}: {name} is {seen} in '{text}', expected {expected}; {_EXAMPLE}")
        found[name] = [group for group in match.groups() if group is not None]
    unknown = [key for key, _ in parts if key not in _FORMS]
    if unknown:
        raise ValueError(f"{VARIABLE}: found '{unknown[0]}' in '{text}', expected rank, step and kind; {_EXAMPLE}")
    first, last = int(found["step"][0]), int(found["step"][-1])
    if last < first:
        raise ValueError(f"{VARIABLE}: step is {first}-{last} in '{text}', expected the lower one first; {_EXAMPLE}")
    kind, *seconds = found["kind"]
    return Fault(int(found["rank"][0]), range(first, last + 1), kind, *map(float, seconds))


_EXAMPLE = "write rank=1,step=3,kind=sigkill, or unset it"
