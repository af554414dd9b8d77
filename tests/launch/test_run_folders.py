"""A run's folder over several starts, through the command line: resumed, tampered with, finished, free of secrets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.command import main
from pivot.config import REPOSITORY
from pivot.run.checkpoint import _describe
from tests.kit.runs import write_dpo_run

SETTINGS = ["deepspeed=ds_configs/zero0.json", "optim.schedule=constant", "optim.warmup_ratio=0"]
SETTINGS += [
    "checkpoint.every_steps=1",
    "evaluate.every_steps=1",
    "evaluate.num_samples=4",
    "evaluate.max_new_tokens=2",
]
ENVIRONMENT = {"PIVOT_PLACE": "hunter2hunter2", "PIVOT_KEY": "0.25"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dpo_run(tmp_path_factory.mktemp("folders"))


def start(folder: Path, name: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "launch" / "train_dpo.py", folder / "run.yaml", *SETTINGS]
    command += [f"output_dir={folder}/{name}", f"data.eval={folder}/set", *more]
    environment = os.environ | ENVIRONMENT | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """A run of two steps, which may get longer."""
    done = start(folder, "stopped", "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    return folder / "stopped"


def copy(stopped: Path, name: str) -> Path:
    return Path(shutil.copytree(stopped, stopped.with_name(name), symlinks=True))


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def plant(checkpoint: Path, name: str, canary: Path) -> None:
    """Put a payload into a file, and make the manifest agree with it."""

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    torch.save(torch.load(checkpoint / name, weights_only=False) | {"extra": Payload()}, checkpoint / name)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = _describe(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_log_says_each_step_once_and_the_export_comes_back(folder: Path, stopped: Path) -> None:
    """Of a run killed behind step 3, which was logged, evaluated and begun to be saved, and half of whose row 4 was
    written; then of the finished one, whose export was deleted."""
    run = copy(stopped, "resumed")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"event": "eval", "step": 3, "eval/loss": 9.0}\n{"step": 4, "lo')
    (run / "checkpoints" / "step-00000003.tmp").mkdir()
    (run / "status").write_text("{")
    done = start(folder, "resumed", "train.max_steps=4")
    assert done.returncode == 0, done.stderr
    assert "cut back to step 2; rows of steps that are made again: 1" in done.stdout
    assert "status is damaged" in done.stdout
    found = rows(run)
    assert [row["step"] for row in found if "event" not in row] == [1, 2, 3, 4]
    assert [row["step"] for row in found if row.get("event") == "eval"] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in found if row.get("event") == "end"] == [4]
    assert all(row.get("loss", row.get("eval/loss")) != 9.0 for row in found)
    assert not list(run.rglob("*.tmp"))
    before = load_file(run / "export" / "model.safetensors")
    shutil.rmtree(run / "export")
    done = start(folder, "resumed", "train.max_steps=4")
    assert done.returncode == 0, done.stderr
    again = load_file(run / "export" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in before.items())
    assert [row["step"] for row in rows(run) if "event" not in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(run) if row.get("event") == "eval"] == [0, 1, 2, 3, 4]
    status = json.loads((run / "status").read_text())
    assert (status["status"], status["step"]) == ("done", 4)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "rank-00000.pt"])
def test_a_payload_in_a_checkpoint_is_one_sentence(folder: Path, stopped: Path, tmp_path: Path, name: str) -> None:
    run = copy(stopped, f"planted-{name}")
    plant(run / "checkpoints" / "step-00000002", name, tmp_path / "canary")
    done = start(folder, run.name, "train.max_steps=4")
    assert done.returncode == 2
    assert f"{name} holds posix.mkdir, which training never writes there, and was not loaded" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "canary").exists()


@pytest.mark.slow
def test_links_and_foreign_checkpoints(folder: Path, stopped: Path) -> None:
    """Checkpoints that lie elsewhere are read through their links and stay there; those of another run are refused."""
    run, elsewhere = copy(stopped, "linked"), folder / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").mkdir()
    for path in elsewhere.glob("step-*"):
        (run / "checkpoints" / path.name).symlink_to(path)
    done = start(folder, "linked", "train.max_steps=4")
    assert done.returncode == 0, done.stderr
    assert f"resumed from {run}/checkpoints/step-00000002" in done.stdout
    assert sorted(path.name for path in elsewhere.glob("step-*/rank-00000.pt")) == ["rank-00000.pt"] * 2
    assert not [path for path in (run / "checkpoints").iterdir() if path.is_symlink()]
    other = folder / "other"
    assert start(folder, "other", "train.max_steps=1").returncode == 0
    shutil.copytree(run / "checkpoints" / "step-00000004", other / "checkpoints" / "step-00000004")
    done = start(folder, "other", "train.max_steps=5")
    assert done.returncode == 2
    assert f"error: {other}/checkpoints/step-00000004 is a checkpoint of another run; take it out" in done.stderr


def test_no_secret_is_in_anything_that_a_run_leaves(folder: Path) -> None:
    """A value of the environment in the log's and the report's name of a comparison, and one that may not change."""
    settings = ["log.compare={name: '${oc.env:PIVOT_PLACE}', samples: 100}", "objective.dpo.beta=${oc.env:PIVOT_KEY}"]
    settings += ["data.cache_dir=${oc.env:PIVOT_CACHE}", "log.tensorboard=true", "train.max_steps=1"]
    cache = f"{folder}/cache-hunter3hunter3"
    done = start(folder, "secret", *settings, PIVOT_CACHE=cache)
    assert done.returncode == 0, done.stderr
    left = [path for path in (folder / "secret").rglob("*") if path.is_file()]
    assert {"config.yaml", "log.jsonl", "report.html", "manifest.json", "state.json"} <= {path.name for path in left}
    assert not [path for path in left if b"hunter2" in path.read_bytes()]
    assert "hunter2" not in done.stdout + done.stderr
    assert not [path for path in left if b"hunter3" in path.read_bytes()]
    assert "${oc.env:PIVOT_CACHE}" in (folder / "secret" / "config.yaml").read_text()
    shown = start(folder, "secret", *settings, "--print-config", PIVOT_CACHE=cache)
    assert "${oc.env:PIVOT_PLACE}" in shown.stdout and "hunter" not in shown.stdout
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIVOT_")}
    report = [sys.executable, REPOSITORY / "launch" / "report.py", folder / "secret"]
    written = subprocess.run(report, capture_output=True, text=True, env=environment)
    assert written.returncode == 0, written.stderr


def test_a_variable_with_another_value_is_another_setting(folder: Path) -> None:
    settings = ["objective.dpo.reference=${oc.env:PIVOT_REFERENCE}", "train.max_steps=1"]
    assert start(folder, "variable", *settings, PIVOT_REFERENCE=f"{folder}/llava").returncode == 0
    shutil.copytree(folder / "llava", folder / "llava-copy", dirs_exist_ok=True)
    settings[-1] = "train.max_steps=2"
    done = start(folder, "variable", *settings, PIVOT_REFERENCE=f"{folder}/llava-copy")
    assert done.returncode == 2
    assert "was written with another value of objective.dpo.reference" in done.stderr


ASKED_AGAIN = [pytest.param(key, marks=pytest.mark.slow) for key in ("data.train", "data.eval")]  # for a minute each


@pytest.mark.parametrize("key", [*ASKED_AGAIN, "init_from", "data.exclude", "train.seed", "deepspeed"])
def test_a_password_is_in_no_error(folder: Path, key: str, capfd: pytest.CaptureFixture[str]) -> None:
    url = "https://bob:hunter2@127.0.0.1:9/set?token=hunter2"
    assert main("dpo", [str(folder / "run.yaml"), f"{key}='{url}'", f"output_dir={folder}/never"]) != 0
    shown = capfd.readouterr()
    assert "127.0.0.1:9/set" in shown.err and "hunter2" not in shown.out + shown.err
