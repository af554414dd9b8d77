"""What is not finite, on one rank: engines of every stage that must skip it, and runs that must not keep it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from pivot.engine import Engine
from pivot.train import Trainer, train
from tests.kit.ranks.scenarios import _mine, build, optim_config, pair, run_step
from tests.kit.ranks.scenarios_train import config_of, cut

CASES = [(0, False), *((stage, bf16) for stage in (1, 2, 3) for bf16 in (False, True))]  # stage, bf16
POISONS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
COMPONENTS = ("vision_tower", "language_model")
CLIPPING = (0.5, 0.0)
NUM_PAIRS = 4
CALL, TRAIN_STEP = Engine.__call__, Trainer.train_step


def everything(folder: Path) -> None:
    for scenario in (steps, runs):
        scenario(folder)


def steps(folder: Path) -> None:
    """A good step, poisoned ones, a good step; beside an engine that sees the good ones alone."""
    for stage, bf16 in CASES:
        for clipping in CLIPPING:
            optim = optim_config("adamw", max_grad_norm=clipping)
            poisoned, image = build(folder / "llava", stage, optim, bf16=bf16)
            spared, _ = build(folder / "llava", stage, optim, bf16=bf16)
            found: dict[str, Any] = {}
            take(poisoned, image, 0)
            take(spared, image, 0)
            for number, (name, component) in enumerate(itertools.product(POISONS, COMPONENTS)):
                measure = number in (0, 3, 4)  # each value and each component measured once and not once
                before = state_of(poisoned)
                with poison(poisoned, component, POISONS[name]):
                    metrics = take(poisoned, image, 1, measure=measure)
                found[f"{name} in {component}"] = {"same": same(before, state_of(poisoned)), "metrics": metrics}
            found["good steps"] = {"metrics": [take(engine, image, 2) for engine in (poisoned, spared)]}
            found["good steps"]["same"] = same(state_of(poisoned), state_of(spared))
            place = f"{dist.get_world_size()}-{dist.get_rank()}"
            torch.save(found, folder / f"stage{stage}-{bf16}-{clipping}-{place}.pt")


def take(engine: Engine, image: int, step: int, *, measure: bool = True) -> dict[str, float]:
    pairs = [pair(100 * step + i, image, with_image=True) for i in range(NUM_PAIRS)]
    return run_step(engine, _mine(pairs, 2, image), NUM_PAIRS, step, measure=measure)


def state_of(engine: Engine) -> list[Tensor]:
    """This rank's share of the weights and of the optimizer's state."""
    state = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.model.parameters()]
    for master, values in engine._optimizer.state.items():
        state += [master, *(value for value in values.values() if torch.is_tensor(value))]
    return [tensor.detach().clone() for tensor in state]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@contextmanager
def poison(engine: Engine, component: str, value: float) -> Iterator[None]:
    """One element of one gradient, on the last rank alone."""

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    weight = next(p for name, p in engine.model.get_submodule(component).named_parameters() if name.endswith("weight"))
    hook = weight.register_hook(spoil) if dist.get_rank() == dist.get_world_size() - 1 else None
    yield
    if hook is not None:
        hook.remove()


# -- runs ----------------------------------------------------------------------------------------------------------


def runs(folder: Path) -> None:
    """Steps count from 1. All on ZeRO-0, except for the last."""
    attempt(folder, "one step", {3})
    attempt(folder, "three steps", {3, 4, 5})
    attempt(folder, "three steps", set())
    attempt(folder, "weights", {3}, spoil=spoil_weights)
    attempt(folder, "weights", set())
    attempt(folder, "one step of ZeRO-2", {3}, deepspeed="ds_configs/zero2.json")
    attempt(folder, "gradient", {3}, spoil=spoil_gradients)
    with mock.patch("pivot.run.guard.FEWEST", 3):
        attempt(folder, "spike", {5}, spoil=raise_loss, **{"checkpoint.keep": "9"})
        cut(folder, "spike", "spike again", keep=("step-00000004",))
        if dist.get_rank() == 0:
            shutil.copy(folder / "spike" / "log.jsonl", folder / "spike again")
        attempt(folder, "spike again", {5}, spoil=raise_loss)


def attempt(folder: Path, name: str, bad_steps: set[int], *, spoil: Any = None, **changes: str) -> None:
    """A run of six steps that keeps two checkpoints; on the last rank `bad_steps` are spoilt, by default with NaN as
    log-probs."""
    changes = {"deepspeed": "ds_configs/zero0.json", "train.max_steps": "6"} | changes
    changes = {"checkpoint.keep": "2"} | changes | {"checkpoint.every_steps": "1", "log.every_steps": "2"}
    bad = bad_steps if dist.get_rank() == dist.get_world_size() - 1 else set()
    with mock.patch("pivot.train.Trainer.train_step", (spoil or spoil_logps)(bad)):
        try:
            text = train(config_of(folder, name, **changes))
        except RuntimeError as error:
            text = str(error)
    with (folder / f"{name}-{dist.get_rank()}.txt").open("a") as file:
        file.write(text + "\n")
    dist.barrier()


def raise_loss(bad_steps: set[int]) -> Any:
    return spoil_logps(bad_steps, 50.0)


def spoil_gradients(bad_steps: set[int]) -> Any:
    def spoilt(trainer: Trainer, *arguments: Any) -> dict[str, float]:
        if trainer.progress.step + 1 not in bad_steps:
            return TRAIN_STEP(trainer, *arguments)
        with poison(trainer.engine, "language_model", float("inf")):
            return TRAIN_STEP(trainer, *arguments)

    return spoilt


def spoil_logps(bad_steps: set[int], by: float = float("nan")) -> Any:
    def spoilt(trainer: Trainer, *arguments: Any) -> dict[str, float]:
        factor = by if trainer.progress.step + 1 in bad_steps else 1.0
        with mock.patch.object(Engine, "__call__", lambda engine, batch: factor * CALL(engine, batch)):
            return TRAIN_STEP(trainer, *arguments)

    return spoilt


def spoil_weights(bad_steps: set[int]) -> Any:
    def spoilt(trainer: Trainer, *arguments: Any) -> dict[str, float]:
        metrics = TRAIN_STEP(trainer, *arguments)
        if trainer.progress.step + 1 in bad_steps:
            next(trainer.model.parameters()).data.view(-1)[0] = float("nan")
        return metrics

    return spoilt
