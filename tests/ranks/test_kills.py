"""Law: a run whose processes are killed at any moment ends with the weights of the run that nobody touched.

`KILLS=36 make test ARGS="-m slow tests/ranks/test_kills.py --timeout 3600"` kills as often as that. No launcher watches
over these ranks: one whose peer was killed before they met waits for `train.timeout_s`, here 40 s, and then ends.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pivot.config import REPOSITORY
from pivot.system.process import free_port
from tests.kit.ranks import rank_environment
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

KILLS = int(os.environ.get("KILLS", "8"))
RUN = """
output_dir: {folder}/{name}
init_from: {folder}/llava
deepspeed: ds_configs/zero3.json
data: {{train: {folder}/set, cache_dir: {folder}/cache, workers: 1}}
objective: {{dpo: {{loss: {{sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}}, bco_shift: running_mean}}}}
optim: {{vision_tower: {{lr: 2e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 5e-4}}}}
train: {{global_batch_size: 6, max_steps: {steps}, max_tokens_per_micro_batch: 400, seed: 3, timeout_s: 40}}
checkpoint: {{every_steps: 1}}
"""


@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_runs_end_with_equal_weights(tmp_path: Path) -> None:
    """Both ranks, rank 0 or rank 1 get SIGKILL up to three seconds behind a start's first step, or while it starts."""
    tiny_llava(tmp_path / "llava")
    make_set(tmp_path)
    steps, draw, killed, starts = 12 * KILLS, random.Random(7), 0, 0  # some 10 steps a start on an idle machine
    assert Run(tmp_path, "unbroken", steps).wait() == [0, 0]
    while killed < KILLS:
        starts += 1
        assert starts <= 3 * KILLS, "the run got to its end, or nowhere, before it had been killed so often"
        run = Run(tmp_path, "killed", steps)
        if draw.random() < 0.25:
            time.sleep(draw.uniform(0.5, 8.0))
            killed += run.kill((0, 1))  # one of two that have not met waits for its time-out: tests/ranks/test_ends.py
        else:
            run.wait_for_a_step()
            time.sleep(draw.uniform(0.0, 3.0))
            killed += run.kill(draw.choice([(0, 1), (0,), (1,)]))
    codes = Run(tmp_path, "killed", steps).wait()
    assert codes == [0, 0]
    expected, found = (load_file(tmp_path / name / "export/model.safetensors") for name in ("unbroken", "killed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    print(f"{killed} kills over {starts} starts: weights equal bit by bit")


class Run:
    """One start of a run on two ranks, each in a session of its own."""

    def __init__(self, folder: Path, name: str, steps: int) -> None:
        self._log = folder / name / "log.jsonl"
        self._rows = self._count()
        config = folder / f"{name}.yaml"
        config.write_text(RUN.format(folder=folder, name=name, steps=steps))
        command, port = [sys.executable, "launch/train_dpo.py", str(config)], free_port()
        self._output = (folder / f"{name}.out").open("a")
        self._ranks = [
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=rank_environment(rank, 2, port),
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
            )
            for rank in (0, 1)
        ]

    def _count(self) -> int:
        if not self._log.is_file():
            return 0
        rows = self._log.read_text(errors="replace").splitlines()
        return sum(_is_step(row) for row in rows)

    def wait_for_a_step(self) -> None:
        deadline = time.monotonic() + 120
        while self._count() <= self._rows and time.monotonic() < deadline and self._ranks[0].poll() is None:
            time.sleep(0.05)

    def kill(self, ranks: tuple[int, ...]) -> int:
        """SIGKILL to the ranks (not to their workers); the others must end by themselves. 1 where the run was alive."""
        alive = all(rank.poll() is None for rank in self._ranks)
        for rank in ranks:
            self._ranks[rank].send_signal(signal.SIGKILL)
        self.wait()
        return int(alive)

    def wait(self) -> list[int]:
        """The exit codes."""
        codes = [rank.wait(timeout=300) for rank in self._ranks]
        self._output.close()
        return codes


def _is_step(row: str) -> bool:
    try:
        return "event" not in json.loads(row)
    except ValueError:  # half-written
        return False
