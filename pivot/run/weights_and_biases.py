"""A run's log at Weights & Biases: a process beside rank 0 reads log.jsonl and hands its rows on.

Nothing that W&B or the network does can hold up or end the training; and nothing leaves that does not stand in the
run's folder anyway, where secrets are left out. All starts of a run are one W&B run, whose id is that of run.json. What
W&B has is not sent again: it tells its last step when a run goes on. An offline run is whole in its newest folder,
since `wandb sync` puts a folder in the place of the run's older ones: there, each start writes all rows anew.

Where it goes is said by W&B's own environment: WANDB_API_KEY (or `wandb login`), WANDB_ENTITY, WANDB_BASE_URL, and
WANDB_PROJECT, which is "pivot" where it is absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from pivot.config import REPOSITORY, ConfigError
from pivot.system.files import read_object
from pivot.system.redact import tell

REACH_S = 30.0  # for W&B to answer at the start; then the run is kept offline
LOOK_S = 1.0  # between two looks for new rows
SEND_S = 60.0  # for the last rows of a run that is done
LEFT_S = 6.0  # for the last rows of a run that was stopped or died


def require_package(mode: str | None) -> None:
    """ConfigError where `log.wandb` asks for a package that is not there."""
    spec = importlib.util.find_spec("wandb") if mode else None
    if mode and (spec is None or spec.origin is None):  # without origin: a folder of that name
        raise ConfigError(
            f"log.wandb: found {mode}, but the package wandb is not installed here; pip install wandb, or leave the "
            "key out"
        )


class Feed:
    """The process that hands the rows of `folder`'s log.jsonl on, `mode` online or offline; for rank 0."""

    def __init__(self, folder: Path, mode: str) -> None:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), mode, str(os.getpid())],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the ranks
        )

    def close(self) -> None:
        """Wait for the last rows, behind which the log has its end."""
        try:
            self._process.wait(SEND_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            tell(f"wandb      not all was sent within {SEND_S:g} s; `wandb sync {self._folder}/wandb/latest-run` does")


# -- the process beside ----------------------------------------------------------------------------------------------


def main(folder: Path, mode: str, parent: int) -> None:
    """Hand on what the log has and what comes to it, until the run is done or `parent`, its process, is gone."""
    threading.Thread(target=_end_behind, args=(parent,), daemon=True).start()
    run = _start(folder, mode)
    if run is None:
        return
    known = run.step - 1 if run.resumed else -1
    is_done = False
    with (folder / "log.jsonl").open("rb") as file:
        while not is_done:
            is_left = os.getppid() != parent  # looked for first: what was written before is then read below
            is_done = _hand_on(run, file, known)
            if is_left:
                break
            time.sleep(0 if is_done else LOOK_S)
    run.finish(exit_code=0 if is_done else 1)


def _end_behind(parent: int) -> None:
    """End this process, and what W&B started for it, soon after `parent`: what it has not sent a next start sends."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    time.sleep(LEFT_S)
    os.killpg(0, signal.SIGKILL)


def _start(folder: Path, mode: str) -> Any:
    """The W&B run; offline where W&B cannot be reached; None where not even that can be had."""
    import wandb

    facts = {
        "project": os.environ.get("WANDB_PROJECT") or "pivot",
        "id": run_id(folder),
        "name": folder.name,
        "dir": str(folder),
        "config": OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False),
        "settings": wandb.Settings(console="off", disable_git=True, save_code=False, silent=True, init_timeout=REACH_S),
    }
    for way in dict.fromkeys((mode, "offline")):
        try:
            run = wandb.init(mode=way, resume="allow" if way == "online" else None, **facts)
        except Exception as error:
            _warn(f"wandb {way}", error)
            wandb.teardown()  # it would take the second try for a second run of the same id
        else:
            tell(f"wandb      {run.url if way == 'online' else f'offline, in {folder}/wandb; wandb sync sends it'}")
            return run
    return None


def run_id(folder: Path) -> str:
    """That of the run; of one that was begun before runs had ids, one that is made from where it lies."""
    known = read_object(folder / "run.json").get("id")
    return str(known or hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16])


def _hand_on(run: Any, file: IO[bytes], known: int) -> bool:
    """Log what has come to the file of steps behind `known`; whether it is the run's end."""
    while line := file.readline():
        if not line.endswith(b"\n"):  # still being written
            file.seek(-len(line), os.SEEK_CUR)
            break
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if row.get("event") == "end":
                run.summary.update(_numbers(row))
                return True
            if row.get("event") in (None, "eval") and row["step"] > known:
                run.log(_numbers(row), step=row["step"])
    return False


def _warn(what: str, error: Exception) -> None:
    tell(f"warning: {what}: {type(error).__name__}: {' '.join(str(error).split())}")


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    except Exception as error:  # of whatever kind: training goes on without it
        _warn("wandb", error)
