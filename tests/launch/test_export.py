"""Law: a checkpoint, exported without an engine, is to the byte what the run's own end exports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.commands import ROOT, rank_free_environment
from tests.kit.runs import write_dpo_run

RUNS = {
    "zero0": ["deepspeed=ds_configs/zero0.json"],
    "zero1": ["deepspeed=ds_configs/zero1.json", "optim.vision_tower.lr=null"],
    "zero3": ["deepspeed=ds_configs/zero3.json", "optim.vision_tower.lr=null", "train.precision=bf16"],
}


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: DeepSpeed's groups do not outlive the ranks that they were made with."""
    command = [sys.executable, f"launch/{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=rank_free_environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dpo_run(tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize("name", RUNS)
def test_it_is_the_runs_own_export(folder: Path, tmp_path: Path, name: str) -> None:
    run = folder / name
    trained = run_script("train_dpo", folder / "run.yaml", f"output_dir={run}", *RUNS[name])
    assert trained.returncode == 0, trained.stderr[-3000:]
    exported = run_script("export", run, "--out", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr[-3000:]
    assert "step-00000001, step 1\n" in exported.stdout
    own = {path.name: path.read_bytes() for path in (run / "export").iterdir() if path.is_file()}
    assert "model.safetensors" in own
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == own


def test_what_cannot_be_exported_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    """No run, a damaged checkpoint that is named, and an --out that holds something; by the command."""
    run = folder / "zero1"
    damaged = shutil.copytree(run, tmp_path / "run") / "checkpoints" / "step-00000001"
    next(damaged.glob("*model_states.pt")).write_bytes(b"cut")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, sentence in (
        ([folder / "set", "--out", tmp_path / "a"], "no run and no checkpoint of one"),
        ([damaged, "--out", tmp_path / "b"], "is damaged, or no checkpoint: "),
        ([run, "--out", tmp_path / "full"], "is not empty; give another folder"),
    ):
        done = run_script("export", *arguments)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
