"""Checkpoints that are written in the background, with writers that are slow or fail; what was seen goes to files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from launch import command
from pivot.engine import Engine
from pivot.run import checkpoint, writing
from tests.kit.ranks.scenarios import build, optim_config, pair, run_step, weights, world
from tests.kit.ranks.scenarios_train import config_of

CASES = [(0, False), *((stage, bf16) for stage in (1, 2, 3) for bf16 in (False, True))]  # stage, bf16
WRITE = writing.write_file
LIMIT_S = 60.0
Before = Callable[[Path], None]


def everything(folder: Path) -> None:
    for scenario in (equality, runs):
        scenario(folder)


@contextlib.contextmanager
def before_each_file(act: Before) -> Iterator[None]:
    """`act` runs with the path of each file that a thread is about to write."""

    def write(value: Any, path: Path, stopped: threading.Event) -> dict[str, Any]:
        if threading.current_thread().name == "checkpoint":
            act(path)
        return WRITE(value, path, stopped)

    with mock.patch("pivot.run.writing.write_file", write):
        yield


def ranks_folder(folder: Path, name: str) -> Path:
    return folder / f"{name}-{dist.get_rank()}.json"


# -- the files -----------------------------------------------------------------------------------------------------


def equality(folder: Path) -> None:
    """Saved after the first step: at once, and in the background while two more steps are made."""
    found = {}
    for stage, bf16 in CASES:
        engine, image = build(folder / "llava", stage, optim_config("adamw", frozen=("vision_tower",)), bf16=bf16)
        take(engine, image, 0)
        at_once, gate = begin(engine, folder / f"at-once-{stage}-{bf16}", in_background=False), threading.Event()
        checkpoint.publish(at_once, world(), keep=2, say=print)
        with before_each_file(lambda _, gate=gate: gate.wait(LIMIT_S)):  # type: ignore[misc]
            behind = begin(engine, folder / f"behind-{stage}-{bf16}", in_background=True)
            saved = weights(engine)
            for step in (1, 2):
                take(engine, image, step)
            early = behind.writer.is_done or any(behind.writer.folder.glob("*.pt"))
            dist.barrier()
            gate.set()
            seconds = checkpoint.publish(behind, world(), keep=2, say=print)
        after = weights(engine)
        dist.barrier()
        found[f"{stage}-{bf16}"] = {
            "early": early,
            "trained": any(not value.equal(after[name]) for name, value in saved.items()),
            "different": unlike(at_once.final, behind.final),
            "seconds": seconds,
        }
    ranks_folder(folder, "equality").write_text(json.dumps(found))


def take(engine: Engine, image: int, step: int) -> None:
    run_step(engine, [pair(10 * step + dist.get_rank(), image, with_image=True)], world().size, step)


def begin(engine: Engine, checkpoints: Path, *, in_background: bool) -> checkpoint.Unpublished:
    return checkpoint.begin(
        engine,
        checkpoints,
        1,
        world(),
        state={"a": 1},
        facts={},
        size_bytes=sum(engine.checkpoint_bytes()),
        in_background=in_background,
    )


def unlike(one: Path, other: Path) -> list[str]:
    """The files that only one of them has, or whose content differs: of DeepSpeed's files any byte."""
    names = {path.name for folder in (one, other) for path in folder.iterdir()} - {"manifest.json"}
    return sorted(name for name in names if not _same(one / name, other / name))


def _same(one: Path, other: Path) -> bool:
    if not one.is_file() or not other.is_file():
        return False
    if one.name.startswith(
        "rank-"
    ):  # a copy's keys are other objects than torch.save's own words, so it says them anew
        first, second = torch.load(one), torch.load(other)
        return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return one.read_bytes() == other.read_bytes()


# -- runs ----------------------------------------------------------------------------------------------------------


class Seen:
    """What one start of a run shows: at the beginning of each step the checkpoints there, and how it ended."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.steps: list[tuple[int, list[str]]] = []
        self.writing, self.most_writing = 0, 0

    def start(self, *, at_step: Callable[[int], object] = lambda step: None, **changes: str) -> dict[str, Any]:
        def inject(rank: int, step: int) -> None:
            self.steps.append((step, self.published()))
            at_step(step)

        changes = {"checkpoint.asynchronous": "true", "data.workers": "0"} | changes
        with mock.patch("pivot.system.fault.inject", inject):
            code = command_code(config_of(self.folder, self.name, **changes))
        dist.barrier()
        told = {
            "code": code,
            "steps": self.steps,
            "published": self.published(),
            "half-written": sorted(path.name for path in self.run.glob("checkpoints/*.tmp")),
            "status": json.loads((self.run / "status").read_text()),
            "most_writing": self.most_writing,
            "threads": [thread.name for thread in threading.enumerate() if thread.name == "checkpoint"],
        }
        dist.barrier()
        return told

    @property
    def run(self) -> Path:
        return self.folder / self.name

    def published(self) -> list[str]:
        return sorted(path.parent.name for path in self.run.glob("checkpoints/step-*/manifest.json"))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """How many threads write at a time."""
        original = writing.Writer._write_copies

        def write_copies(writer: writing.Writer) -> None:
            self.writing += 1
            self.most_writing = max(self.most_writing, self.writing)
            original(writer)
            self.writing -= 1

        with mock.patch("pivot.run.writing.Writer._write_copies", write_copies):
            yield


def command_code(config: Any) -> int:
    """As launch/train_dpo.py ends."""
    try:
        return command.train(config, False)
    except Exception as error:
        return command.tell_error(error)


def runs(folder: Path) -> None:
    found: dict[str, Any] = {}
    scenarios = (unbroken, slow_on_one_rank, fails_on_one_rank, fails_elsewhere, signalled, asked_for, evaluated)
    for scenario in (*scenarios, without_room, kept_for_ever):
        if dist.get_rank() == 0:
            print(f"--- {scenario.__name__}", flush=True)
        found[scenario.__name__] = scenario(folder)
    ranks_folder(folder, "runs").write_text(json.dumps(found))


def unbroken(folder: Path) -> list[dict[str, Any]]:
    return [Seen(folder, "unbroken").start(**{"checkpoint.asynchronous": "false"})]


def slow_on_one_rank(folder: Path) -> list[dict[str, Any]]:
    """Rank 1 writes nothing of step 2 before somebody has waited for it for a second: the save of step 4."""
    gate, seen, original = threading.Event(), Seen(folder, "slow"), checkpoint.publish

    def hold(path: Path) -> None:
        if dist.get_rank() == 1 and "step-00000002" in str(path):
            assert gate.wait(LIMIT_S)

    def publish(*arguments: Any, **named: Any) -> float:
        threading.Timer(1.0, gate.set).start()
        return original(*arguments, **named)

    with before_each_file(hold), seen.counting(), mock.patch("pivot.run.checkpoint.publish", publish):
        return [seen.start()]


def fails_on_one_rank(folder: Path) -> list[dict[str, Any]]:
    """A full disk for rank 1's files of step 4; then there is room again."""

    def fail(path: Path) -> None:
        if dist.get_rank() == 1 and "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with before_each_file(fail):
        first = Seen(folder, "failed").start()
    return [first, Seen(folder, "failed").start()]


def fails_elsewhere(folder: Path) -> list[dict[str, Any]]:
    """An error on all ranks in step 3, in the middle of the checkpoint of step 2; then the run goes on in this process,
    where a thread that were still at work would write into the new files."""

    def fail(step: int) -> None:
        if step == 3:
            raise RuntimeError("an error of training")

    with before_each_file(lambda path: time.sleep(2.0)):
        first = Seen(folder, "raised").start(at_step=fail)
    return [first, Seen(folder, "raised").start()]


def signalled(folder: Path) -> list[dict[str, Any]]:
    """SIGUSR2 to rank 0 in step 3, while rank 1 writes the checkpoint of step 2 until two seconds later."""

    def strike(step: int) -> None:
        if step == 3 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGUSR2)

    with held_up_into_step_3() as open_later:
        first = Seen(folder, "signalled").start(at_step=lambda step: (open_later(step), strike(step)))
    return [first, Seen(folder, "signalled").start()]


@contextlib.contextmanager
def held_up_into_step_3() -> Iterator[Callable[[int], None]]:
    """Rank 1 writes the checkpoint of step 2 two seconds after step 3 began; what is given out sees the steps."""
    gate = threading.Event()

    def hold(path: Path) -> None:
        if dist.get_rank() == 1 and "step-00000002" in str(path):
            assert gate.wait(LIMIT_S)

    def open_later(step: int) -> None:
        if step == 3:
            threading.Timer(2.0, gate.set).start()

    with before_each_file(hold):
        yield open_later


def asked_for(folder: Path) -> list[dict[str, Any]]:
    """RUN/save in step 1, with a writer that takes its time: it is there before the next step begins."""

    def ask(step: int) -> None:
        if step == 1 and dist.get_rank() == 0:
            (folder / "asked" / "save").touch()

    with before_each_file(lambda _: time.sleep(0.3)):
        return [Seen(folder, "asked").start(at_step=ask, **{"checkpoint.every_steps": "0"})]


def evaluated(folder: Path) -> list[dict[str, Any]]:
    """Behind step 3, while the checkpoint of step 2 is being written."""
    changes = {"data.eval": str(folder / "set"), "evaluate.num_samples": "4", "evaluate.max_new_tokens": "1"}
    with held_up_into_step_3() as open_later:
        return [Seen(folder, "evaluated").start(at_step=open_later, **changes, **{"evaluate.every_steps": "3"})]


def without_room(folder: Path) -> list[dict[str, Any]]:
    """Rank 1's machine has no memory left for copies."""
    free = 1e12 if dist.get_rank() == 0 else 1e3
    with mock.patch("pivot.system.host_memory.available_bytes", lambda: free):
        return [Seen(folder, "full-memory").start()]


def kept_for_ever(folder: Path) -> list[dict[str, Any]]:
    """Steps 1 to 5, two newest kept and every second for ever; the room asked for at the start is that of four."""
    asked = []
    original = checkpoint.require_space

    def require_space(path: Path, size: int, number: int = 1) -> None:
        asked.append(number)
        original(path, size, number)

    changes = {"checkpoint.every_steps": "1", "checkpoint.keep": "2", "checkpoint.keep_every_steps": "2"}
    with mock.patch("pivot.run.checkpoint.require_space", require_space):
        told = Seen(folder, "kept").start(**changes)
    return [told | {"asked": asked}]
