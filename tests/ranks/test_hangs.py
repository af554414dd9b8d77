"""Law: a rank that hangs, wherever, is named in RUN/status; all stacks are there; all end by train.timeout_s + 10 s."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pivot.config import REPOSITORY
from pivot.system.process import free_port
from tests.kit.ranks import rank_environment
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]
TIMEOUT_S, AFTER_S = 20, 10.0
RUN = """
output_dir: {folder}/{name}
init_from: {folder}/llava
deepspeed: ds_configs/zero3.json
data: {{train: {folder}/set, eval: {folder}/set, cache_dir: {folder}/{name}-cache, workers: 0}}
objective: {{dpo: {{}}}}
optim: {{vision_tower: {{lr: 2e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 5e-4}}}}
train: {{global_batch_size: 6, max_steps: 4, max_tokens_per_micro_batch: 400, timeout_s: {timeout_s}}}
checkpoint: {{every_steps: 1}}
evaluate: {{num_samples: 4, max_new_tokens: 2}}
"""
# where -> (rank, how, the function that hangs, in which call, what the reason says of that rank)
STEP = "pivot.train.run_micro_batch"
HANGS = {
    "stopped": (1, "stop", STEP, 2, "answered nothing, not even with a stack"),
    "stopped-0": (0, "stop", STEP, 2, "answered nothing, not even with a stack"),
    "python": (1, "spin", STEP, 2, "stayed in step "),
    "data": (0, "sleep", "pivot.data.loader.Loader._next", 3, "stayed "),
    "saving": (1, "sleep", "torch.save", 1, "stayed in the save behind step "),
    "scoring": (1, "spin", "pivot.data.reference_cache.ReferenceCache._score", 2, "stayed in scoring the reference "),
    "evaluation": (1, "sleep", "pivot.evaluate.pairs._records", 1, "stayed in the evaluation behind step 0 "),
    "generation": (0, "sleep", "pivot.evaluate.questions._answer", 1, "stayed in the evaluation behind step 0 "),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs")
    tiny_llava(folder / "llava")
    make_set(folder)
    return folder


Ranks = list[subprocess.Popen[bytes]]


@pytest.fixture
def start_ranks(folder: Path) -> Iterator[Callable[[str], Ranks]]:
    """Two ranks without a launcher; what they print goes to NAME-RANK.out."""
    started: Ranks = []

    def start(name: str) -> Ranks:
        rank, kind, at, call, _ = HANGS[name]
        config, port = folder / f"{name}.yaml", free_port()
        config.write_text(RUN.format(folder=folder, name=name, timeout_s=TIMEOUT_S))
        for number in (0, 1):
            environment = rank_environment(number, 2, port) | {"HANG": f"rank={rank},kind={kind},call={call},at={at}"}
            with (folder / f"{name}-{number}.out").open("w") as output:
                command = [sys.executable, "-m", "tests.kit.ranks.hanging", str(config)]
                started.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", HANGS)
def test_a_rank_that_hangs_is_named(folder: Path, start_ranks: Callable[[str], Ranks], name: str) -> None:
    rank, kind, _, _, told = HANGS[name]
    ranks = start_ranks(name)
    hanging, waiting = ranks[rank], ranks[1 - rank]
    assert waiting.wait(timeout=240) == 1
    ended = time.monotonic()
    output = (folder / f"{name}-{1 - rank}.out").read_text()
    status = json.loads((folder / name / "status").read_text())
    assert status["status"] == "failed", output[-3000:]
    reason = status["reason"]
    assert reason.startswith(f"rank {rank} (") and f"process {hanging.pid}) {told}" in reason
    assert f"; rank {1 - rank} waited for it " in reason and reason.endswith(f"stacks: {folder}/{name}/stacks")
    assert f"error: {reason}" in output
    assert "Timed out waiting" not in reason
    stacks = {path.name: path.read_text() for path in (folder / name / "stacks").iterdir()}
    live = [1 - rank] if kind == "stop" else [0, 1]
    assert sorted(stacks) == [f"rank-{number:05d}.txt" for number in live]
    assert all("Current thread" in text or "most recent call first" in text for text in stacks.values())
    if kind == "stop":
        assert hanging.poll() is None
        hanging.send_signal(signal.SIGKILL)
    else:
        assert "in hang" in stacks[f"rank-{rank:05d}.txt"]
        assert hanging.wait(timeout=30) == 1
        assert time.monotonic() - ended < AFTER_S
    first = json.loads(stacks[f"rank-{1 - rank:05d}.txt"].splitlines()[0])
    assert first["waits"] and TIMEOUT_S * 0.7 < first["still_s"] < TIMEOUT_S
