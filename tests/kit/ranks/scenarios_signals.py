"""Runs that are signalled in each of their phases, on real ranks; what each start left goes to `starts-RANK.json`."""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from launch import command
from pivot.config_load import load_config
from pivot.system.preemption import SIGNALS
from pivot.train import Trainer

RUN = """
output_dir: {folder}/{name}
init_from: {folder}/llava
deepspeed: ds_configs/zero3.json
data: {{train: {folder}/set, eval: {folder}/set, cache_dir: {folder}/{cache}, workers: 0}}
objective: {{dpo: {{}}}}
optim: {{vision_tower: {{lr: 2e-4}}, projector: {{lr: 1e-3}}, language_model: {{lr: 5e-4}}}}
train: {{global_batch_size: 6, max_steps: 9, max_tokens_per_micro_batch: 400, seed: 3}}
checkpoint: {{every_steps: {every}}}
evaluate: {{every_steps: 2, num_samples: 4, max_new_tokens: 2}}
"""
WAIT_S = 60.0  # for data that never come; the start must end long before

# phase -> (what is called in it, whether only from the first unsaved step on). The signal comes ahead of that call.
PHASES = {
    "loading": ("pivot.train.build_mllm", False),
    "counting": ("pivot.data.lengths.count_tokens", False),
    "scoring": ("pivot.data.reference_cache.ReferenceCache._score", False),
    "step": ("pivot.train.run_micro_batch", False),
    "save": ("pivot.run.checkpoint._gather_files", False),
    "evaluation": ("pivot.evaluate.pairs._records", True),
    "generation": ("pivot.evaluate.questions._answer", True),
    "data wait": ("pivot.data.loader.Loader._next", True),
    "data wait in scoring": ("pivot.data.loader.Loader._next", False),
    "export": ("pivot.train.Trainer._export", False),
    "writing the export": ("pivot.train.write_model", False),
}
NAMES = [number.name for number in SIGNALS]
ONCE = dict(zip(PHASES, NAMES * 3, strict=False))  # each phase with one signal, each signal with two phases or more


class Start:
    """One start of a run in this process: it gets `number` once, in its phase, where `struck` says so."""

    def __init__(self, phase: str, number: signal.Signals | None, struck: bool) -> None:
        self.phase, self.number, self.struck = phase, number, struck
        self.num_steps, self.unsaved = 0, False

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        target, later = PHASES[self.phase]
        original = pkgutil.resolve_name(target)

        def call(*arguments: Any, **named: Any) -> Any:
            if self.number is not None and (self.unsaved or not later):
                number, self.number = self.number, None
                if self.struck:
                    os.kill(os.getpid(), number)
                    if "data wait" in self.phase:
                        time.sleep(WAIT_S)
            return original(*arguments, **named)

        def inject(rank: int, step: int) -> None:
            self.num_steps += 1

        def count_work(trainer: Trainer, *arguments: Any) -> None:
            counted(trainer, *arguments)
            self.unsaved = True

        counted = Trainer._count_work
        with (
            mock.patch(target, call),
            mock.patch("pivot.system.fault.inject", inject),
            mock.patch("pivot.train.Trainer._count_work", count_work),
        ):
            yield


def run(folder: Path, phase: str, signal_name: str | None, struck: str) -> dict[str, Any]:
    """A start of the phase's run; `struck`: the ranks that get the signal."""
    rank, name = dist.get_rank(), phase.replace(" ", "-")
    number = None if signal_name is None else signal.Signals[signal_name]
    cache = f"cache-{name}-{signal_name}" if "counting" in phase or "scoring" in phase else "cache"
    path = folder / f"{name}-{rank}.yaml"
    path.write_text(RUN.format(folder=folder, name=name, cache=cache, every=1 if phase == "save" else 100))
    start = Start(phase, number, str(rank) in struck)
    before, began = _newest(folder / name), time.monotonic()
    dist.barrier()
    with start.patched():
        code = command.train(load_config(path, [], "dpo"), False)
    seconds = time.monotonic() - began
    dist.barrier()
    status = folder / name / "status"
    gained = _newest(folder / name) - before
    return {
        "phase": phase,
        "signal": signal_name,
        "struck": struck,
        "code": code,
        "status": json.loads(status.read_text()) if status.is_file() else {},
        "steps": start.num_steps,
        "saved": gained,
        "seconds": seconds,
    }


def _newest(folder: Path) -> int:
    return max((int(path.parent.name[-8:]) for path in folder.glob("checkpoints/step-*/manifest.json")), default=0)


def _strike(folder: Path, signals_of: dict[str, list[str]]) -> None:
    found = []
    for phase, names in signals_of.items():
        for number, name in enumerate(names):
            struck = "0" if phase == "counting" else ("01", "0", "1")[number % 3]  # rank 0 alone counts
            if phase == "writing the export":
                struck = "0"
            found.append(run(folder, phase, name, struck))
        found.append(run(folder, phase, None, ""))
    (folder / f"starts-{dist.get_rank()}.json").write_text(json.dumps(found, indent=1))


def once(folder: Path) -> None:
    _strike(folder, {phase: [name] for phase, name in ONCE.items()})


def every(folder: Path) -> None:
    _strike(folder, {phase: NAMES if phase != "writing the export" else NAMES[:1] for phase in PHASES})


def files(folder: Path) -> None:
    """RUN/save after the first step, RUN/stop after the third; once more with a RUN/stop from before the start."""
    rank, path = dist.get_rank(), folder / f"files-{dist.get_rank()}.yaml"
    path.write_text(RUN.format(folder=folder, name="files", cache="cache", every=100))
    config, seen = load_config(path, ["evaluate.every_steps=0"], "dpo"), []

    def inject(rank: int, step: int) -> None:
        seen.append((step, _newest(folder / "files"), (folder / "files/save").exists()))
        if rank == 0 and step in (1, 3):
            (folder / "files" / {1: "save", 3: "stop"}[step]).touch()
        if step > 3:
            time.sleep(0.5)  # rank 0 looks for it every two seconds

    with mock.patch("pivot.system.fault.inject", inject):
        codes = [command.train(config, False)]
    newest = _newest(folder / "files")
    status = json.loads((folder / "files/status").read_text())
    left = [name for name in ("stop", "save") if (folder / "files" / name).exists()]
    dist.barrier()
    (folder / "files/stop").touch()
    dist.barrier()
    codes.append(command.train(config, False))
    told = {"codes": codes, "seen": seen, "newest": newest, "status": status, "left": left}
    (folder / f"files-{rank}.json").write_text(json.dumps(told))
