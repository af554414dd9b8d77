"""`launch/train_kto.py` and what a start refuses; `launch/reference.py` for a KTO run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.pack import PackOptions, pack
from launch.command import main, make_references
from pivot.config import REPOSITORY
from tests.kit.commands import rank_free_environment
from tests.kit.sets import answer_rows, make_answer_set, make_set, write_rows
from tests.kit.tiny import tiny_llava

RUN = """
output_dir: {folder}/run
init_from: {folder}/llava
data: {{train: {folder}/answers, cache_dir: {folder}/cache, workers: 0}}
objective: {{{objective}: {{}}}}
optim: {{vision_tower: {{lr: 1e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 1e-4}}}}
train: {{global_batch_size: 4, max_steps: 1}}
deepspeed: ds_configs/zero0.json
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kto")
    tiny_llava(folder / "llava")
    make_answer_set(folder)
    for objective in ("kto", "dpo", "sft"):
        (folder / f"{objective}.yaml").write_text(RUN.format(folder=folder, objective=objective))
    return folder


def refusal(objective: str, folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert main(objective, [str(folder / f"{objective}.yaml"), "--check", *overrides]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_single_answers_are_refused_by_other_objectives(
    folder: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    told = refusal(objective, folder, capsys)
    assert "data.train: answers is of kind unpaired" in told and "launch/train_kto.py" in told


def test_a_set_of_good_answers_alone_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, images = answer_rows(9)
    source = write_rows(folder / "good-source", [row | {"label": True} for row in rows], images)
    pack(PackOptions(source=source, out=folder / "good", name="good"))
    told = refusal("kto", folder, capsys, f"data.train={folder}/good")
    assert "data.train: 9 answers are desirable and 0 are not, but KTO needs both" in told


def test_another_scripts_yaml_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("dpo", [str(folder / "kto.yaml")]) == 2
    assert "objective.kto is given, but this script trains dpo; run launch/train_kto.py" in capsys.readouterr().err


def test_a_check_shows_samples_and_loads_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("kto", [str(folder / "kto.yaml"), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "24 of 24 samples; excluded: none" in shown and "1 of 4 samples" in shown


def test_pairs_will_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(folder)
    assert main("kto", [str(folder / "kto.yaml"), "--check", f"data.train={folder}/set"]) == 0


def test_references_are_made_with_those_of_borrowed_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each row has its own answer's and the borrowed one's; the script that trains then scores nothing."""
    command = ("dpo", [str(folder / "kto.yaml")])
    assert main(*command, task=make_references, script="reference", others=("kto",)) == 0
    assert "reference log-probs: 24 of 24" in capsys.readouterr().out
    records = np.concatenate([np.load(path) for path in sorted((folder / "cache/ref").rglob("*.npy"))])
    assert len(records) == 24 and (records["mismatched_logp"] < 0).all() and (records["mismatched_tokens"] > 0).all()
    own = records["chosen_logp"] + records["rejected_logp"]
    assert (own < 0).all() and ((records["chosen_tokens"] > 0) != (records["rejected_tokens"] > 0)).all()
    script = [sys.executable, REPOSITORY / "launch" / "train_kto.py", folder / "kto.yaml"]
    done = subprocess.run(script, capture_output=True, text=True, env=rank_free_environment())
    assert done.returncode == 0, done.stderr
    assert "reference log-probs" not in done.stdout and "exported" in done.stdout
    assert (folder / "run" / "report.html").is_file()
