"""Starts of a run that are struck from outside, as machines, people and job systems strike.

    start = Start(run, MOMENTS["latest"], launcher=True)      # `deepspeed`, its launch.py, two ranks
    start.wait_for_moment(draw)
    start.strike("launch.py", signal.SIGKILL)
    seconds = start.wait_for_end()                            # AssertionError where a process stays

A start's processes are known by a variable of their environment, which whatever they fork or start inherits; who their
parents are does not matter. How far it has come is read from what it prints and from the files that it leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any, NamedTuple

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from pivot.config import REPOSITORY
from pivot.run.checkpoint import _describe, published
from pivot.system.process import free_port
from tests.kit.ranks import rank_environment
from tests.kit.ranks.waiting_train import PLACES, WAIT_S

MARK = "PIVOT_TEST_START"
LEFT_WITHIN_S = 60.0 if "PYTEST_XDIST_WORKER" in os.environ else 10.0  # beside other tests a process waits for its turn
COMES_WITHIN_S = 600.0  # a moment, on a machine that has other things to do
SAVE_EVERY, EVALUATE_EVERY = 2, 3
AHEAD = 30  # steps that are left to a start; it is struck after
ENOUGH = 8  # of them at the latest, so that a fast machine does not come to the end
START_S = 8.0  # about what a start takes to its first step
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
OVERRIDES = os.environ.get("OVERRIDES", "").split()  # more settings: OVERRIDES="checkpoint.keep=3 data.workers=0"
# Of asynchronous saves one may be on its way.
LOST_AT_MOST = SAVE_EVERY * (2 if "checkpoint.asynchronous=true" in OVERRIDES else 1)
CONFIG = """
output_dir: {folder}/{name}
init_from: {folder}/llava
deepspeed: ds_configs/zero3.json
data: {{train: {folder}/set, eval: {folder}/set, cache_dir: {folder}/cache-{name}, workers: 1}}
objective: {{dpo: {{loss: {{sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}}, bco_shift: running_mean}}}}
optim:
  schedule: constant  # so that a start may have more steps than the one before
  warmup_ratio: 0
  vision_tower: {{lr: 2e-4}}
  projector: {{lr: 1e-3}}
  language_model: {{lr: 5e-4}}
train: {{global_batch_size: 6, max_tokens_per_micro_batch: 400, seed: 3}}
checkpoint: {{every_steps: {save}}}
evaluate: {{every_steps: {evaluate}, num_samples: 4, max_new_tokens: 2}}
"""


@dataclass
class Run:
    """A run over all its starts: its folder, and what is seen of it from outside."""

    folder: Path
    name: str
    max_steps: int = 0

    def __post_init__(self) -> None:
        self.path, self.cache = self.folder / self.name, self.folder / f"cache-{self.name}"
        self.config = self.folder / f"{self.name}.yaml"
        settings = {"folder": self.folder, "name": self.name, "save": SAVE_EVERY, "evaluate": EVALUATE_EVERY}
        self.config.write_text(CONFIG.format(**settings))

    def saved_step(self) -> int:
        """The newest published checkpoint's step; 0 where there is none."""
        return max((int(folder.name[-8:]) for folder in published(self.path / "checkpoints")), default=0)

    def logged_step(self) -> int:
        """The newest step that the log tells of; 0 where there is none."""
        return max((row["step"] for row in self.rows() if "event" not in row), default=0)

    def rows(self) -> list[dict[str, Any]]:
        path = self.path / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def status(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.path / "status").read_text())
        return {}

    def weights(self) -> dict[str, Tensor]:
        """Those that were exported."""
        return load_file(self.path / "export" / "model.safetensors")

    def damaged(self) -> list[str]:
        """The files of published checkpoints that are not as their manifest says."""
        found = []
        for folder in published(self.path / "checkpoints"):
            files = json.loads((folder / "manifest.json").read_text())["files"]
            found += [f"{folder}/{name}" for name, told in files.items() if _describe(folder / name) != told]
        return found


def require_equal_ends(run: Run, other: Run) -> None:
    """Weights and the losses of all steps, bit by bit, and each step and evaluation told once."""
    expected, found = other.weights(), run.weights()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    losses, others = ([(row["step"], row["loss"]) for row in one.rows() if "event" not in row] for one in (run, other))
    assert losses == others and [step for step, _ in losses] == list(range(1, run.max_steps + 1))
    evaluated = [row["step"] for row in run.rows() if row.get("event") == "eval"]
    assert len(set(evaluated)) == len(evaluated)


class Moment(NamedTuple):
    """When to strike: within `window_s` from when `begins` holds, at once where `ends` does."""

    begins: Callable[[Start], bool] = lambda start: True
    ends: Callable[[Start], bool] = lambda start: False
    window_s: float = 0.0
    place: str | None = None  # of PLACES: the start waits there


class Start:
    """One start of `run`: two ranks, each in a session of its own, or `deepspeed` with its launch.py and two ranks."""

    def __init__(self, run: Run, moment: Moment | None = None, *, launcher: bool = False, last: bool = False) -> None:
        """`last`: the run comes to its end, unless it is struck; else it may make AHEAD steps more than are saved."""
        self.run, self.moment, self.launcher = run, moment or Moment(), launcher
        if not last:
            run.max_steps = max(run.max_steps, run.saved_step() + AHEAD)
        self.saved, self.logged = run.saved_step(), run.logged_step()
        self._mark, self._began, self._struck_at = secrets.token_hex(8), time.monotonic(), 0.0
        self._path, port = run.folder / f"{run.name}.out", free_port()
        with self._path.open("w") as output:
            self._commands = [self._open(rank, port, output) for rank in ((0,) if launcher else (0, 1))]

    def _open(self, rank: int, port: int, output: IO[str]) -> subprocess.Popen[bytes]:
        environment, command = rank_environment(rank, 2, port) | {MARK: self._mark}, [sys.executable]
        if self.launcher:
            environment = {name: value for name, value in environment.items() if name not in OF_RANKS}
            command += ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
        script = "launch/train_dpo.py"
        if self.moment.place is not None:
            script, environment["PIVOT_TEST_WAIT"] = "tests/kit/ranks/waiting_train.py", self.moment.place
        command += [script, str(self.run.config), f"train.max_steps={self.run.max_steps}", *OVERRIDES]
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
        )

    # -- what is seen of it ----------------------------------------------------------------------------------------

    def output(self) -> str:
        return self._path.read_text(errors="replace")

    def says(self, pattern: str) -> bool:
        """Whether a line of its output begins so."""
        return re.search(f"^{pattern}", self.output(), re.MULTILINE) is not None

    def steps(self) -> list[int]:
        """The steps that it has made, as its output tells them."""
        return [int(step) for step in re.findall(r"^step (\d+)/", self.output(), re.MULTILINE)]

    def holds(self, files: str) -> bool:
        """Whether the run's folder holds such files, once this start has come to its steps."""
        return self.says("start ") and any(self.run.path.glob(files))

    def require_went_on(self, lost_at_most: int) -> None:
        """AssertionError where it went on from elsewhere than the newest checkpoint, or that one was too old."""
        said = self.output()
        assert "damaged" not in said, said
        found = re.search(r"^start      step (\d+), (resumed|weights) from", said, re.MULTILINE)
        if found is not None:  # it came as far as that
            assert (int(found[1]), found[2]) == (self.saved, "resumed" if self.saved else "weights"), said
            assert self.logged - self.saved <= lost_at_most

    def processes(self) -> dict[int, psutil.Process]:
        """All that live, and their workers."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process
        return found

    def victims(self, name: str) -> list[psutil.Process]:
        """`rank 0`, `rank 1`, both (`ranks`), `deepspeed`, its `launch.py`, or `all` of them; workers are none."""
        found, ranks, launch = self.processes(), {}, []
        for process in found.values():
            with contextlib.suppress(psutil.Error):
                rank, parent = process.environ().get("RANK"), found.get(process.ppid())
                if rank is not None and (parent is None or parent.environ().get("RANK") is None):
                    ranks[f"rank {rank}"] = process
                elif "deepspeed.launcher.launch" in process.cmdline():
                    launch.append(process)
        runner = [found[self._commands[0].pid]] if self.launcher and self._commands[0].pid in found else []
        both = list(ranks.values()) if len(ranks) == 2 else []
        named = {"deepspeed": runner, "launch.py": launch, "ranks": both, "all": [*runner, *launch, *ranks.values()]}
        return named[name] if name in named else [ranks[name]] if name in ranks else []

    # -- what is done to it ----------------------------------------------------------------------------------------

    def strike_in_moment(self, draw: Random, victim: str, number: signal.Signals) -> bool:
        """Send `number` to the victim in a moment of the phase that is drawn; whether it was still that phase."""
        deadline, moment = time.monotonic() + COMES_WITHIN_S, self.moment
        strike_at, victims = None, []
        while True:
            now = time.monotonic()
            if strike_at is None and moment.begins(self):
                strike_at = now + draw.uniform(0.0, moment.window_s)
                victims = self.victims(victim)  # takes longer than some moments
            if strike_at is not None and (now >= strike_at or moment.ends(self)):
                victims = self.victims(victim) if victim == "all" or not victims else victims
                if victims:
                    return self._strike(victims, number)
            ended = all(command.poll() is not None for command in self._commands)
            assert not ended and now < deadline, f"the moment did not come\n{self.output()[-4000:]}"
            time.sleep(0.002)

    def _strike(self, victims: list[psutil.Process], number: signal.Signals) -> bool:
        in_time = self.moment.begins(self) and not self.moment.ends(self)
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        self._struck_at = time.monotonic()
        return in_time

    def wait_for_end(self, within_s: float = LEFT_WITHIN_S) -> float:
        """The seconds from the strike until no process of the start was left; AssertionError where one stays."""
        while left := self._left():
            waited = time.monotonic() - self._struck_at
            assert waited < within_s, (
                f"{waited:.1f} s after the strike: {_describe_processes(left)}\n{self.output()[-4000:]}"
            )
            time.sleep(0.05)
        return time.monotonic() - self._struck_at

    def _left(self) -> list[psutil.Process]:
        for command in self._commands:
            command.poll()  # a child that nobody asks stays as a zombie
        return list(self.processes().values())

    def wait(self) -> list[int]:
        """The exit codes of the commands that were started, once they have come to their end by themselves."""
        return [command.wait(timeout=1200) for command in self._commands]

    def finish(self) -> None:
        """Let it come to its end, which is a good one."""
        try:
            assert set(self.wait()) == {0}, self.output()[-4000:]
        finally:
            self.clear_away()

    def clear_away(self) -> None:
        """Kill what a test that fails has left."""
        for process in self._left():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait()


def _describe_processes(processes: list[psutil.Process]) -> str:
    told = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            told.append(f"process {process.pid} of {process.ppid()}, {process.status()}: {process.cmdline()[:6]}")
    return "; ".join(told)


def _waiting_at(place: str) -> Moment:
    def begins(start: Start) -> bool:
        return start.says(f"waiting at {place}$")

    return Moment(begins, window_s=0.8 * WAIT_S, place=place)


def _is_evaluating(start: Start) -> bool:
    """Behind a step that is not saved: its line is followed by the evaluation's."""
    step = start.steps()[-1] if start.steps() else 0
    return step % (SAVE_EVERY * EVALUATE_EVERY) == EVALUATE_EVERY and not start.says(f"evaluated  step {step} ")


def _has_made_enough(start: Start) -> bool:
    return len(start.steps()) >= ENOUGH


MOMENTS = {place: _waiting_at(place) for place in PLACES} | {
    "start": Moment(ends=lambda start: start.says("start "), window_s=START_S),
    "steps": Moment(lambda start: bool(start.steps()), _has_made_enough, window_s=0.5),
    "saving": Moment(lambda start: start.holds("checkpoints/step-*.tmp"), window_s=0.1),
    "evaluating": Moment(_is_evaluating, window_s=0.2),
    "exporting": Moment(lambda start: start.holds("export/.part"), window_s=0.2),
    "any time": Moment(ends=_has_made_enough, window_s=1.5 * START_S),
}
