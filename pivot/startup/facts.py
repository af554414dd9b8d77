"""What the log's first row says of a run: machine, model, data and versions, to place a result years later."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pivot
from pivot.startup.inputs import Inputs
from pivot.system.distributed import World

VERSIONS = ("torch", "transformers", "deepspeed", "open_clip_torch", "webdataset")


def start_facts(inputs: Inputs, world: World) -> dict[str, Any]:
    components, plan = inputs.skeleton.components, inputs.plan
    return {
        "world_size": world.size,
        "attention": str(inputs.attention),
        "dtype": str(inputs.dtype),
        "device": str(world.device),
        "total_steps": inputs.total_steps,
        "num_parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in components.items()},
        "vision_tower": repr(inputs.skeleton.vision_tower),
        "num_pairs": plan.num_pairs,
        "exclusions": plan.exclusions,
        "plan_fingerprint": plan.fingerprint,
        "versions": {"pivot": pivot.__version__} | {name: version(name) for name in VERSIONS},
    }
