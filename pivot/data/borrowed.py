"""Which answer to another prompt each sample is scored with beside its own, for KTO's estimate of the KL.

Nobody trains on these answers; they tell how far the policy has moved from the reference where it was not pushed. Who
borrows from whom is a function of a shard alone, not of the order or the step, so that the reference's log-probs of
borrowed answers are computed once and kept like all others.

Two samples whose answers are of nearly the same length lend to each other: sums of log-probs grow with the length, and
what is borrowed should be as long as what is learned. A borrowed answer is cut to its borrower's longest own one, so
that `data.max_tokens` and the budget of a row hold for it as well; between neighbours in length that is little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pivot.data.lengths import Borrowed, Lengths
from pivot.data.order import mix64

BORROWED_VERSION = 1  # raise it whenever the same shard would lend otherwise: the reference's log-probs are others then


def borrow(lengths: Lengths, shard_sizes: Sequence[int]) -> Lengths:
    """The lengths with `borrowed`. A sample that is alone in its shard borrows its own answer.

    Of a pair every other sample lends the rejected answer, so that half of what is borrowed is of each kind.
    """
    ordinal = np.concatenate([np.arange(size) for size in shard_sizes])
    lends_rejected = (lengths.chosen == 0) | ((lengths.rejected > 0) & (ordinal % 2 == 1))
    lent = np.where(lends_rejected, lengths.rejected, lengths.chosen)
    valid = (lengths.prompt > 0) & (lent > 0)
    lender = np.arange(len(lengths))
    ends = np.cumsum(shard_sizes)
    for end, size in zip(ends, shard_sizes, strict=True):
        rows = np.arange(end - size, end)[valid[end - size : end]]
        # Samples about one picture lie together and often have answers of one length: at equal lengths in random order.
        rows = rows[np.lexsort((mix64(ordinal[rows].astype(np.uint64)), lent[rows]))]
        lender[rows] = rows[_neighbour(len(rows))]
    tokens = np.minimum(lent[lender], np.maximum(lengths.chosen, lengths.rejected))
    return replace(lengths, borrowed=Borrowed(lender, lends_rejected[lender], np.where(valid, tokens, 0)))


def _neighbour(count: int) -> np.ndarray:
    """int64[count]: 1 0 3 2 ...; of an odd number the last three in a circle. Nobody is its own, but for one alone."""
    neighbour = np.arange(count) ^ 1
    if count % 2:
        neighbour[-3:] = np.roll(np.arange(count)[-3:], 1)
    return neighbour
