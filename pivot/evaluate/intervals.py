"""How sure a share is: 95 % intervals that know that several questions about one image are not independent.

Letters: n values, G groups (images).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959964  # 95 %


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def share_text(interval: Interval) -> str:
    """`0.912 [0.900, 0.924]`."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def change_text(interval: Interval) -> str:
    """`+0.050 [+0.007, +0.093]`: a difference, with its sign."""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval)


def _cluster_variance(values: np.ndarray, groups: np.ndarray) -> float:
    """Variance of the mean of `values` when whole groups were drawn: the sum of squared group residuals over n^2."""
    _, group = np.unique(groups, return_inverse=True)
    residuals = np.bincount(group.ravel(), weights=values - values.mean())
    count = len(residuals)
    return float(np.square(residuals).sum()) / len(values) ** 2 * (count / max(1, count - 1))


def share(values: np.ndarray, groups: np.ndarray) -> Interval:
    """The mean of `values` in [0, 1] with Wilson's interval, at the sample size that the groups leave.

    n shrinks by the design effect (Kish 1965): the variance with groups over the one without, at least 1. Unlike a
    bootstrap, Wilson's interval has a width at a share of 0 or 1 too.
    """
    n, mean = len(values), float(values.mean())
    simple = mean * (1 - mean) / max(1, n - 1)
    effect = max(1.0, _cluster_variance(values, groups) / simple) if simple > 0 else n / len(np.unique(groups))
    n_effective = n / effect
    spread = Z * math.sqrt(mean * (1 - mean) / n_effective + Z**2 / (4 * n_effective**2))
    centre, scale = mean + Z**2 / (2 * n_effective), 1 + Z**2 / n_effective
    return Interval(mean, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def difference(before: np.ndarray, after: np.ndarray, groups: np.ndarray) -> Interval:
    """after - before over the same samples in the same order, with the interval of paired values."""
    change = after - before
    half = Z * math.sqrt(_cluster_variance(change, groups))
    mean = float(change.mean())
    return Interval(mean, mean - half, mean + half)


def mean_of_runs(values: Sequence[float]) -> Interval | None:
    """The mean over runs with Student's t interval: n - 1 degrees of freedom. None for fewer than two runs."""
    from scipy import stats  # here: it takes a second, and only tables over several runs need it

    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=np.float64)
    mean, error = float(array.mean()), float(array.std(ddof=1)) / math.sqrt(len(array))
    half = float(stats.t.ppf(0.975, len(array) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def difference_of_means(before: Sequence[float], after: Sequence[float]) -> Interval | None:
    """after - before over runs that are paired (by seed), with the t interval of the paired differences."""
    return mean_of_runs([second - first for first, second in zip(before, after, strict=True)])
