"""Law: a checkpoint, exported without an engine, is to the byte what the run's own end exports."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit.commands import ROOT, rank_free_environment
from tests.kit.families import write_timm
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


KILLED = """
import os, runpy, signal, sys
replace, at = os.replace, sys.argv[1]
def kill(source, target):
    if os.path.basename(target) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
sys.path.insert(0, "launch")
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_killed(name: str, at: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script that gets SIGKILL when a file of this name is to get its place."""
    command = [sys.executable, "-c", KILLED, at, f"launch/{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=rank_free_environment(), capture_output=True, text=True)


def test_an_export_that_is_killed_is_none_and_goes_on(folder: Path, tmp_path: Path) -> None:
    run, out = folder / "zero0", tmp_path / "out"
    assert run_killed("export", "config.json", run, "--out", out).returncode == -signal.SIGKILL
    assert (out / "model.safetensors").is_file()
    refused = run_script("evaluate", "held-out", "--model", out, "--data", folder / "set")
    assert refused.returncode == 2 and "it holds neither config.json nor parts.json" in refused.stderr
    done = run_script("export", run, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (run / "export").iterdir()
    }


def test_an_encoder_alone_that_is_killed_is_none_and_goes_on(folder: Path, tmp_path: Path) -> None:
    run, out = folder / "zero0", tmp_path / "out"
    killed = run_killed("export", "config.json", run, "--out", out, "--encoder", "hf")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert (out / "model.safetensors").is_file() and not (out / "config.json").exists()
    done = run_script("export", run, "--out", out, "--encoder", "hf")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "read back by transformers: the largest difference of a feature is 0" in done.stdout
    assert f"model.vision_tower.path={out}" in done.stdout
    assert json.loads((out / "pivot_encoder.json").read_text())["path"] == str(out)
    assert (out / "config.json").is_file() and not (out / ".part").exists()


def test_numbers_that_are_half_written_leave_those_of_before(folder: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    numbers.write_text("{}")
    arguments = ["held-out", "--model", folder / "zero0", "--data", folder / "set", "--num-samples", 2]
    killed = run_killed("evaluate", "numbers.json", *arguments, "--json", numbers)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert numbers.read_text() == "{}"


def test_the_encoder_alone_is_written_by_its_own_library(folder: Path, tmp_path: Path) -> None:
    """A timm encoder of a run, which moved what was run of it and nothing else; and no other library's form of it."""
    path, run = write_timm(tmp_path / "timm", "supervised"), tmp_path / "run"
    changes = [f"output_dir={run}", "init_parts=[language_model]", f"model.vision_tower.path={path}"]
    trained = run_script("train_dpo", folder / "run.yaml", *changes, "data.image.fit=squash")
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "features   timm, block 2 of 3, without the final norm: 16 tokens an image (16 patches)" in trained.stdout
    exported = run_script("export", run, "--out", tmp_path / "out", "--encoder", "timm")
    assert exported.returncode == 0, exported.stderr[-3000:]
    assert "read back by timm: the largest difference of a feature is" in exported.stdout
    before, after = (load_file(place / "model.safetensors") for place in (tmp_path / "timm", tmp_path / "out"))
    note = json.loads((tmp_path / "out" / "pivot_encoder.json").read_text())
    assert before.keys() == after.keys() and note["image"]["fit"] == "squash"
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved and not moved & note["set_aside"]["parameters"].keys()
    assert {"head.weight", "norm.weight", "blocks.2.mlp.fc1.weight"} <= note["set_aside"]["parameters"].keys()
    refused = run_script("export", run, "--out", tmp_path / "other", "--encoder", "hf")
    assert refused.returncode == 2 and "is of timm, and pivot does not convert between" in refused.stderr


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
