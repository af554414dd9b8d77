"""Work is done in processes and its results come back; a process that dies ends the work, and nothing waits for it."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pivot.system import workers
from pivot.system.workers import worker_pool


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every process of a test has ended with it; another file's may still be there."""
    others = multiprocessing.active_children()
    yield
    assert set(multiprocessing.active_children()) <= set(others)


def test_results_come_in_order_and_from_other_processes():
    with worker_pool(2) as pool:
        assert list(pool.map(divmod, range(1, 50), [7] * 49)) == [divmod(i, 7) for i in range(1, 50)]
        assert pool.submit(os.getpid).result() in {process.pid for process in multiprocessing.active_children()}
        assert pool.submit(int, "ff", base=16).result() == 255


def test_an_error_of_the_function_is_raised_and_the_worker_goes_on():
    with worker_pool(1) as pool:
        with pytest.raises(ValueError, match="invalid literal") as raised:
            pool.submit(int, "x").result()
        assert "in a worker process:\nTraceback" in raised.value.__notes__[0]
        with pytest.raises(FileNotFoundError, match="nowhere"):
            pool.submit(open, "/nowhere").result()
        assert pool.submit(int, "7").result() == 7


def die_in_the_middle_of_an_answer():
    def send_half(pipe, content):
        os.write(pipe.fileno(), bytes(content)[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = send_half


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_worker_that_dies_with_half_an_answer_sent(size):
    with (
        pytest.raises(ChildProcessError, match=r"exit code -9.*Run the same command again"),
        worker_pool(2, die_in_the_middle_of_an_answer) as pool,
    ):
        pool.submit(bytes, size).result(timeout=60)


def test_the_other_workers_finish_what_they_have():
    """Of two, one dies: its task fails, the other's come to their end, and no task is lost without a word."""
    with worker_pool(2) as pool:
        dying = pool.submit(os._exit, 3)
        others = [pool.submit(abs, -i) for i in range(10)]
        with pytest.raises(ChildProcessError, match="exit code 3"):
            dying.result(timeout=60)
        ended = [future.exception(timeout=60) for future in others]
        assert all(error is None or isinstance(error, ChildProcessError) for error in ended)


def connections() -> list[str]:
    """What of this process's open files is a socket to other machines."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    found += [name] if one.family == socket.AF_INET else []
    return found


def test_a_worker_holds_none_of_its_parents_connections():
    """A rank that dies then looks dead to the others, whoever of its workers is left; the parent's own goes on."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        with theirs, worker_pool(1) as pool:
            assert len(connections()) == 3
            assert pool.submit(connections).result() == []
            ours.sendall(b"still here")
            assert theirs.recv(100) == b"still here"


ORPHANS = """
import os, signal, sys, time
from pivot.system.workers import worker_pool
with worker_pool(2) as pool:
    list(pool.map(time.sleep, [0.3, 0.3]))  # both are at work
    pids = [process.pid for process in __import__("multiprocessing").active_children()]
    os.kill(pids[0], signal.SIGSTOP)
    print(*pids, flush=True)
    time.sleep(60)
"""


def test_workers_die_with_a_parent_that_is_killed_even_one_that_is_stuck():
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
        parent.kill()
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_an_error_does_not_wait_for_a_worker_that_is_stuck(monkeypatch):
    monkeypatch.setattr(workers, "END_WITHIN_S", 0.5)
    started = time.monotonic()
    with pytest.raises(KeyError), worker_pool(2) as pool:
        pool.submit(time.sleep, 600)
        pool.submit(time.sleep, 600)
        pool.submit(time.sleep, 600)
        time.sleep(0.5)
        raise KeyError
    assert time.monotonic() - started < 60
