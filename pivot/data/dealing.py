"""Units of work dealt to ranks and cut into rows: plain bin packing over integers, the same on every rank.

A unit is what stays together in a row: a pair, or with image trees the pairs of one image. Costs balance, tokens bound.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import product

EVEN_RATIO = 1.01  # costliest share over the mean; at 8 pairs a share the greedy deal alone came to 1.07


def deal(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Units (indices into `costs`) per share: the costliest first, each to the least loaded share, then swaps."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0.0, share) for share in range(num_shares)]
    for unit in _costliest_first(range(len(costs)), costs):
        load, share = heapq.heappop(loads)
        shares[share].append(unit)
        heapq.heappush(loads, (load + costs[unit], share))
    _swap_until_even(shares, costs)
    return shares


def _swap_until_even(shares: list[list[int]], costs: Sequence[float]) -> None:
    """Swap units, in place, of the costliest share and the cheapest until EVEN_RATIO holds, or no swap helps.

    Every share keeps its number of units.
    """
    loads = [sum(costs[unit] for unit in share) for share in shares]
    most = EVEN_RATIO * sum(loads) / len(loads)
    for _ in costs:  # a bound for its time: each swap lowers the sum of squared loads, so it ends by itself
        high, low = max(range(len(loads)), key=loads.__getitem__), min(range(len(loads)), key=loads.__getitem__)
        half = (loads[high] - loads[low]) / 2
        if loads[high] <= most or not shares[low]:
            return
        swaps = product(shares[high], shares[low])  # few: shares of many units are even from the start
        give, take = min(swaps, key=lambda swap: abs(costs[swap[0]] - costs[swap[1]] - half))
        gain = costs[give] - costs[take]
        if not 0 < gain < 2 * half:
            return
        shares[high][shares[high].index(give)] = take
        shares[low][shares[low].index(take)] = give
        loads[high] -= gain
        loads[low] += gain


def cut(shares: list[list[int]], costs: Sequence[float], tokens: Sequence[int], budget: int) -> list[list[list[int]]]:
    """[share][row] -> units: every share cut into the same, smallest number of rows within `budget` tokens.

    No row is empty as long as there are as many units as rows. Rows of a share lie in falling order of cost: under
    ZeRO-3 the ranks wait for each other at every micro-batch, so equals should meet.
    """
    num_rows = max(1, max(-(-sum(tokens[unit] for unit in share) // budget) for share in shares))
    tightest: dict[tuple[int, ...], list[list[int]]] = {}  # by best fit; it does not depend on the number of rows
    while True:
        rows = []
        for share in _give_each(shares, costs, num_rows):
            filled = _fill_rows(share, costs, tokens, budget, num_rows, tightest)
            if filled is None:
                break
            rows.append(filled)
        if len(rows) == len(shares):
            return rows
        num_rows += 1  # ends: with a row for each unit everything fits


def best_fit_decreasing(units: Sequence[int], tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of at most `budget` tokens: the longest unit first, each into the fullest row that has room."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, row), the fullest first
    for unit in sorted(units, key=lambda unit: (-tokens[unit], unit)):
        place = bisect_left(rooms, (tokens[unit], 0))
        if place == len(rooms):
            rows.append([])
            rooms.append((budget, len(rows) - 1))
        room, row = rooms.pop(place)
        rows[row].append(unit)
        insort(rooms, (room - tokens[unit], row))
    return rows


def _give_each(shares: list[list[int]], costs: Sequence[float], least: int) -> list[list[int]]:
    """The same shares, where those with under `least` units got the cheapest of those with more, if there are any."""
    shares = [list(share) for share in shares]
    for poor in shares:
        while len(poor) < least:
            rich = max(shares, key=len)
            if len(rich) <= least:
                return shares  # nor for the poor that follow; each would look through all shares again
            poor.append(rich.pop(rich.index(min(rich, key=lambda unit: (costs[unit], unit)))))
    return shares


def _fill_rows(
    units: list[int],
    costs: Sequence[float],
    tokens: Sequence[int],
    budget: int,
    num_rows: int,
    tightest: dict[tuple[int, ...], list[list[int]]],
) -> list[list[int]] | None:
    """The units in exactly `num_rows` rows, or None when they do not fit. `tightest` keeps each share's best fit."""
    rows = _spread(units, costs, tokens, budget, num_rows)
    if rows is None:  # too tight to be even
        share = tuple(units)
        if share not in tightest:
            tightest[share] = best_fit_decreasing(units, tokens, budget)
        if len(tightest[share]) > num_rows:
            return None
        rows = [list(row) for row in tightest[share]]
        while len(rows) < num_rows and max(map(len, rows), default=0) > 1:
            rows.append([max(rows, key=len).pop()])
        rows += [[] for _ in range(num_rows - len(rows))]
    return sorted(rows, key=lambda row: -sum(costs[unit] for unit in row))


def _spread(
    units: list[int], costs: Sequence[float], tokens: Sequence[int], budget: int, num_rows: int
) -> list[list[int]] | None:
    """Rows of even cost, the costliest unit first into the least loaded row with room; None when one has none."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    room = [budget] * num_rows
    loads = [(0.0, 0, row) for row in range(num_rows)]  # a heap of (cost, units, row)
    for unit in _costliest_first(units, costs):
        full = []  # lighter than the one that is taken, but without room
        while loads and room[loads[0][2]] < tokens[unit]:
            full.append(heapq.heappop(loads))
        if not loads:
            return None
        cost, _, row = loads[0]
        rows[row].append(unit)
        room[row] -= tokens[unit]
        heapq.heapreplace(loads, (cost + costs[unit], len(rows[row]), row))
        for light in full:
            heapq.heappush(loads, light)
    return rows


def _costliest_first(units: Sequence[int], costs: Sequence[float]) -> list[int]:
    return sorted(units, key=lambda unit: (-costs[unit], unit))
