"""A rank is a straggler where it works longer than the median rank by a share, and by a part of all time; once."""

from __future__ import annotations

import socket
from unittest import mock

import pytest

from pivot.run import stragglers
from pivot.run.stragglers import Stragglers, describe


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """A step takes ten seconds: three are a window's length, five its number."""
    times = iter(range(0, 10_000, 10))
    monkeypatch.setattr(stragglers.time, "monotonic", lambda: float(next(times)))
    return mock.Mock()


def find(busy_s: list[float], *, steps: int = 6) -> list[list[int]]:
    with mock.patch("pivot.system.distributed.gather", lambda value: [value] * len(busy_s)):
        found = Stragglers()
    return [[row["rank"] for row in found.add(busy_s)] for _ in range(steps)]


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
    with mock.patch("pivot.system.distributed.gather", lambda value: [value] * 2):
        found = Stragglers()
    (row,) = [row for _ in range(6) for row in found.add([2.0, 8.0])]
    host = socket.gethostname()
    assert row == {"rank": 1, "host": host, "busy_s": 8.0, "median_busy_s": 2.0}
    told = f"rank 1 on {host} works 8.00 s a step by itself, the median rank 2.00 s; the others wait for it"
    assert describe(row) == told
