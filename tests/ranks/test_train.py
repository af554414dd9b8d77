"""Laws of whole runs, on two ranks under ZeRO-3: an interrupted run ends as the unbroken one, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.kit.ranks import run_ranks
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

pytestmark = pytest.mark.timeout(900)  # the first test waits for all ranks of the file


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_llava(folder / "llava")
    make_set(folder)
    run_ranks("tests.kit.ranks.scenarios_train:everything", 2, folder, limit_s=600)
    return folder


def rows(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]


def steps(runs: Path, name: str) -> dict[int, dict[str, Any]]:
    """Step -> its row without what a clock decides."""
    found = [row for row in rows(runs, name) if "step" in row and "event" not in row]
    return {row["step"]: {k: v for k, v in row.items() if not k.startswith("perf/")} for row in found}


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(runs / name / "export" / "model.safetensors")


@pytest.mark.parametrize("name", ["resumed", "damaged"])
def test_resumed_run_equals_the_unbroken_one(runs: Path, name: str) -> None:
    """AdamW's moments, BCO's running shift, the schedule and the order of the data all come back."""
    expected, found = weights(runs, "unbroken"), weights(runs, name)
    assert expected.keys() == found.keys()
    if name == "damaged":  # same micro-batches: bit by bit
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert steps(runs, name) == {step: steps(runs, "unbroken")[step] for step in (3, 4, 5)}
    else:  # cut by another token budget: the same sums in another order
        worst = max(float((found[key] - expected[key]).norm() / expected[key].norm()) for key in expected)
        assert worst < 2e-4


def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(runs: Path) -> None:
    output = (runs / "everything-rank0.log").read_text()
    assert "step-00000004 is damaged and is not used" in output
    assert "resumed from " + str(runs / "damaged/checkpoints/step-00000002") in output


def test_a_finished_run_trains_nothing(runs: Path) -> None:
    assert "this run is finished: 5 steps done" in (runs / "everything-rank0.log").read_text()
    assert len([row for row in rows(runs, "damaged") if row.get("event") == "start"]) == 1


def test_nothing_is_compiled(runs: Path) -> None:
    """DeepSpeed says so when it has: the runs, ZeRO-3 among them, need no compiler."""
    assert "built successfully" not in (runs / "everything-rank0.log").read_text()


def test_the_terminal_shows_our_lines_alone(runs: Path) -> None:
    """No warning of torch, transformers or DeepSpeed, from any rank, in a start, a save, a resume and an export.

    Our own begin with the word.
    """
    for rank in (0, 1):
        output = (runs / f"everything-rank{rank}.log").read_text()
        assert not [
            line for line in output.splitlines() if "warning" in line.lower() and not line.startswith("warning: ")
        ]


def test_first_loss_is_that_of_equal_models(runs: Path) -> None:
    """0.8 ln 2 for sigmoid, 0.2 * 2 ln 2 for BCO (two terms at reward 0), and the NLL as measured on its own."""
    row = steps(runs, "unbroken")[1]
    assert row["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert row["loss/sigmoid"] == pytest.approx(0.693147, abs=1e-5)
    assert row["loss"] == pytest.approx(
        0.8 * row["loss/sigmoid"] + 0.2 * row["loss/bco_pair"] + row["loss/sft"], rel=1e-5
    )


def test_log_holds_what_a_reader_looks_for(runs: Path) -> None:
    start, first = rows(runs, "unbroken")[:2]
    assert start["event"] == "start"
    assert (start["world_size"], start["zero_stage"]) == (2, 3)
    assert start["attention"].startswith("sdpa (")
    assert start["num_persistent_parameters"] == 0
    assert set(start["num_parameters"]) == {"vision_tower", "projector", "language_model"}
    assert {"torch", "transformers", "pivot", "deepspeed"} <= set(start["versions"])
    for component, rate in {"vision_tower": 2e-4, "projector": 1e-3, "language_model": 5e-4}.items():
        assert first[f"lr/{component}"] == pytest.approx(rate)
        assert first[f"grad_norm/{component}"] > 0
        assert first[f"update_ratio/{component}"] > 0
    assert start["matmul_tflops"] > 0
    for name in ("pairs_per_s", "tokens_per_s", "data_wait_ratio", "peak_memory_gib", "mfu"):
        assert first[f"perf/{name}"] > 0
    assert 0 < first["perf/row_fill"] <= 1
    assert first["perf/mfu"] < 1


def test_a_stop_on_one_rank_stops_all_with_a_checkpoint(runs: Path) -> None:
    for rank in (0, 1):
        assert (runs / f"stopped-{rank}.txt").read_text() == "preempted ['step-00000002']"
    expected, found = weights(runs, "unbroken"), weights(runs, "stopped")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_costs_are_counted_over_resumes(runs: Path) -> None:
    """5 steps of 6 pairs; the rows' tokens and useful FLOPs as those of the run that was never stopped."""
    whole, parts = (rows(runs, name)[-1] for name in ("unbroken", "stopped"))
    assert whole["event"] == parts["event"] == "end"
    assert whole["pairs"] == parts["pairs"] == 30
    for name in ("tokens", "flops"):
        assert parts[name] == whole[name] > 0
    assert parts["core_hours"] > 0 and "gpu_hours" not in parts
    assert whole["compare"] == {}
    ratios = {"flops": whole["flops"] / 1e12, "samples": 0.01}  # core-hours are no part of GPU-hours
    assert parts["compare"] == {"name": "a pre-training"} | {k: pytest.approx(v) for k, v in ratios.items()}
    assert "beside a pre-training: " in (runs / "everything-rank0.log").read_text()


def test_a_trace_holds_operators(runs: Path) -> None:
    """Steps 3 and 4 of the process that made three: so the third alone, on each rank; written though the run ended."""
    for rank in (0, 1):
        trace = json.loads((runs / "stopped" / "profile" / f"rank{rank}.json").read_text())
        names = {event.get("name") for event in trace["traceEvents"] if event.get("cat") == "cpu_op"}
        assert {"aten::mm", "aten::scaled_dot_product_attention"} <= names
    assert not (runs / "unbroken" / "profile").exists()


def test_the_reference_command_leaves_training_nothing_to_compute(runs: Path) -> None:
    """Values as those that training's own ZeRO-3 engine made, under the same fingerprint."""
    text = (runs / "everything-rank0.log").read_text()
    parts = {name: part for name, _, part in (p.partition("\n") for p in text.split("--- ")[1:])}
    assert "reference log-probs: 24 of 24 pairs" in parts["the command"]
    for name in ("the command again", "a run behind it"):
        assert "reference log-probs" not in parts[name]
    assert "complete   training set" in parts["the command again"]
    own = sorted((runs / "cache" / "ref").rglob("*.npy"))
    assert own and not [path for path in own if "tokens" in path.name]
    for path in own:
        found = np.load(runs / "scored-cache" / path.relative_to(runs / "cache"))
        expected = np.load(path)
        for name in expected.dtype.names:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4)


def test_other_settings_are_refused_by_name(runs: Path) -> None:
    for rank in (0, 1):
        message = (runs / f"other rate-{rank}.txt").read_text()
        assert "optim.projector.lr was 0.001, is 0.002" in message


def test_a_reference_that_is_not_the_start_is_refused(runs: Path) -> None:
    """beta * 2e-3 nat is twice the tolerance; nothing was updated, so no checkpoint and no step in the log."""
    for rank in (0, 1):
        message = (runs / f"spoilt reference-{rank}.txt").read_text()
        assert "start-up self-check: the reward margin of a pair is 0.0002" in message
    assert not list((runs / "spoilt" / "checkpoints").glob("step-*"))
    assert not steps(runs, "spoilt")


def test_tensorboard_is_written_when_asked_for(runs: Path) -> None:
    assert list((runs / "first" / "tensorboard").glob("events.out.*"))
    assert not (runs / "unbroken" / "tensorboard").exists()


def test_a_missing_checkpoint_is_refused(runs: Path) -> None:
    assert "holds no checkpoint to go on from" in (runs / "nothing to resume-0.txt").read_text()
    assert not (runs / "fresh").exists()


def test_a_missing_reference_is_refused(runs: Path) -> None:
    assert "nowhere" in (runs / "no such reference-0.txt").read_text()
    assert not (runs / "also-fresh").exists()


@pytest.mark.parametrize(
    ("case", "difference"),
    [
        ("ranks that differ", "optim.projector.lr is 0.001 on rank 0 and 0.002 on rank 1"),
        ("ranks that stop at other steps", "train.max_steps is 2 on rank 0 and 3 on rank 1"),
    ],
)
def test_ranks_with_other_settings_are_refused_on_all(runs: Path, case: str, difference: str) -> None:
    for rank in (0, 1):
        message = (runs / f"{case}-{rank}.txt").read_text()
        assert message == (
            f"the ranks have different settings ({difference}); start all of them with the same command line and the "
            "same files"
        )
    assert not (runs / "fresh").exists()
