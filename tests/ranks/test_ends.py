"""RUN/status tells the truth of every end, and nobody is left: ranks that die, hang or raise, launchers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pivot.config import REPOSITORY
from pivot.system.process import free_port
from tests.kit.ranks import rank_environment
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

pytestmark = pytest.mark.timeout(600)
LEFT_WITHIN_S = 10.0
RUN = """
output_dir: {folder}/{name}
init_from: {folder}/llava
deepspeed: ds_configs/zero3.json
data: {{train: {folder}/set, cache_dir: {folder}/cache, workers: 1}}
objective: {{dpo: {{}}}}
optim: {{vision_tower: {{lr: 2e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 5e-4}}}}
train: {{global_batch_size: 6, max_steps: {steps}, max_tokens_per_micro_batch: 400, timeout_s: {timeout_s}}}
checkpoint: {{every_steps: 0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends")
    tiny_llava(folder / "llava")
    make_set(folder)
    return folder


def write_config(folder: Path, name: str, *, steps: int = 4, timeout_s: int = 60) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RUN.format(folder=folder, name=name, steps=steps, timeout_s=timeout_s))
    return path


def status_of(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name / "status"
    return json.loads(path.read_text()) if path.is_file() else {}


Ranks = list[subprocess.Popen[bytes]]


@pytest.fixture
def start_ranks(folder: Path) -> Iterator[Callable[..., Ranks]]:
    """Two ranks without a launcher, each in a session of its own; what they print goes to NAME-RANK.out."""
    started: Ranks = []

    def start(name: str, fault: str, *, timeout_s: int = 60) -> Ranks:
        command = [sys.executable, "launch/train_dpo.py", str(write_config(folder, name, timeout_s=timeout_s))]
        port = free_port()
        for rank in (0, 1):
            with (folder / f"{name}-{rank}.out").open("w") as output:
                environment = rank_environment(rank, 2, port) | {"PIVOT_FAULT": fault}
                started.append(
                    subprocess.Popen(
                        command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
                    )
                )
        return started

    yield start
    for rank in started:
        rank.kill()
        rank.wait()


def in_session(sessions: list[int]) -> list[psutil.Process]:
    """The processes that live in these sessions."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def require_nobody_left(sessions: list[int]) -> None:
    deadline = time.monotonic() + LEFT_WITHIN_S
    while (left := in_session(sessions)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, [process.cmdline() for process in left]


def test_rank_0_is_killed(folder: Path, start_ranks: Callable[..., Ranks]) -> None:
    ranks = start_ranks("killed-0", "rank=0,step=2,kind=sigkill")
    assert [rank.wait(timeout=300) for rank in ranks] == [-signal.SIGKILL, 1]
    status = status_of(folder, "killed-0")
    assert status["status"] == "failed"
    assert status["reason"].startswith(
        "another rank died and left no reason (killed, out of memory, machine lost?); rank 1"
    )
    require_nobody_left([rank.pid for rank in ranks])


def test_a_rank_that_raises_is_quoted(folder: Path, start_ranks: Callable[..., Ranks]) -> None:
    """Not what rank 0 saw of it."""
    ranks = start_ranks("raised-1", "rank=1,step=2,kind=raise")
    assert [rank.wait(timeout=300) for rank in ranks] == [1, 1]
    assert status_of(folder, "raised-1")["reason"] == "RuntimeError: PIVOT_FAULT asked for this error"
    require_nobody_left([rank.pid for rank in ranks])


def find_ranks(launcher: subprocess.Popen[bytes]) -> tuple[psutil.Process, list[psutil.Process]]:
    """launch.py below the `deepspeed` command, and the ranks below that."""
    (node,) = psutil.Process(launcher.pid).children()
    return node, node.children()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("launch.py", signal.SIGKILL),
        ("launch.py", signal.SIGUSR1),
        ("deepspeed", signal.SIGKILL),
        ("deepspeed", signal.SIGTERM),
        ("deepspeed", signal.SIGINT),
        ("deepspeed", signal.SIGHUP),
    ],
)
def test_the_launcher_dies(folder: Path, victim: str, number: signal.Signals) -> None:
    """The ranks save and end: nobody trains on unseen."""
    name = f"orphans-{victim}-{number.name}"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    command += ["launch/train_dpo.py", str(write_config(folder, name, steps=100_000))]
    environment = rank_environment(0, 1, 0)
    for variable in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        environment.pop(variable)
    with (folder / f"{name}.out").open("w") as output:
        launcher = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    log, deadline = folder / name / "log.jsonl", time.monotonic() + 240
    while not (log.is_file() and log.read_text().count("\n") > 2):
        assert launcher.poll() is None and time.monotonic() < deadline, (folder / f"{name}.out").read_text()[-3000:]
        time.sleep(0.1)
    node, ranks = find_ranks(launcher)
    assert len(ranks) == 2
    os.kill(node.pid if victim == "launch.py" else launcher.pid, number)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    launcher.wait(timeout=60)
    status = status_of(folder, name)
    assert status["status"] == "preempted"
    gone = node.pid if victim == "launch.py" else launcher.pid
    assert status["reason"].startswith(f"stopped by its launcher, process {gone}, is gone")
    assert (folder / name / "checkpoints" / f"step-{status['step']:08d}" / "manifest.json").is_file()
    require_nobody_left([launcher.pid])
