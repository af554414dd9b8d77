"""How questions are dealt and cut, and what the held-out set says of itself."""

from __future__ import annotations

import numpy as np
import pytest

from pivot.evaluate.outcomes import compare
from pivot.evaluate.pairs import PAIR_RECORD
from pivot.evaluate.preference import PREFERENCE, preferred, preferred_per_token
from pivot.evaluate.questions import MAX_BATCH, cut_batches


def test_batches_hold_each_row_once_within_the_budget() -> None:
    lengths = {row: 20 + row % 37 for row in range(500)}
    for ranks in (1, 2, 3):
        batches = cut_batches(lengths, ranks, max_tokens=1000, max_new_tokens=8)
        assert sorted(row for rows in batches for row in rows) == list(range(500))
        assert all(len(rows) * (max(lengths[row] for row in rows) + 8) <= 1000 for rows in batches)
        assert len(batches) % ranks == 0
    assert max(map(len, cut_batches(lengths, 1, max_tokens=10**9, max_new_tokens=8))) <= MAX_BATCH
    assert cut_batches({3: 5000}, 4, max_tokens=10, max_new_tokens=1) == [[3]]  # alone, where even one is over
    assert cut_batches({}, 2, max_tokens=10, max_new_tokens=1) == []


def test_preference_counts_a_tie_as_half() -> None:
    records = np.zeros(4, dtype=PAIR_RECORD)
    records["chosen_logp"], records["rejected_logp"] = [-1, -2, -4, -6], [-2, -2, -3, -4]
    records["chosen_tokens"], records["rejected_tokens"] = [1, 2, 4, 3], [1, 2, 2, 2]
    assert preferred(records).tolist() == [1, 0.5, 0, 0]
    assert preferred_per_token(records).tolist() == [1, 0.5, 1, 0.5]


def test_compare_pairs_rows_and_refuses_other_sets() -> None:
    def outcomes(rows: list[int], values: list[float], salt: int = 0) -> dict[str, np.ndarray]:
        groups = np.array(rows, dtype=np.uint64) + np.uint64(salt)
        return {PREFERENCE: np.array(values), f"{PREFERENCE}/row": np.array(rows), f"{PREFERENCE}/group": groups}

    before, after = outcomes([1, 2, 5, 9], [0, 0, 1, 1]), outcomes([2, 5, 9, 11], [1, 1, 1, 0])
    found = compare(before, after, PREFERENCE)
    assert found is not None and found.value == pytest.approx(1 / 3)
    assert compare(before, outcomes([2, 5, 9], [1, 1, 1], salt=1), PREFERENCE) is None
    assert compare(before, {}, PREFERENCE) is None
