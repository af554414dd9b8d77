"""What a rank holds ahead of a step: in the run that nobody interrupted, and in a fresh process that goes on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pivot.batch import PackedBatch
from pivot.train import Trainer, train
from tests.kit.ranks.scenarios_finite import TRAIN_STEP, state_of
from tests.kit.ranks.scenarios_train import config_of, cut

STEPS, SAVED = 12, 6
SETTINGS = {"train.max_steps": str(STEPS), "checkpoint.every_steps": str(SAVED), "data.workers": "2"}


def unbroken(folder: Path) -> None:
    with recorded(folder, "unbroken"):
        train(config_of(folder, "unbroken", **SETTINGS))


def resumed(folder: Path) -> None:
    cut(folder, "unbroken", "resumed", keep=(f"step-{SAVED:08d}",))
    with recorded(folder, "resumed"):
        train(config_of(folder, "resumed", **SETTINGS))


def recorded(folder: Path, name: str) -> Any:
    """Keep what there is ahead of step 7, and what is read and set in it; each step draws a number on each rank, and
    another one on each, so that random states that are lost or mixed up are seen."""

    def train_step(trainer: Trainer, step: Any, micro_batches: Iterator[PackedBatch], *rest: Any) -> dict[str, float]:
        ahead = trainer.progress.step == SAVED
        held = {"rng": torch.get_rng_state(), "state": state_of(trainer.engine)} if ahead else {}
        torch.rand(1 + dist.get_rank())
        batches = list(micro_batches)
        metrics = TRAIN_STEP(trainer, step, iter(batches), *rest)
        if ahead:
            held |= {"batches": [digest(batch) for batch in batches]}
            held |= {"rates": {name: value for name, value in metrics.items() if name.startswith("lr/")}}
            held |= {"counts": [int(state["step"]) for state in trainer.engine._optimizer.state.values()]}
            torch.save(held, folder / f"{name}-{dist.get_rank()}.pt")
        return metrics

    return mock.patch("pivot.train.Trainer.train_step", train_step)


def digest(batch: PackedBatch) -> str:
    """Of every tensor of a batch: ids, places, pixels, the reference's log-probs."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            hashed.update(value.numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value):
                add(value[key])
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                add(getattr(value, field.name))

    add(batch)
    return hashed.hexdigest()
