"""Work is done in processes and its results come back; a process that dies ends the work, and nothing waits for it."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import pytest

from pivot.workers import worker_pool


def test_results_come_in_order_and_from_other_processes():
    with worker_pool(2) as pool:
        assert list(pool.map(divmod, range(1, 50), [7] * 49)) == [divmod(i, 7) for i in range(1, 50)]
        assert pool.submit(os.getpid).result() in {process.pid for process in multiprocessing.active_children()}
        assert pool.submit(int, "ff", base=16).result() == 255
    assert not multiprocessing.active_children()


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
    assert not multiprocessing.active_children()


def test_the_other_workers_finish_what_they_have():
    """Of two, one dies: its task fails, the other's come to their end, and no task is lost without a word."""
    with worker_pool(2) as pool:
        dying = pool.submit(os._exit, 3)
        others = [pool.submit(abs, -i) for i in range(10)]
        with pytest.raises(ChildProcessError, match="exit code 3"):
            dying.result(timeout=60)
        ended = [future.exception(timeout=60) for future in others]
        assert all(error is None or isinstance(error, ChildProcessError) for error in ended)
