"""Checkpoints written by some ranks under some ZeRO stage, taken over by other ranks under another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pivot.engine import Engine
from pivot.engine.files import SavedShards
from pivot.run import checkpoint
from tests.kit.ranks.scenarios import (
    ADAM_RATES,
    _mine,
    build,
    optim_config,
    pair,
    run_step,
    save,
    save_checkpoint,
    weights,
    world,
)

STAGES = (1, 2, 3)
NUM_PAIRS = 6
DECAYS = {"vision_tower": 0.1, "projector": 0.0, "language_model": 0.01}
Written = tuple[int, bool, tuple[str, ...]]  # (stage, bf16, the components that are frozen)
SOME: list[Written] = [(1, False, ()), (2, False, ()), (3, False, ()), (3, True, ("vision_tower",))]
ALL: list[Written] = [*SOME, (2, True, ()), (3, True, ()), (1, False, ("vision_tower",)), (3, False, ("vision_tower",))]


def name_of(stage: int, bf16: bool, frozen: tuple[str, ...]) -> str:
    return f"zero{stage}{'-bf16' if bf16 else ''}{'-frozen' if frozen else ''}"


def step(engine: Engine, number: int, image: int) -> None:
    pairs = [pair(100 * number + i, image, with_image=i % 3 != 1) for i in range(NUM_PAIRS)]
    run_step(engine, _mine(pairs, 1, image), NUM_PAIRS, number)


def cases(folder: Path) -> list[Written]:
    return ALL if (folder / "all").exists() else SOME


def write(folder: Path) -> None:
    """Two steps, a checkpoint, and a third step that nobody interrupts."""
    for stage, bf16, frozen in cases(folder):
        engine, image = build(folder / "llava", stage, optim_config("adamw", frozen=frozen, decays=DECAYS), bf16=bf16)
        for number in range(2):
            step(engine, number, image)
        _save(engine, folder / f"written-{dist.get_world_size()}" / name_of(stage, bf16, frozen))
        step(engine, 2, image)
        save(folder, f"unbroken-{name_of(stage, bf16, frozen)}", weights(engine))


def read(folder: Path) -> None:
    """Each of them, by this number of ranks under every stage; what was seen goes to a file."""
    seen: dict[str, Any] = {}
    for ranks in sorted(int(path.name.removeprefix("written-")) for path in folder.glob("written-*")):
        for written in cases(folder):
            for stage in STAGES:
                source = folder / f"written-{ranks}" / name_of(*written)
                seen[f"{ranks} ranks {name_of(*written)} -> zero{stage}"] = take_over(folder, source, stage, written)
    if dist.get_rank() == 0:
        (folder / f"seen-{dist.get_world_size()}.json").write_text(json.dumps(seen))


def take_over(folder: Path, source: Path, stage: int, written: Written) -> dict[str, Any]:
    _, bf16, frozen = written
    engine, image = build(folder / "other-llava", stage, optim_config("adamw", frozen=frozen, decays=DECAYS), bf16=bf16)
    found = checkpoint.find(source, world(), print)
    assert found is not None
    checkpoint.load(engine, found, world(), reshaped=True)
    again = folder / f"again-{dist.get_world_size()}" / str(stage) / source.parent.name / source.name
    _save(engine, again)
    held = weights(engine)
    step(engine, 2, image)
    after = weights(engine)
    if dist.get_rank() > 0:
        return {}
    before, now = (SavedShards(path / "step-00000002") for path in (source, again))
    unbroken = torch.load(folder / f"unbroken-{source.name}-{source.parent.name.removeprefix('written-')}.pt")
    dtype = torch.bfloat16 if bf16 else torch.float32
    return {
        "kinds": now.kinds,
        "different": [
            f"{name} {kind}"
            for name in before.names
            for kind in before.kinds
            if not torch.equal(before.read(name, kind), now.read(name, kind))
        ],
        "weights": [
            name
            for name in before.names
            if not torch.equal(held[name].flatten(), before.read(name, "master").to(dtype))
        ],
        "frozen": [
            name
            for name in held
            if any(name.startswith(part) for part in frozen)
            and not torch.equal(held[name].flatten(), before.read_weights(name, dtype))
        ],
        "updates": [now.num_updates(group) for group in range(3 - len(frozen))],
        "rates": [group["lr"] for group in engine._engine.optimizer.param_groups],
        "expected_rates": [rate for name, rate in ADAM_RATES.items() if name not in frozen],
        "decays": [group["weight_decay"] for group in engine._engine.optimizer.param_groups],
        "expected_decays": [decay for name, decay in DECAYS.items() if name not in frozen],
        "off": max(
            float(
                torch.linalg.vector_norm(after[n].float() - w.float())
                / torch.linalg.vector_norm(w.float()).clamp(min=1e-3)
            )
            for n, w in unbroken.items()
        ),
    }


def _save(engine: Engine, folder: Path) -> None:
    save_checkpoint(engine, folder, 2)
