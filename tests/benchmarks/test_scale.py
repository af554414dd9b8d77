"""`benchmarks/scale.py` at a tiny size: every table is there and says what the code does."""

from __future__ import annotations

import sys
from pathlib import Path

from pivot.config import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from scale import FILES_PER_RANK, SAMPLES_PER_SHARD, measure, show  # scripts, not a package


def test_a_rank_opens_each_file_once_and_takes_over_its_part_alone(tmp_path: Path) -> None:
    pairs, shards = 2 * SAMPLES_PER_SHARD, 2
    found = measure(tmp_path, ranks=[1, 4], pairs=[pairs], batches=[8], parameters=1000)
    start = {row["what"]: (row["opens"], row["stats"]) for row in found["a rank's start"]}
    assert start["manifest and index"] == (shards + 1, shards + 1)  # the manifest; each tar is only looked at
    assert start["token counts"] == start["reference"] == (shards, 0)
    assert start["plan"] == start["references: none is missing"] == (0, 0)
    assert [row["files"] for row in found["a checkpoint's way back"]] == [FILES_PER_RANK, 4 * FILES_PER_RANK]
    takeover = found["a takeover by other ranks"][1]  # written by 4 ranks, read by one of 5: master and two moments
    assert takeover["own_mb"] * 1e6 == 200 * 3 * 4 and takeover["all_mb"] * 1e6 == 1000 * 3 * 4
    assert all(row["max/mean"] >= 1 for row in found["a step's plan"])
    assert all(len(show(title, rows).splitlines()) == len(rows) + 4 for title, rows in found.items())
