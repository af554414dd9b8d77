"""How a process that ran torch's threads ends: with its own code, and within a limit."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from pivot.workers import kill_workers, running_out

LIMIT_S = 30.0  # for what an end waits for: other ranks, which may be dead, and what is registered with atexit


def leave(code: int) -> NoReturn:
    """End this process with `code`, what is registered with atexit done, but without the interpreter's own end.

    During that end a thread that comes back from torch's or gloo's C++ and asks for the interpreter's lock is unwound
    through code that must not throw, and the process aborts ("terminate called without an active exception"): a
    finished run would count as failed. Gloo's threads let go of the last tensors of a collective at any time.
    """
    with time_limit(code):
        kill_workers()  # multiprocessing's own end would wait for each, be it stuck in a read
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def time_limit(code: int) -> Iterator[None]:
    """End this process with `code` when what is inside takes longer than LIMIT_S."""
    with running_out(LIMIT_S, _end_now, code):
        yield


def _end_now(code: int) -> None:
    os.write(2, f"the end took longer than {LIMIT_S:g} s; leaving without the rest\n".encode())
    os._exit(code)
