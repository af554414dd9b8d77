"""Parts of a checkpoint's parameters, whatever number of ranks wrote them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pivot.config import REPOSITORY
from pivot.engine.files import MASTER, SavedShards

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from scale import write_zero3_shards  # scripts, not a package


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_part_is_read_and_nothing_else(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value is its place in the group: 35 of `first`, then 3 of `second` (of which some ranks have none)."""
    write_zero3_shards(tmp_path / "written", {"first": (5, 7), "second": (3,)}, ranks)
    saved = SavedShards(tmp_path / "written")
    assert saved.holds_weights("second") and not saved.holds_weights("third")
    assert saved.read("second", "exp_avg").tolist() == [35.25, 36.25, 37.25]
    read: list[int] = []
    piece = SavedShards._piece

    def count(self: SavedShards, span, kind: str) -> Tensor:
        read.append(span.size)
        return piece(self, span, kind)

    monkeypatch.setattr(SavedShards, "_piece", count)
    for part in (slice(0, 35), slice(0, 1), slice(11, 13), slice(30, 40), slice(35, 42), slice(4, 4)):
        expected = torch.arange(35.0)[part]
        assert torch.equal(saved.read("first", MASTER, part), expected)
        assert sum(read) == len(expected)
        read.clear()
