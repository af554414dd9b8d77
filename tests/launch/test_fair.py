"""launch/fair.py: equal grids, a choice that the report never sees, fresh seeds; once with real runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pivot.config import REPOSITORY
from tests.kit.answered import make_answered_set
from tests.kit.commands import rank_free_environment
from tests.kit.runs import make_run, write_dpo_run

sys.path.insert(0, str(REPOSITORY / "launch"))  # as for a script
import fair
import sweep

KEY = "eval/preference_accuracy"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = rank_free_environment() | {"DS_ACCELERATOR": "cpu", "NPROC": "1"}
    command = [sys.executable, "launch/fair.py", *words]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def test_an_arm_may_have_values_of_its_own_if_they_are_as_many() -> None:
    arms = fair.parse_arms(["sft=a.yaml", "dpo=b.yaml"])
    grids = fair.grids_of(arms, ["sft:optim.lr=1,2", "dpo:optim.lr=3,4", "train.global_batch_size=8"])
    assert grids["sft"] == {"optim.lr": ["1", "2"], "train.global_batch_size": ["8"]}
    assert grids["dpo"] == {"optim.lr": ["3", "4"], "train.global_batch_size": ["8"]}
    with pytest.raises(ValueError, match=r"unequally many tries \(sft 2, dpo 1\)"):
        fair.grids_of(arms, ["sft:optim.lr=1,2", "dpo:optim.lr=3"])
    with pytest.raises(ValueError, match="there is no arm mpo"):
        fair.grids_of(arms, ["mpo:optim.lr=1,2"])
    with pytest.raises(ValueError, match="seeds are not chosen"):
        fair.grids_of(arms, ["train.seed=1,2"])


def test_the_best_is_the_highest_accuracy_and_the_lowest_loss(tmp_path: Path) -> None:
    cells = sweep.make_cells({"optim.lr": ["1", "2", "3"]}, tmp_path)
    for cell, skill in zip(cells, (0.6, 0.9, 0.7), strict=True):
        make_run(cell.folder, "dpo", [], held_out="held", skill=(0.5, skill))
    best, scores = fair.choose(cells, KEY)
    assert best is cells[1] and len(scores) == 3
    with pytest.raises(ValueError, match="did not measure it"):
        fair.choose(cells, "eval/nothing")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_arms_are_chosen_on_one_set_and_reported_on_another(tmp_path: Path) -> None:
    write_dpo_run(tmp_path)
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "sft.yaml").write_text(text.replace("objective: {dpo: {}}", "objective: {sft: {}}"))
    for name, first in (("choose", 100), ("report", 200)):
        make_answered_set(tmp_path, name, 6, first_image=first)
    words = [f"sft={tmp_path}/sft.yaml", f"dpo={tmp_path}/run.yaml", "--grid", "optim.projector.lr=1e-3,1e-4"]
    words += ["--choose-on", f"{tmp_path}/choose", "--seeds", "11", "--out", str(tmp_path / "out")]
    same = run(*words, "--report-on", f"{tmp_path}/choose")
    assert same.returncode == 2 and "hold the same samples" in same.stderr
    done = run(*words, "--report-on", f"{tmp_path}/report")
    assert done.returncode == 0, done.stderr
    chosen = json.loads((tmp_path / "out" / "chosen.json").read_text())
    assert chosen.keys() == {"sft", "dpo"} and all(len(arm["scores"]) == 2 for arm in chosen.values())
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["train.seed"]) for row in rows] == [("sft", "11"), ("dpo", "11")]
    config = (tmp_path / "out" / "report" / "dpo,seed=11" / "config.yaml").read_text()
    assert f"{tmp_path}/report" in config and f"{tmp_path}/choose" not in config
