"""`sample`: which rows a draw takes. A function of the samples' keys and the seed, not of shards or their order.

Two ways of drawing exist because they give very different mixtures of MMPR (vsr is 13.0 % of the rows, and 1.8 % by
repeat_time): `rows`, every row alike, as PIVOT drew; `repeat_time`, a row with its source's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.where import Condition, text_of
from pivot.data.order import mix64
from pivot.data.samples import Sample
from pivot.data.shards import ShardSet

WAYS = ("rows", "repeat_time")


@dataclass(frozen=True)
class Filters:
    """What a row must be to be drawn; `count_tokens` gives the text tokens of prompt and chosen."""

    conditions: tuple[Condition, ...] = ()
    num_images: int | None = None
    max_words: int | None = None  # of the longer answer
    max_tokens: int | None = None
    without: tuple[str, ...] = ()  # texts that no answer may hold
    count_tokens: Callable[[Sample], int] | None = field(default=None, compare=False)

    def reason(self, row: int, sample: Sample) -> str | None:
        """Why the row is not to be drawn, or None."""
        answers = [text_of(sample, role) for role in ("chosen", "rejected")]
        if not all(condition.holds(row, sample) for condition in self.conditions):
            return "--where"
        if self.num_images is not None and len(sample["images"]) != self.num_images:
            return "number of images"
        if self.max_words is not None and max(len(text.split()) for text in answers) > self.max_words:
            return "words"
        if any(token in text for token in self.without for text in answers):
            return "special tokens"
        if self.max_tokens is not None and self.count_tokens is not None:
            return "tokens" if self.count_tokens(sample) > self.max_tokens else None
        return None

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        where = [f"{c.field}{c.sign}{getattr(c.value, 'pattern', c.value)}" for c in self.conditions]
        return {
            "where": where,
            "num_images": self.num_images,
            "max_words": self.max_words,
            "max_tokens": self.max_tokens,
            "without": list(self.without),
        }


@dataclass
class Draw:
    rows: np.ndarray  # int64[n], in the order of the data set
    looked_at: int
    refused: dict[str, int]


def shuffled(key_hashes: np.ndarray, seed: int) -> np.ndarray:
    """int64[n]: all rows in an order drawn from their keys."""
    return np.lexsort((key_hashes, mix64(key_hashes ^ mix64(np.array([seed], dtype=np.uint64)))))


def draw(
    shards: ShardSet,
    num: int | None,
    seed: int,
    *,
    by: str = "rows",
    filters: Filters = Filters(),
    progress: Callable[[int, int, str], None] = lambda done, total, remark: None,
) -> Draw:
    """`num` rows (None: all) that pass the filters, without repetition. Raises ValueError when there are fewer."""
    refused: dict[str, int] = {}
    taken: list[int] = []
    looked_at = 0
    for row, sample in _candidates(shards, seed, by):
        if num is not None and len(taken) == num:
            break
        looked_at += 1
        reason = filters.reason(row, sample)
        if reason is None:
            taken.append(row)
        else:
            refused[reason] = refused.get(reason, 0) + 1
        progress(looked_at, len(shards), f"{len(taken):,} drawn")
    if num is not None and len(taken) < num:
        raise ValueError(f"only {len(taken)} of {len(shards)} samples pass the filters ({refused}), {num} are wanted")
    return Draw(np.sort(np.array(taken, dtype=np.int64)), looked_at, refused)


def _candidates(shards: ShardSet, seed: int, by: str) -> Iterator[tuple[int, Sample]]:
    if by == "rows":
        order = shuffled(shards.index["key_hash"], seed)
    else:
        order = _by_weight(shards, seed)
    for row in order.tolist():
        yield row, shards.read_text(row)


def _by_weight(shards: ShardSet, seed: int) -> np.ndarray:
    """Rows by falling u ** (1 / weight): drawing without repetition, each next row with chances by weight
    (Efraimidis and Spirakis, 2006)."""
    weights = np.array([_repeat_time(shards, row) for row in range(len(shards))])
    bits = mix64(shards.index["key_hash"] ^ mix64(np.array([seed], dtype=np.uint64)))
    uniform = (bits.astype(np.float64) + 0.5) / 2.0**64
    with np.errstate(divide="ignore"):
        keys = np.where(weights > 0, np.log(uniform) / weights, -np.inf)
    order = np.argsort(-keys, kind="stable")
    return order[weights[order] > 0]


def _repeat_time(shards: ShardSet, row: int) -> float:
    shard, _ = shards.locate(row)
    source = shards.read_text(row).get("source") or ""
    return float(shards.part_of(shard).manifest.get("sources", {}).get(source, {}).get("repeat_time", 1.0))
