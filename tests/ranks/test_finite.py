"""Laws of what is not finite: it changes nothing, on no rank, on no stage, and no checkpoint holds it or makes room."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.kit.ranks import run_ranks
from tests.kit.ranks.scenarios_finite import CASES, CLIPPING
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

pytestmark = pytest.mark.timeout(900)  # the first test waits for all ranks of the file
WORLDS = (1, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finite")
    tiny_llava(folder / "llava")
    make_set(folder)
    run_ranks("tests.kit.ranks.scenarios_finite:steps", 1, folder, limit_s=400)
    run_ranks("tests.kit.ranks.scenarios_finite:everything", 2, folder, limit_s=600)
    return folder


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize(("stage", "bf16"), CASES)
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(
    results: Path, stage: int, bf16: bool, clipping: float, world: int
) -> None:
    """Bit by bit, for one element of the last rank's gradient; and the next step is as if it had never been."""
    for rank in range(world):
        found = torch.load(results / f"stage{stage}-{bf16}-{clipping}-{world}-{rank}.pt", weights_only=True)
        one, other = found["good steps"]["metrics"]
        assert one == other and one["skipped_steps"] == 0 and one["grad_norm"] > 0
        assert found.pop("good steps")["same"]
        assert len(found) == 6
        for name, case in found.items():
            assert case["same"], f"{name}, rank {rank}"
            assert case["metrics"]["skipped_steps"] == 1
            assert case["metrics"].get("grad_norm", math.inf) == math.inf


def rows(results: Path, name: str) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in (results / name / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in found if "event" not in row}


def said(results: Path, name: str) -> list[str]:
    first, second = ((results / f"{name}-{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first == second
    return first


def events(results: Path, name: str, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (results / name / "log.jsonl").read_text().splitlines()]
    return [row for row in found if row.get("event") == kind]


def skipped(results: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / name / "skipped.jsonl").read_text().splitlines()]


def checkpoints(results: Path, name: str) -> dict[int, dict[str, Any]]:
    """Step -> the objective's state."""
    folders = sorted((results / name / "checkpoints").glob("step-*"))
    return {int(f.name[5:]): json.loads((f / "state.json").read_text())["objective"] for f in folders}


def assert_finite(results: Path, name: str) -> None:
    assert all(value.isfinite().all() for value in load_file(results / name / "export" / "model.safetensors").values())


@pytest.mark.parametrize("name", ["one step", "one step of ZeRO-2"])
def test_a_run_gets_over_one_such_step(results: Path, name: str) -> None:
    """BCO's running shift takes nothing from it: five rewards of six steps, all finite."""
    assert said(results, name) == ["done"]
    found = rows(results, name)
    assert found[4]["loss"] is not None and math.isfinite(found[6]["loss"])
    states = checkpoints(results, name)
    assert list(states) == [5, 6]
    assert states[6]["num_steps"] == 5 and math.isfinite(states[6]["bco_shift"])
    assert_finite(results, name)


def test_three_of_them_end_the_run_and_it_can_go_on(results: Path) -> None:
    ended, again = said(results, "three steps")
    assert "3 steps in a row" in ended and again == "done"
    assert rows(results, "three steps")[4]["loss"] is None
    assert checkpoints(results, "three steps")[6]["num_steps"] == 4  # steps 1, 2, 5 and 6
    assert_finite(results, "three steps")


def test_weights_that_are_not_finite_are_not_saved_and_push_nothing_out(results: Path) -> None:
    """They were spoilt behind step 3, on one rank: steps 1 and 2 stayed, and the run went on from there."""
    ended, again = said(results, "weights")
    assert "after step 3 the weights or the optimizer's moments are not finite, so nothing was saved" in ended
    assert again == "done"
    assert (
        f"resumed from {results / 'weights/checkpoints/step-00000002'}"
        in (results / "everything-rank0.log").read_text()
    )
    assert_finite(results, "weights")


def test_a_skipped_step_is_put_down_to_the_samples_of_the_rank_that_spoilt_it(results: Path) -> None:
    """Step 3 holds six pairs; the last rank's share of them had NaN as log-probs. The log, which has every second step,
    has no row of it but an event; on both stages the same samples are named."""
    for name in ("one step", "one step of ZeRO-2"):
        (event,) = events(results, name, "skipped")
        lines = skipped(results, name)
        assert (event["step"], event["reason"], event["ranks"]) == (3, "loss", [1])
        assert event["hosts"] == [socket.gethostname()] and event["num_samples"] == len(lines)
        assert 1 <= len(lines) < 6
        assert {(line["step"], line["reason"], line["rank"], line["host"]) for line in lines} == {
            (3, "loss", 1, socket.gethostname())
        }
    assert skipped(results, "one step") == skipped(results, "one step of ZeRO-2")


def test_of_a_gradient_that_is_not_finite_the_whole_step_is_named_by_rank(results: Path) -> None:
    """Every log-prob was finite, and so is the loss that the log has of the step."""
    assert said(results, "gradient") == ["done"]
    (event,) = events(results, "gradient", "skipped")
    lines = skipped(results, "gradient")
    assert (event["step"], event["reason"], event["ranks"], event["num_samples"]) == (3, "gradient", [0, 1], 6)
    assert {line["reason"] for line in lines} == {"gradient"} and len(lines) == 6
    assert {line["rank"] for line in lines} == {0, 1}
    assert len({(line["shard"], line["ordinal"]) for line in lines}) == 6


def test_the_end_names_the_file_and_how_many_samples(results: Path) -> None:
    """The start that went on made step 5 again, without the fault: its samples are no longer among them."""
    ended, _ = said(results, "three steps")
    path = results / "three steps" / "skipped.jsonl"
    named = int(ended.partition(f"{path} names the ")[2].split()[0])
    lines = skipped(results, "three steps")
    assert (
        {line["step"] for line in lines}
        == {3, 4}
        == {event["step"] for event in events(results, "three steps", "skipped")}
    )
    assert named > len(lines) and "lower the learning rates" in ended


def test_a_spike_is_told_with_its_samples_and_a_resumed_run_tells_the_same(results: Path) -> None:
    """The last rank's log-probs were 50 times as large in step 5; the second run is the first, gone on from step 4."""
    assert said(results, "spike") == said(results, "spike again") == ["done"]
    (event,) = events(results, "spike", "spike")
    assert event["step"] == 5 and event["loss"] > event["limit"] > event["median"]
    own = [sample["loss"] for sample in event["samples"]]
    assert len(own) == 6 and own == sorted(own, reverse=True) and own[0] > event["limit"]
    assert events(results, "spike again", "spike") == [event]
    output = (results / "everything-rank0.log").read_text()
    assert output.count("spike      step 5: loss ") == 2
