"""The first screen on real ranks: who measures, and what becomes of a rank that has too little memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from pivot.startup import memory, screen
from pivot.startup.inputs import open_inputs
from pivot.system import distributed
from tests.kit.ranks.scenarios_train import config_of


def screens(folder: Path) -> None:
    """As it is; with next to nothing on the last rank; with a measurement that fails."""
    config = config_of(folder, "never")
    world = distributed.start(60)
    inputs = open_inputs(config, world, world.say)
    found: dict[str, Any] = {}
    with mock.patch.object(screen, "measure_activations", wraps=screen.measure_activations) as measured:
        found["screen"] = screen.first_screen(config, inputs, world)
        found["measured"] = measured.call_count
    little = (64.0, 64.0) if dist.get_rank() == dist.get_world_size() - 1 else memory.available_memory(world)
    with mock.patch.object(memory, "available_memory", lambda world: little):
        found["little"] = _error_of(lambda: screen.first_screen(config, inputs, world))
    with mock.patch.object(screen, "measure_activations", side_effect=RuntimeError("no such kernel")):
        found["failed"] = _error_of(lambda: screen.first_screen(config, inputs, world))
    (folder / f"screens-{dist.get_rank()}.json").write_text(json.dumps(found))


def _error_of(call: Any) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"
