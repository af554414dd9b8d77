"""The first screen of a run on two ranks: measured once, checked for both."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.kit.ranks import run_ranks
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("screens")
    tiny_llava(folder / "llava")
    make_set(folder)
    run_ranks("tests.kit.ranks.scenarios_screen:screens", 2, folder)
    return [json.loads((folder / f"screens-{rank}.json").read_text()) for rank in range(2)]


def test_rank_0_measures_for_both(found: list[dict[str, Any]]) -> None:
    assert [rank["measured"] for rank in found] == [1, 0]
    assert found[0]["screen"] == found[1]["screen"] and "activations" in found[0]["screen"]


def test_a_rank_with_too_little_memory_is_refused_on_all_and_named(found: list[dict[str, Any]]) -> None:
    assert found[0]["little"] == found[1]["little"]
    said = f"GiB a rank and the machine of {socket.gethostname()} has 6e-08"
    assert found[0]["little"].startswith("ConfigError: deepspeed: on ZeRO stage 3 and 2 rank(s)")
    assert said in found[0]["little"]


def test_a_measurement_that_fails_leaves_no_rank_waiting(found: list[dict[str, Any]]) -> None:
    assert found[0]["failed"] == "RuntimeError: no such kernel"
    assert found[1]["failed"].startswith("FailedElsewhere: working out what memory the run takes failed on rank 0")
