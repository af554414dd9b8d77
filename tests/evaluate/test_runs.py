"""Evaluation inside runs: exact over ranks, the same with gathered and with partitioned weights, and without effect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pivot.evaluate.outcomes import compare, read_outcomes
from pivot.evaluate.preference import PREFERENCE
from pivot.evaluate.vqa import VQA
from pivot.report import write_report
from tests.kit.answered import make_answered_set
from tests.kit.commands import ROOT, rank_free_environment
from tests.kit.ranks import run_ranks
from tests.kit.tiny import tiny_llava

NUM_SAMPLES = 21


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_llava(folder / "llava")
    make_answered_set(folder, "train", 24)
    make_answered_set(folder, "held-out", 30, first_image=1000)
    for num_ranks in (1, 2):
        run_ranks("tests.kit.ranks.scenarios_evaluate:runs", num_ranks, folder)
    return folder


def evaluations(runs: Path, name: str) -> dict[int, dict[str, Any]]:
    """Step -> the metrics of its evaluation."""
    lines = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line.get("event") == "eval"]
    return {row["step"]: {k: v for k, v in row.items() if k.startswith("eval/")} for row in rows}


def answers(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / name / "samples.jsonl").read_text().splitlines()]


def test_evaluated_before_at_every_second_step_and_at_the_end(runs: Path) -> None:
    found = evaluations(runs, "gathered-2")
    assert sorted(found) == [0, 2, 3]
    assert set(found[0]) >= {"eval/loss", PREFERENCE, f"{PREFERENCE}_per_token", "eval/rewards/accuracies", VQA}
    assert found[0]["eval/num_samples"] == NUM_SAMPLES
    assert found[0]["eval/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert found[0]["eval/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert found[3]["eval/rewards/margins"] != found[0]["eval/rewards/margins"]


@pytest.mark.parametrize("name", ["gathered-2", "in-step"])
def test_equal_on_one_rank_and_on_two(runs: Path, name: str) -> None:
    """Uneven shares of uneven pairs: a mean of the ranks' means would differ in the second digit."""
    for step, expected in evaluations(runs, "gathered-1").items():
        assert evaluations(runs, name)[step] == pytest.approx(expected, abs=2e-4), step
    assert answers(runs, name) == answers(runs, "gathered-1")
    for step in (0, 3):
        rows = read_outcomes(runs / name, step)[f"{PREFERENCE}/row"]
        assert len(set(rows.tolist())) == len(rows) == NUM_SAMPLES


def test_evaluating_changes_nothing_in_training(runs: Path) -> None:
    silent = load_file(runs / "silent/export/model.safetensors")
    for name in ("gathered-2", "in-step"):
        found = load_file(runs / name / "export/model.safetensors")
        assert all(torch.equal(found[key], silent[key]) for key in silent), name
    assert not (runs / "silent/samples.jsonl").exists()


def test_the_command_gives_the_numbers_of_the_loop(runs: Path, tmp_path: Path) -> None:
    """From the export alone, another program, another token budget."""
    command = [sys.executable, "launch/evaluate.py", "held-out", "--data", str(runs / "held-out")]
    command += ["--model", f"start={runs / 'llava'}", "--model", f"dpo={runs / 'gathered-1'}"]
    command += ["--cache-dir", str(tmp_path), "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=rank_free_environment())
    assert done.returncode == 0, done.stderr
    assert "preference accuracy" in done.stdout and "less start" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    for name, step in (("start", 0), ("dpo", 3)):
        expected = evaluations(runs, "gathered-1")[step]
        metrics = found["models"][name]["metrics"]
        assert {PREFERENCE, f"{PREFERENCE}_per_token", VQA} <= metrics.keys()
        assert metrics == pytest.approx({key: expected[key] for key in metrics}, abs=1e-6)
        expected_answers = [row["generated"] for row in answers(runs, "gathered-1") if row["step"] == step]
        assert [answer["generated"] for answer in found["models"][name]["answers"]] == expected_answers
    before, after = (read_outcomes(runs / "gathered-1", step) for step in (0, 3))
    assert found["differences"][PREFERENCE]["dpo"] == pytest.approx(list(compare(before, after, PREFERENCE) or ()))


def test_every_run_has_a_report(runs: Path) -> None:
    for name in ("gathered-2", "silent", "sft"):
        assert "<svg" in write_report(runs / name).read_text()


def test_sft_reports_preference_accuracy_too(runs: Path) -> None:
    found = evaluations(runs, "sft")
    assert sorted(found) == [0, 3]
    dpo = evaluations(runs, "gathered-2")[0]
    for name in (PREFERENCE, VQA, "eval/logps/chosen"):
        assert found[0][name] == pytest.approx(dpo[name], abs=1e-4)
    assert "eval/rewards/accuracies" not in found[0]
    outcomes = read_outcomes(runs / "sft", 0)
    assert outcomes[VQA].mean() == found[0][VQA]
    assert compare(outcomes, outcomes, VQA) == (0, 0, 0)
