"""A rank is a straggler where it works longer than the median rank by a share, and by a part of all time; once."""

from __future__ import annotations

import socket
from unittest import mock

import pytest

from pivot.run import stragglers
from pivot.run.stragglers import Stragglers


class Told:
    """What a run's log and terminal get."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.lines: list[str] = []

    def event(self, name: str, **values: object) -> None:
        assert name == "straggler"
        self.rows.append(values)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """A step takes ten seconds: three are a window's length, five its number."""
    times = iter(range(0, 10_000, 10))
    monkeypatch.setattr(stragglers.time, "monotonic", lambda: float(next(times)))
    return mock.Mock()


def find(busy_s: list[float], *, steps: int = 6) -> list[list[int]]:
    told = watch(busy_s, steps)
    return [[row["rank"] for row in told.rows if row["step"] == step] for step in range(1, steps + 1)]


def watch(busy_s: list[float], steps: int) -> Told:
    told = Told()
    with mock.patch("pivot.system.distributed.gather", lambda value: [value] * len(busy_s)):
        stragglers = Stragglers(told, told.lines.append)
    for step in range(1, steps + 1):
        stragglers.add(step, busy_s)
    return told


def test_it_is_named_once_when_the_window_is_over(clock: mock.Mock) -> None:
    assert find([4.0, 9.0, 4.0, 4.0], steps=16) == [[], [], [], [], [], [1], *[[]] * 10]


def test_of_two_ranks_the_slower_is_compared_to_the_faster(clock: mock.Mock) -> None:
    assert find([9.0, 4.0])[-1] == [0]


@pytest.mark.parametrize("slow", [4.9, 4.0, 3.0])
def test_a_share_below_a_quarter_is_no_straggler(clock: mock.Mock, slow: float) -> None:
    assert find([4.0, slow, 4.0]) == [[]] * 6


def test_nor_is_twice_of_next_to_nothing(clock: mock.Mock) -> None:
    assert find([0.5, 1.0, 0.5]) == [[]] * 6


def test_it_says_rank_host_and_times(clock: mock.Mock) -> None:
    told = watch([2.0, 8.0], 6)
    host = socket.gethostname()
    assert told.rows == [{"step": 6, "rank": 1, "host": host, "busy_s": 8.0, "median_busy_s": 2.0}]
    line = f"straggler  rank 1 on {host} works 8.00 s a step by itself, the median rank 2.00 s; the others wait for it"
    assert told.lines == [line]
