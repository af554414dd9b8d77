"""Worker processes that end with their parent, and whose death the parent survives."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

PR_SET_PDEATHSIG = 1
Worker = tuple[Process, Connection]


class WorkerPool(ThreadPoolExecutor):
    """Runs functions in processes; each has a pipe of its own, on which a thread waits for it.

    A ProcessPoolExecutor has one pipe for the results of all. A worker that the kernel kills while it writes there,
    for want of memory say, leaves half a result, and the parent waits for the other half without end.
    """

    def __init__(self, workers: list[Worker]) -> None:
        super().__init__(len(workers))
        self._free = SimpleQueue[Worker]()
        for worker in workers:
            self._free.put(worker)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        return super().submit(self._ask, function, arguments, named)

    def _ask(self, *task: Any) -> Any:
        process, pipe = worker = self._free.get()
        try:
            pipe.send(task)
            error, result = pipe.recv()
        except (EOFError, OSError) as gone:
            process.join()
            raise ChildProcessError(
                f"a worker process died with exit code {process.exitcode} (-9: out of memory? dmesg tells); what is "
                "finished stays. Run the same command again, with fewer workers if memory was short: it goes on"
            ) from gone
        finally:
            self._free.put(worker)
        if error is not None:
            raise error
        return result


@contextmanager
def worker_pool(num: int, start: Callable[..., Any] | None = None, *arguments: Any) -> Iterator[WorkerPool]:
    """`num` processes; each runs `start` once before its first task. Raises ChildProcessError when one has died."""
    workers = [_start_worker(start, arguments) for _ in range(num)]
    try:
        with WorkerPool(workers) as pool:
            yield pool
    finally:
        for process, pipe in workers:
            with suppress(OSError):  # it died
                pipe.send(None)
            process.join()
            pipe.close()


def _start_worker(start: Callable[..., Any] | None, arguments: tuple[Any, ...]) -> Worker:
    ours, theirs = Pipe()
    process = Process(target=_work, args=(theirs, os.getpid(), start, arguments), daemon=True)
    process.start()
    theirs.close()  # or its death would not end the pipe
    return process, ours


def _work(pipe: Connection, parent: int, start: Callable[..., Any] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent says what happens
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after `kill -9` of a command none is left waiting
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
    if start is not None:
        start(*arguments)
    while (task := pipe.recv()) is not None:
        function, positional, named = task
        answer: tuple[Exception | None, Any]
        try:
            answer = None, function(*positional, **named)
        except Exception as error:
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")  # a traceback does not travel
            answer = error, None
        pipe.send(answer)
