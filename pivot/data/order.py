"""The endless order of a run's samples: a pure function of (data fingerprint, seed, position).

Nothing is shuffled through a buffer and no random state exists, so a resume is a jump to a position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pivot.config import TrainSource
    from pivot.data.shards import ShardSet

ORDER_VERSION = 1  # part of the plan's fingerprint: raise it whenever the same inputs would give another order
BLOCK = 1000  # positions in which a mixture is exact


class EpochOrder:
    """The endless stream of one set's rows: each epoch holds every kept row once.

    Shards are permuted, cut into windows of `window_shards` (None: one window), and the rows of a window are permuted
    in full. Windows bound what a reader of remote shards must hold at a time. With `groups` (int64[rows], equal for
    rows that belong together) the groups of a window are permuted instead, and each one's rows follow each other.
    """

    def __init__(
        self,
        fingerprint: str,
        shard_sizes: Sequence[int],
        kept: np.ndarray,
        seed: int,
        window_shards: int | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        self._fingerprint, self._kept, self._seed, self._groups = fingerprint, kept, seed, groups
        self._first_rows = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
        self._window_shards = window_shards or len(shard_sizes)
        self.num_rows = int(kept.sum())
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)  # a step may need two

    def rows(self, first: int, count: int) -> np.ndarray:
        """int64[count]: the rows at stream positions [first, first + count)."""
        parts = []
        while count > 0:
            epoch, start = divmod(first, self.num_rows)
            part = self._epoch(epoch)[start : start + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _compute_epoch(self, epoch: int) -> np.ndarray:
        shard_order = permutation(len(self._first_rows) - 1, self._key(epoch, "shards"))
        windows = []
        for number, first in enumerate(range(0, len(shard_order), self._window_shards)):
            spans = [self._first_rows[[s, s + 1]] for s in shard_order[first : first + self._window_shards]]
            rows = np.concatenate([np.arange(start, end) for start, end in spans])
            rows = rows[permutation(len(rows), self._key(epoch, "window", number))]
            if self._groups is not None:
                rows = self._bring_together(rows, self._key(epoch, "groups", number))
            windows.append(rows[self._kept[rows]])
        return np.concatenate(windows)

    def _bring_together(self, rows: np.ndarray, key: int) -> np.ndarray:
        """The same rows, group by group in an order of `key`; those of a group keep theirs."""
        assert self._groups is not None
        names, group = np.unique(self._groups[rows], return_inverse=True)
        return rows[np.argsort(permutation(len(names), key)[group], kind="stable")]

    def _key(self, *parts: object) -> int:
        return _key(self._fingerprint, self._seed, *parts)


@dataclass(frozen=True)
class MixtureSource:
    """One set of a mixture, and how much of it there shall be. At most one of the three is given.

    `weight`: its share of the stream, relative to the other weights; `repeat`: so many times each row per epoch;
    `choose`: so many rows per epoch, others in the next.
    """

    fingerprint: str
    shard_sizes: tuple[int, ...]
    weight: float | None = None
    repeat: float | None = None
    choose: int | None = None

    @property
    def samples(self) -> int:
        return sum(self.shard_sizes)

    def facts(self) -> list[Any]:
        """For the plan's fingerprint."""
        return [self.fingerprint[:16], self.weight, self.repeat, self.choose]


class MixtureOrder:
    """The endless stream over several sets, whose rows count through the first, then the second, and so on.

    Each set keeps the order that it has alone. In every block of BLOCK positions of an epoch a set has its exact share
    (where that is no whole number, one of the two next to it, such that no prefix is off by one or more). The last
    block of an epoch may be shorter; an epoch without weights holds `choose` or `repeat` times the rows of each set.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        kept: np.ndarray,
        seed: int,
        window_shards: int | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        starts = np.concatenate([[0], np.cumsum([source.samples for source in sources])]).astype(np.int64)
        self._starts = starts[:-1]
        self._orders = [
            EpochOrder(
                source.fingerprint,
                source.shard_sizes,
                kept[first:last],
                seed,
                window_shards,
                None if groups is None else groups[first:last],
            )
            for source, first, last in zip(sources, starts[:-1], starts[1:], strict=True)
        ]
        empty = [number for number, order in enumerate(self._orders) if not order.num_rows]
        if empty:
            raise ValueError(f"data.train: no sample is left of entry {empty[0]}; see what was excluded, or remove it")
        shares, self.num_rows = _shares(sources, [order.num_rows for order in self._orders])
        self._given = _apportion(shares, self.num_rows)
        self._fingerprint = hashlib.sha256(json.dumps([s.facts() for s in sources]).encode()).hexdigest()
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._compute_block)

    def rows(self, first: int, count: int) -> np.ndarray:
        """int64[count]: the rows at stream positions [first, first + count)."""
        parts = []
        while count > 0:
            epoch, place = divmod(first, self.num_rows)
            block, start = divmod(place, BLOCK)
            part = self._block(epoch, block)[start : start + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _compute_block(self, epoch: int, block: int) -> np.ndarray:
        before, after = self._given[block], self._given[block + 1]
        rows = [
            order.rows(int(epoch * self._given[-1, i] + before[i]), int(after[i] - before[i])) + self._starts[i]
            for i, order in enumerate(self._orders)
        ]
        sets = np.repeat(np.arange(len(rows)), after - before)
        sets = sets[permutation(len(sets), _key(self._fingerprint, self._seed, "mix", epoch, block))]
        mixed = np.empty(len(sets), dtype=np.int64)
        for i, own in enumerate(rows):
            mixed[sets == i] = own  # each set in its own order
        return mixed


def build_mixture(shards: ShardSet, sources: Sequence[TrainSource]) -> tuple[MixtureSource, ...]:
    """The mixture of the sets that `shards` joins, as `data.train` says."""
    return tuple(
        MixtureSource(
            fingerprint=part.fingerprint,
            shard_sizes=tuple(shard.samples for shard in part.shards),
            weight=source.weight,
            repeat=source.repeat,
            choose=source.choose,
        )
        for part, source in zip(shards.parts, sources, strict=True)
    )


def _shares(sources: Sequence[MixtureSource], num_rows: Sequence[int]) -> tuple[list[Fraction], int]:
    """(share of each set, positions in an epoch)."""
    if any(source.weight is not None for source in sources):
        weights = [Fraction(str(source.weight)) for source in sources]
        return [weight / sum(weights) for weight in weights], sum(num_rows)
    counts = [
        source.choose or max(1, round((1.0 if source.repeat is None else source.repeat) * rows))
        for source, rows in zip(sources, num_rows, strict=True)
    ]
    return [Fraction(count, sum(counts)) for count in counts], sum(counts)


def _apportion(shares: Sequence[Fraction], length: int) -> np.ndarray:
    """int64[blocks + 1, sets]: how many positions each set was given before every block, and at the end.

    Always one of the two whole numbers next to share * positions. What is left of a block after the lower ones goes
    where the upper one is due first: with earliest deadlines first this never gets stuck (Tijdeman, 1980).
    """
    common = np.lcm.reduce([share.denominator for share in shares], dtype=object)
    parts = [int(share * common) for share in shares]
    given = [[0] * len(shares)]
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        now = [max(before, part * end // common) for before, part in zip(given[-1], parts, strict=True)]
        open_sets = [i for i, part in enumerate(parts) if now[i] < -(-part * end // common)]
        for i in sorted(open_sets, key=lambda i: (Fraction(now[i] + 1, parts[i]), i))[: end - sum(now)]:
            now[i] += 1
        assert sum(now) == end, "the shares do not add up"
        given.append(now)
    return np.array(given, dtype=np.int64)


def permutation(n: int, key: int) -> np.ndarray:
    """int64[n]: the order of splitmix64(i XOR key). Not numpy's generator, whose stream may change with its version."""
    return np.argsort(mix64(np.arange(n, dtype=np.uint64) ^ np.uint64(key)), kind="stable").astype(np.int64)


def mix64(values: np.ndarray) -> np.ndarray:
    """splitmix64 of each uint64: neighbours become unrelated."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _key(fingerprint: str, seed: int, *parts: object) -> int:
    text = json.dumps([ORDER_VERSION, fingerprint, seed, *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
