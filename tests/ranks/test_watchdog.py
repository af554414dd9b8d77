"""On two ranks: a straggler is named, and a signal to a rank that waits stops the one that works alone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.kit.ranks import run_ranks
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watchdog")
    tiny_llava(folder / "llava")
    make_set(folder)
    return folder


@pytest.mark.slow
def test_a_straggler_is_named_once(folder: Path) -> None:
    run_ranks("tests.kit.ranks.scenarios_watchdog:slow_rank", 2, folder)
    rows = [json.loads(line) for line in (folder / "slow/log.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row.get("event") == "straggler"]
    assert row["rank"] == 1 and row["host"] == socket.gethostname()
    assert row["busy_s"] > 1.2 and row["busy_s"] > 1.25 * row["median_busy_s"]
    assert f"straggler  rank 1 on {row['host']} works" in (folder / "slow_rank-rank0.log").read_text()


@pytest.mark.slow
def test_a_signal_to_a_rank_that_waits_stops_the_counting(folder: Path) -> None:
    """Between two samples: rank 0 would count 48 s."""
    run_ranks("tests.kit.ranks.scenarios_watchdog:counting", 2, folder)
    told = [json.loads((folder / f"counting-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["code"] for each in told] == [75, 75]
    assert 0 < told[0]["counted"] < 12 and told[1]["counted"] == 0
    output = (folder / "counting-rank0.log").read_text()
    assert "stopped    by SIGTERM on rank 1 before there was anything to save" in output
    assert not (folder / "counting" / "status").exists()
