"""What DeepSpeed's files hold on every stage, and what becomes of one that somebody changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pivot.run import checkpoint
from tests.kit.ranks.scenarios import build, optim_config, pair, run_step, save_checkpoint, weights, world

CASES = [(stage, bf16, "adamw") for stage in (0, 1, 2, 3) for bf16 in (False, True) if stage or not bf16]
CASES += [(stage, False, "sgd") for stage in (0, 3)]
CANARY = "canary"


class Payload:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def everything(folder: Path) -> None:
    """Two steps, a save, and the way back into an engine of its own; then a payload in each of the files in turn."""
    found: dict[str, Any] = {}
    for stage, bf16, name in CASES:
        found[f"{stage}-{bf16}-{name}"] = save_and_load(folder, stage, bf16, name)
    found["planted"] = planted(folder)
    (folder / f"checkpoints-{dist.get_world_size()}-{dist.get_rank()}.json").write_text(json.dumps(found))


def save_and_load(folder: Path, stage: int, bf16: bool, name: str) -> dict[str, Any]:
    checkpoints = folder / f"checkpoints-{dist.get_world_size()}-{stage}-{bf16}-{name}"
    optim = optim_config(name, frozen=("vision_tower",))
    engine, image = build(folder / "llava", stage, optim, bf16=bf16)
    run_step(engine, [pair(dist.get_rank(), image, with_image=True)], world().size, 0)
    path = save_checkpoint(engine, checkpoints, 1)
    expected = weights(engine)
    run_step(engine, [pair(dist.get_rank() + 5, image, with_image=True)], world().size, 1)
    after = weights(engine)
    again, _ = build(folder / "llava", stage, optim, bf16=bf16)
    before = os.environ | {}
    found = checkpoint.find(checkpoints, world(), print)
    assert found is not None
    checkpoint.load(again, found, world())
    loaded = weights(again)
    run_step(again, [pair(dist.get_rank() + 5, image, with_image=True)], world().size, 1)
    return {
        "equal": all(torch.equal(loaded[key], value) for key, value in expected.items()),
        "goes on equal": all(torch.equal(weights_, after[key]) for key, weights_ in weights(again).items()),
        "bytes": sum(file.stat().st_size for file in path.rglob("*.pt")),
        "estimate": sum(engine.checkpoint_bytes()),
        "environment": before == os.environ,
    }


def planted(folder: Path) -> dict[str, str]:
    """File -> what the load of a checkpoint says that holds a payload there, under a manifest that agrees with it."""
    checkpoints = folder / f"checkpoints-{dist.get_world_size()}-3-False-adamw"
    step = checkpoint.step_folder(checkpoints, 1)
    engine, _ = build(folder / "llava", 3, optim_config("adamw", frozen=("vision_tower",)))
    said = {}
    for name in sorted(path.name for path in step.glob("*.pt")):
        whole = {path: path.read_bytes() for path in (step / name, step / "manifest.json")}
        dist.barrier()
        if dist.get_rank() == 0:
            content = torch.load(step / name, weights_only=False)
            torch.save({**content, "extra": Payload(folder / CANARY)}, step / name)
            manifest = json.loads((step / "manifest.json").read_text())
            manifest["files"][name] = checkpoint._describe(step / name)
            (step / "manifest.json").write_text(json.dumps(manifest))
        dist.barrier()
        found = checkpoint.find(checkpoints, world(), print)
        assert found is not None
        try:
            checkpoint.load(engine, found, world())
            said[name] = "it was loaded"
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)
        if dist.get_world_size() == 1 and not name.startswith("rank"):
            said[f"{name}, unasked"] = load_unasked(engine, found)
        dist.barrier()
        if dist.get_rank() == 0:
            for path, content in whole.items():
                path.write_bytes(content)
        dist.barrier()
    return said


def load_unasked(engine: Any, found: checkpoint.Checkpoint) -> str:
    """Past the look into the files beforehand: what DeepSpeed itself is kept from. Alone, for nobody to wait for."""
    try:
        engine.load(found.folder.parent, found.folder.name)
        return "it was loaded"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
