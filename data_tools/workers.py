"""Worker processes that end with their parent: after `kill -9` of a command none is left waiting for work."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

PR_SET_PDEATHSIG = 1


def worker_pool(num: int, start: Callable[..., Any] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """`num` processes; each runs `start` once before its first task."""
    return ProcessPoolExecutor(num, initializer=_start, initargs=(os.getpid(), start, arguments))


def _start(parent: int, start: Callable[..., Any] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent says what happens
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
    if start is not None:
        start(*arguments)
