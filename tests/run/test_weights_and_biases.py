"""One W&B run over all starts of a run: what it is sent, and that nothing it does holds up or ends the training."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pivot.config import REPOSITORY, ConfigError
from pivot.run import weights_and_biases
from pivot.run.log import RunLog
from pivot.run.weights_and_biases import LEFT_S, LOOK_S, require_package
from tests.kit.fake_wandb import calls, install
from tests.kit.runs import write_dpo_run

ID = "0123456789abcdef"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = install(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    for name in ("WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, as it is before its first step."""
    folder = tmp_path / "my-run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"id": ID}))
    (folder / "config.yaml").write_text("data: {train: 's3://***@host/${oc.env:SET}'}\noptim: {lr: 1.0e-06}\n")
    return folder


def train(run: Path, mode: str, first_step: int, steps: int, *, ends: bool = True) -> None:
    log = RunLog(run, first_step=first_step, total_steps=99, is_main=True, tensorboard=False, wandb=mode)
    log.event("start", step=first_step)
    for step in range(first_step + 1, first_step + steps + 1):
        log.step(step, {"loss": 1.0 / step, "grad_norm": float("nan")})
    log.evaluation(first_step + steps, {"eval/loss": 0.5}, intervals={"eval/loss": [1, 2, 3]}, skipped={})
    if ends:
        log.event("end", step=first_step + steps, pairs=24, tokens=99, flops=7.0, compare={})
    log.close()


def test_rows_arrive_under_the_runs_own_id_with_what_the_folder_has_of_its_settings(fake: Path, run: Path) -> None:
    train(run, "online", 0, 2)
    (init,) = calls(fake, "init")
    assert (init["id"], init["name"], init["project"], init["resume"]) == (ID, "my-run", "pivot", "allow")
    assert init["mode"] == "online" and init["dir"] == str(run)
    assert init["config"] == {"data": {"train": "s3://***@host/${oc.env:SET}"}, "optim": {"lr": 1e-6}}
    sent = [(call["step"], call["data"]) for call in calls(fake, "log")]
    assert sent == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (2, {"eval/loss": 0.5})]
    assert calls(fake, "summary")[0]["data"] == {"pairs": 24, "tokens": 99, "flops": 7.0}
    assert calls(fake, "finish") == [{"call": "finish", "exit_code": 0}]


def test_a_run_that_went_back_sends_no_step_twice_and_leaves_none_out(fake: Path, run: Path) -> None:
    """Killed behind step 3, of which W&B has 2; gone on from step 1, whose rows 2 and 3 are made again."""
    train(run, "online", 0, 3)
    (fake / "wandb" / f"server-{ID}.json").write_text("[1, 2]")
    (fake / "wandb" / "calls.jsonl").unlink()
    train(run, "online", 1, 3)
    assert [call["step"] for call in calls(fake, "log")] == [3, 4, 4]
    assert calls(fake, "init")[0]["id"] == ID


def test_an_offline_run_is_whole_in_its_newest_folder(fake: Path, run: Path) -> None:
    """`wandb sync` puts a folder in the place of an older one of the same run."""
    train(run, "offline", 0, 3)
    (fake / "wandb" / "calls.jsonl").unlink()
    train(run, "offline", 2, 2)
    assert calls(fake, "init")[0]["resume"] is None
    assert [call["step"] for call in calls(fake, "log")] == [1, 2, 3, 4, 4]


def test_what_cannot_be_reached_is_kept_offline_and_said(
    fake: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_FAKE", "unreachable")
    train(run, "online", 0, 2)
    assert [call["mode"] for call in calls(fake, "init")] == ["online", "offline"]
    assert [call["step"] for call in calls(fake, "log")] == [1, 2, 2]
    told = capfd.readouterr().out
    assert "warning: wandb online: ConnectionError: nobody answers at https://api\n" in told
    assert f"wandb      offline, in {run}/wandb; wandb sync sends it\n" in told


@pytest.mark.parametrize("fault", ["hangs", "breaks"])
def test_whatever_it_does_the_run_goes_on_and_ends_in_time(
    fake: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    monkeypatch.setenv("WANDB_FAKE", fault)
    monkeypatch.setattr(weights_and_biases, "SEND_S", 6.0)
    started = time.monotonic()
    train(run, "online", 0, 2)
    assert time.monotonic() - started < 12
    assert [json.loads(line).get("step") for line in (run / "log.jsonl").read_text().splitlines()] == [0, 1, 2, 2, 2]
    said = {"hangs": "not all was sent within 6 s", "breaks": "warning: wandb: OSError: the socket is gone"}
    told = capfd.readouterr()
    assert said[fault] in told.out and "Traceback" not in told.err


def test_a_killed_run_s_rows_still_arrive_and_no_process_stays(fake: Path, run: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from pivot.run.log import RunLog
log = RunLog(Path(sys.argv[1]), first_step=0, total_steps=9, is_main=True, tensorboard=False, wandb="online")
print(log._feed._process.pid, flush=True)
for step in (1, 2, 3):
    log.step(step, {"loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join([str(REPOSITORY), str(fake)])
    done = subprocess.run(
        [sys.executable, "-c", code, run], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == -signal.SIGKILL
    pid, deadline = int(done.stdout.split()[0]), time.monotonic() + LEFT_S + LOOK_S + 3
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{pid}").exists()
    assert [call["step"] for call in calls(fake, "log")] == [1, 2, 3]
    assert calls(fake, "finish") == [{"call": "finish", "exit_code": 1}]


def test_only_rank_0_sends(fake: Path, run: Path) -> None:
    log = RunLog(run, first_step=0, total_steps=9, is_main=False, tensorboard=False, wandb="online")
    log.step(1, {"loss": 1.0})
    log.close()
    assert log._feed is None and not calls(fake, "init")


@pytest.mark.parametrize("origin", [None, "a folder"])
def test_without_the_package_a_run_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    """A folder ./wandb, as W&B leaves it, is no package."""
    spec = importlib.util.spec_from_loader("wandb", None) if origin else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    require_package(None)
    with pytest.raises(ConfigError, match="log.wandb: found offline, but the package wandb is not installed here; pip"):
        require_package("offline")


@pytest.mark.slow
def test_a_run_that_is_killed_and_goes_back_is_one_run_at_wandb(fake: Path, tmp_path: Path) -> None:
    """SIGKILL in step 4, with step 2 saved: the second start makes step 3 again, and W&B gets each step once."""
    folder = write_dpo_run(tmp_path / "launched")
    command = [sys.executable, REPOSITORY / "launch" / "train_dpo.py", folder / "run.yaml", "log.wandb=online"]
    command += ["train.max_steps=5", "checkpoint.every_steps=2", "deepspeed=ds_configs/zero0.json"]
    fault = {"PIVOT_FAULT": "rank=0,step=4,kind=sigkill"}
    first = subprocess.run(command, env=os.environ | fault, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL, first.stderr
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    run_id = json.loads((folder / "run" / "run.json").read_text())["id"]
    assert [init["id"] for init in calls(fake, "init")] == [run_id, run_id]
    assert [call["step"] for call in calls(fake, "log")] == [1, 2, 3, 4, 5]
    assert [call["exit_code"] for call in calls(fake, "finish")] == [1, 0]


# -- with the package itself, where it is ------------------------------------------------------------------------------


def test_the_fake_takes_what_the_package_takes(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed: pip install wandb")
    spec = importlib.util.spec_from_file_location("fake_wandb", fake / "wandb" / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(inspect.signature(module.init).parameters) <= set(inspect.signature(wandb.init).parameters)
    for name in ("log", "finish"):
        own, real = (inspect.signature(getattr(kind, name)) for kind in (module.Run, wandb.Run))
        assert set(own.parameters) <= set(real.parameters), name
    for name in ("resumed", "step", "url"):
        assert hasattr(wandb.Run, name), name
    wandb.Settings(console="off", disable_git=True, save_code=False, silent=True, init_timeout=1.0)
    assert callable(wandb.teardown)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_package_keeps_a_run_without_any_network(
    run: Path, mode: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Online, where nobody answers: it is kept offline. No file holds what the environment of the run says."""
    pytest.importorskip("wandb", reason="the package wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "5ec4e7" * 7)
    monkeypatch.setenv("SET", "my-secret-set")
    train(run, mode, 0, 2)
    assert f"wandb      offline, in {run}/wandb" in capfd.readouterr().out
    (kept,) = (run / "wandb").glob(f"offline-run-*-{ID}/run-{ID}.wandb")
    assert b"eval/loss" in kept.read_bytes() and b"${oc.env:SET}" in kept.read_bytes()
    for file in (run / "wandb").rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert b"my-secret-set" not in content and b"5ec4e7" * 7 not in content, file
