"""How a process ends that ran torch's threads (with its own code, within a limit), and where ranks meet (a port)."""

import atexit
import os
import random
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from pivot.system.workers import kill_workers, running_out

LIMIT_S = 30.0  # for what an end waits for: other ranks, which may be dead, and what is registered with atexit


def leave(code: int) -> NoReturn:
    """End this process with `code`, what is registered with atexit done, but without the interpreter's own end.

    During that end a thread that comes back from torch's or gloo's C++ and asks for the interpreter's lock is unwound
    through code that must not throw, and the process aborts ("terminate called without an active exception"): a
    finished run would count as failed. Gloo's threads let go of the last tensors of a collective at any time.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # launchers signal those that are left once the first rank has ended
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


PORTS = range(20_000, 32_000)  # below those that Linux gives to connections


def free_port() -> int:
    """One of PORTS that nobody listens on: it stays free for the seconds until rank 0 is there. OSError if none is."""
    for port in random.SystemRandom().sample(PORTS, 100):  # a seed would send all runs of a machine to one port
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"found no free port on 127.0.0.1 between {PORTS.start} and {PORTS.stop}; set MASTER_PORT")
