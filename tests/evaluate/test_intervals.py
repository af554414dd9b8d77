"""Intervals against values worked out by hand, and against how often they hold what they claim to."""

from __future__ import annotations

import numpy as np
import pytest

from pivot.evaluate.intervals import Interval, change_text, difference, share, share_text


def test_share_is_wilsons_interval_where_samples_are_independent() -> None:
    """8 of 10: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) = 0.490 to 0.943 (Wilson 1927)."""
    values = np.array([1.0] * 8 + [0.0] * 2)
    assert share(values, np.arange(10)) == pytest.approx((0.8, 0.490, 0.943), abs=1e-3)


def test_share_keeps_a_width_at_the_ends() -> None:
    assert share(np.ones(100), np.arange(100)) == pytest.approx((1.0, 0.963, 1.0), abs=1e-3)
    assert share(np.zeros(100), np.arange(100)).high == pytest.approx(0.037, abs=1e-3)


def test_answers_that_hang_together_count_as_one() -> None:
    """400 answers, four about each of 100 images, all four alike: as good as 100 answers."""
    values = np.array([1.0] * 70 + [0.0] * 30)
    grouped = share(np.repeat(values, 4), np.repeat(np.arange(100), 4))
    assert grouped == pytest.approx(share(values, np.arange(100)), abs=1e-3)


def test_difference_is_paired() -> None:
    """Of 100 samples 10 got better and none worse: 0.1 with a standard error of sqrt(0.1 * 0.9 / 99) = 0.0302."""
    before = np.array([0.0] * 60 + [1.0] * 40)
    after = before.copy()
    after[:10] = 1.0
    assert difference(before, after, np.arange(100)) == pytest.approx((0.1, 0.1 - 0.0591, 0.1 + 0.0591), abs=1e-4)
    assert difference(before, before, np.arange(100)) == (0, 0, 0)


def test_the_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """300 draws of 80 images with four questions each, whose difficulty the image decides: 95 % nominal."""
    random, held = np.random.default_rng(0), 0
    groups = np.repeat(np.arange(80), 4)
    for _ in range(300):
        hard = np.repeat(random.beta(2, 1, size=80), 4)  # mean 2/3
        interval = share((random.random(320) < hard).astype(float), groups)
        held += interval.low <= 2 / 3 <= interval.high
    assert 0.92 <= held / 300 <= 0.98  # found: 0.95


def test_intervals_as_text() -> None:
    assert share_text(Interval(0.9124, 0.9, 0.92449)) == "0.912 [0.900, 0.924]"
    assert change_text(Interval(0.05, -0.0067, 0.0931)) == "+0.050 [-0.007, +0.093]"
