"""Laws of whole KTO and AOT runs: one rank or two, cut small or not, and a restart, give the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pivot.report import write_report
from tests.kit.ranks import run_ranks
from tests.kit.sets import make_answer_set, make_set
from tests.kit.tiny import tiny_llava

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test waits for all ranks of the file


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_llava(folder / "llava")
    make_set(folder)
    make_answer_set(folder)
    make_answer_set(folder, "held-out", 12)
    for num_ranks in (1, 2):
        run_ranks("tests.kit.ranks.scenarios_kto:everything", num_ranks, folder, limit_s=600)
    return folder


def rows(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]


def steps(runs: Path, name: str) -> dict[int, dict[str, Any]]:
    """Step -> its row without what a clock decides."""
    found = [row for row in rows(runs, name) if "step" in row and "event" not in row]
    return {row["step"]: {k: v for k, v in row.items() if not k.startswith("perf/")} for row in found}


def evaluations(runs: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in rows(runs, name) if row.get("event") == "eval"]


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(runs / name / "export" / "model.safetensors")


@pytest.mark.parametrize("name", ["kto", "pairs", "trees", "aot"])
def test_one_rank_and_two_that_cut_their_steps_train_the_same(runs: Path, name: str) -> None:
    """Loss, rewards, KL and weights; 2e-4 relative, as for other runs in another packing (test_train.py)."""
    one, two = steps(runs, f"{name}-1"), steps(runs, f"{name}-2")
    for step, wanted in one.items():
        shared = wanted.keys() & two[step].keys()
        assert shared >= {"loss", "rewards/chosen", "rewards/rejected"} and ("kl" in shared) == (name != "aot")
        for key in shared:
            assert two[step][key] == pytest.approx(wanted[key], rel=2e-3, abs=2e-5), (step, key)
    for one_held_out, two_held_out in zip(evaluations(runs, f"{name}-1"), evaluations(runs, f"{name}-2"), strict=True):
        for key in ("eval/loss", "eval/rewards/chosen", "eval/rewards/rejected"):
            assert two_held_out[key] == pytest.approx(one_held_out[key], rel=2e-3, abs=2e-5), key
    wanted, found = weights(runs, f"{name}-1"), weights(runs, f"{name}-2")
    assert max(float((found[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted) < 2e-4


def test_first_loss_is_that_of_equal_models(runs: Path) -> None:
    """16 of 24 answers are good, at weight 1, the others at 1.5: each loss is a half of its weight. AOT: ln 2 for both
    answers' log ratios, and a little less or more for margins that are sorted, since they are the reference's own."""
    first = steps(runs, "kto-2")[1]
    assert 0.5 <= first["loss"] <= 0.75 and (first["loss"] * 8 - 4) % 0.25 == pytest.approx(0, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert steps(runs, "pairs-2")[1]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert steps(runs, "aot-2")[1]["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_a_resumed_run_is_bit_by_bit_the_unbroken_one(runs: Path) -> None:
    """The KL of step 2 comes back with its checkpoint."""
    assert steps(runs, "resumed") == {step: steps(runs, "kto-2")[step] for step in (3, 4)}
    wanted, found = weights(runs, "kto-2"), weights(runs, "resumed")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_it_learns(runs: Path) -> None:
    """Good answers gain on the reference and bad ones lose, on what is trained on and on held-out pictures; the loss
    falls from a half; and the KL is measured."""
    learned = steps(runs, "learned")
    assert learned[1]["loss"] == pytest.approx(0.5, abs=1e-5) and learned[30]["loss"] < 0.4
    assert learned[30]["rewards/chosen"] > 0.1 > -0.1 > learned[30]["rewards/rejected"]
    assert any(row["kl"] > 0.05 for row in learned.values())
    held_out = evaluations(runs, "learned")
    assert held_out[0]["eval/loss"] == pytest.approx(0.5, abs=1e-5)
    assert held_out[-1]["eval/rewards/chosen"] > held_out[-1]["eval/rewards/rejected"]
    assert "eval/kl" not in held_out[-1]
    assert "rejected" in held_out[-1]["skipped"]["eval/preference_accuracy"]


def test_the_report_shows_the_kl(runs: Path) -> None:
    page = write_report(runs / "learned").read_text()
    assert "KTO" in page and "what KTO measures gains from" in page
