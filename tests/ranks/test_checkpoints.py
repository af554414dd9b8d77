"""Checkpoints of every stage: loaded back bit by bit by a torch.load that runs nothing, and payloads refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.kit.ranks import run_ranks
from tests.kit.ranks.scenarios_checkpoints import CANARY, CASES
from tests.kit.tiny import tiny_llava

pytestmark = pytest.mark.timeout(900)
# Large enough for what is no weight (names, shapes, padding: some 40 KB a rank) to be small beside it.
SHAPE = {"hidden_size": 128, "intermediate_size": 512}


@pytest.fixture(scope="module", params=[1, 2])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_llava(folder / "llava", text_changes=SHAPE)
    run_ranks("tests.kit.ranks.scenarios_checkpoints:everything", request.param, folder)
    texts = [(folder / f"checkpoints-{request.param}-{rank}.json").read_text() for rank in range(request.param)]
    return [json.loads(text) | {"canary": (folder / CANARY).exists()} for text in texts]


@pytest.mark.parametrize(("stage", "bf16", "optimizer"), CASES)
def test_what_was_saved_comes_back(found: list[dict[str, Any]], stage: int, bf16: bool, optimizer: str) -> None:
    """Weights, and moments and masters as the next step shows them."""
    for rank in found:
        case = rank[f"{stage}-{bf16}-{optimizer}"]
        assert case["equal"] and case["goes on equal"] and case["environment"]


@pytest.mark.parametrize(("stage", "bf16", "optimizer"), CASES)
def test_the_room_for_a_checkpoint_is_that_of_its_files(
    found: list[dict[str, Any]], stage: int, bf16: bool, optimizer: str
) -> None:
    """Else a disk would be found full in a save, or a run be kept from a disk that has room."""
    case = found[0][f"{stage}-{bf16}-{optimizer}"]
    assert 0.9 * case["bytes"] < case["estimate"] < 1.1 * case["bytes"]


def test_a_payload_is_refused_and_inert(found: list[dict[str, Any]]) -> None:
    """In each file of each rank; all ranks stop together, and the one that looked into the file says what is there."""
    files = set(found[0]["planted"])
    assert len(files) == 3 * len(found) + 2 * (len(found) == 1)
    for name in files:
        texts = [rank["planted"][name] for rank in found]
        assert not any("it was loaded" in text for text in texts), texts
        assert sum("mkdir, which training never writes there" in text for text in texts) or "unasked" in name
        assert all("mkdir" in text or text.startswith("ValueError") for text in texts), texts
    assert not any(rank["canary"] for rank in found)
