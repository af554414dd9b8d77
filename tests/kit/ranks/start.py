"""A run on two ranks as a launcher starts it, but without one: `launch/train_dpo.py`, each rank in its own session."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivot.config import REPOSITORY
from pivot.system.process import free_port
from tests.kit.ranks import rank_environment

RUN = """
output_dir: {folder}/{name}
init_from: {folder}/llava
deepspeed: ds_configs/zero3.json
data: {{train: {folder}/set, cache_dir: {folder}/cache, workers: 1}}
objective: {{dpo: {{}}}}
optim: {{vision_tower: {{lr: 2e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 5e-4}}}}
train: {{global_batch_size: 6, max_steps: 4, max_tokens_per_micro_batch: 400, seed: 3, timeout_s: 60}}
checkpoint: {{every_steps: 2}}
"""
# What another machine, or another rank, would be like: Python that a rank runs before it trains.
_PATCHED = """
import sys
from pathlib import Path
sys.path.insert(0, "launch")
from command import main
from pivot.system.process import leave
{patch}
leave(main("dpo", sys.argv[1:]))
"""


@dataclass(frozen=True)
class Ended:
    """How a run on two ranks ended."""

    codes: list[int]
    texts: list[str]  # what each rank printed
    folder: Path

    @property
    def status(self) -> dict[str, Any]:
        path = self.folder / "status"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """The rows of the log that are of steps."""
        rows = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        return {row["step"]: row for row in rows if "event" not in row}

    @property
    def saved(self) -> list[int]:
        """The steps of the checkpoints that are published."""
        return sorted(int(path.parent.name[-8:]) for path in self.folder.glob("checkpoints/step-*/manifest.json"))


def run_on_two_ranks(
    folder: Path,
    name: str,
    *overrides: str,
    fault: str = "",
    patches: Sequence[str] = ("", ""),
    before: Sequence[Sequence[str]] = ((), ()),
    limit_s: float = 240.0,
) -> Ended:
    """Start `name` below `folder`, where llava/ and set/ lie, and wait for it. AssertionError where a rank hangs.

    `patches`: Python for each rank, such as a clock that is wrong. `before`: the words ahead of each rank's command.
    """
    config = folder / f"{name}.yaml"
    config.write_text(RUN.format(folder=folder, name=name))
    ranks, port = [], free_port()
    for rank, (patch, words) in enumerate(zip(patches, before, strict=True)):
        script = ["-c", _PATCHED.format(patch=patch)] if patch else ["launch/train_dpo.py"]
        command = [*words, sys.executable, *script, str(config), *overrides]
        environment = rank_environment(rank, 2, port) | {"PIVOT_FAULT": fault}
        with (folder / f"{name}-{rank}.out").open("w") as output:
            ranks.append(
                subprocess.Popen(
                    command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
                )
            )
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    codes = [rank.poll() for rank in ranks]
    for process in ranks:
        process.kill()
        process.wait()
    texts = [(folder / f"{name}-{rank}.out").read_text() for rank in (0, 1)]
    assert None not in codes, f"a rank hangs: {codes}\n" + "\n---\n".join(text[-3000:] for text in texts)
    return Ended([code for code in codes if code is not None], texts, folder / name)


def find_namespace(folder: Path) -> list[str] | None:
    """The words that give a command mounts of its own, without being root; None where the machine has none."""
    if shutil.which("unshare"):
        for words in (["unshare", "-rm"], ["unshare", "-m"]):
            mount = [*words, "mount", "-t", "tmpfs", "none", str(folder)]
            if not subprocess.run(mount, capture_output=True).returncode:
                return words
    return None
