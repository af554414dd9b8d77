"""Worker processes that end with their parent, keep nothing of its, and whose death the parent survives."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, Process, active_children
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any

PR_SET_PDEATHSIG = 1
END_WITHIN_S = 5.0  # for a worker that was told to end; then it is killed
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
    pool = WorkerPool(workers)
    try:
        yield pool
        pool.shutdown()
    finally:
        with ending([process for process, _ in workers]):  # after an error also those that are at a task
            pool.shutdown(cancel_futures=True)
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
    be_worker_of(parent, ignore=(signal.SIGINT,))  # Ctrl-C reaches all of them; the parent says what happens
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


def be_worker_of(parent: int, *, ignore: tuple[signal.Signals, ...]) -> None:
    """In a forked process: end when `parent` ends, even by `kill -9`, and hold none of its connections."""
    for number in ignore:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
    _drop_connections()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _drop_connections() -> None:
    """Let go of the ranks' sockets: a dead rank would look alive to the others for as long as its workers live.

    Their numbers stay taken, since the objects that were forked along may close them.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"):
        with suppress(OSError):  # that of the listing itself is closed by now
            if int(name) > 2 and _is_connection(int(name)):
                os.dup2(nothing, int(name), inheritable=False)
    os.close(nothing)


def _is_connection(descriptor: int) -> bool:
    """Whether it is a socket to other machines; those of multiprocessing are of the machine's own kind."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as found:
        return found.family in (socket.AF_INET, socket.AF_INET6)


@contextmanager
def ending(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """Inside, `workers` are told to end; whoever lives after END_WITHIN_S is killed meanwhile."""
    with running_out(END_WITHIN_S, _kill, workers):
        yield


@contextmanager
def running_out(limit_s: float, then: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Call `then` from another thread when what is inside takes longer than `limit_s`; it goes on meanwhile."""
    timer = threading.Timer(limit_s, then, arguments)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def kill_workers() -> None:
    """Kill what is left of this process's children, whatever they do: they only read for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error for a worker that a signal ended
    children = active_children()
    _kill(children)
    for child in children:
        child.join(END_WITHIN_S)  # not for ever: one that waits for a disk ends once the disk answers


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
