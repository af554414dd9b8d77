"""The bytes that an engine really holds, on every ZeRO stage, in fp32 and bf16, between two micro-batches."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import torch
import torch.distributed as dist

from pivot.config import COMPONENTS, Config
from pivot.config_check import read_deepspeed_json
from pivot.models.build import resolve_sources
from pivot.models.skeleton import build_skeleton
from pivot.startup.memory import Setup, estimate
from tests.kit.ranks.scenarios import build, optim_config, pair

# (optimizer, frozen components, stage, bf16)
CASES: list[tuple[str, int, int, bool]] = [
    ("adamw", 0, 0, False),
    *(("adamw", 0, stage, bf16) for stage in (1, 2, 3) for bf16 in (False, True)),
    ("sgd", 0, 1, False),
    ("adamw", 2, 2, True),
    ("adamw", 2, 3, True),
]
BUCKET = 100 * 2**20  # larger storages are DeepSpeed's buckets, which it allocates whatever the model's size


def live_storages(model: torch.nn.Module | None = None) -> dict[int, torch.UntypedStorage]:
    """Address -> every tensor's memory in this process; gradients of `model` may be known to C++ alone.

    While the result lives none of its addresses can be given out anew.
    """
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [p.grad for p in (model.parameters() if model is not None else ()) if p.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage for storage in storages}


def measure(folder: Path) -> None:
    """Two micro-batches of the second step: the first ends with all that is kept until the second."""
    found = {}
    config = Config(output_dir="unused", init_from=str(folder / "llava"))
    for name, num_frozen, stage, bf16 in CASES:
        optim = optim_config(name, COMPONENTS[:num_frozen])
        before = live_storages()
        engine, image = build(folder / "llava", stage, optim, bf16=bf16)
        rows = [pair(seed, image, with_image=True) for seed in range(4)]
        held = []
        for step in range(2):
            for number, row in enumerate(rows[2 * step : 2 * step + 2]):
                engine.backward(engine(row).sum(), last=number == 1)
                if step:  # the optimizer's state is there
                    new = [memory.nbytes() for k, memory in live_storages(engine.model).items() if k not in before]
                    held.append(sum(size for size in new if size < BUCKET))
            engine.step(step, measure=False)
        setup = Setup(
            skeleton=build_skeleton(resolve_sources(config).model, 320),
            trained=COMPONENTS[num_frozen:],
            optimizer=name,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            world_size=dist.get_world_size(),
            zero=read_deepspeed_json(f"ds_configs/zero{stage}.json")["zero_optimization"],
            checkpointing="none",
            activations=lambda checkpointing: 0.0,
        )
        found[f"{name}-{num_frozen}-{stage}-{bf16}"] = {"held": max(held), "states": estimate(setup).states}
        del engine
    (folder / f"memory-{dist.get_world_size()}-{dist.get_rank()}.json").write_text(json.dumps(found))
