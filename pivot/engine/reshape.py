"""Going on from a checkpoint that another number of ranks or another ZeRO stage wrote, bit by bit.

Each rank maps all shards and reads its own part, a parameter at a time: no second copy of the model comes into memory,
and nothing is converted on disk. Whole weights are read by rank 0 alone where ZeRO-3 cuts them, else by every rank.
Rates, decay and betas are the config's, as ever; of a checkpoint none count.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from pivot.engine.files import MASTER, SavedShards
from pivot.system import distributed
from pivot.system.distributed import World


@torch.no_grad()
def load_reshaped(
    folder: Path, engine: Any, optimizer: torch.optim.Optimizer, trained: list[list[nn.Parameter]], world: World
) -> None:
    """Fill DeepSpeed's `engine` from the shards in `folder`. Collective. `trained`: each group's parameters, in order.

    ValueError where the shards are not of this model; RuntimeError where DeepSpeed holds other weights afterwards.
    """
    stage = int(engine.zero_optimization_stage())
    saved = SavedShards(folder)
    if stage == 0 or not saved.names:
        raise ValueError(
            f"{folder}: ZeRO-0 keeps the optimizer's state in no shards, so neither can it go on from another stage or "
            "number of ranks, nor they from it; set deepspeed and the number of ranks back"
        )
    name_of = {parameter: name for name, parameter in engine.module.named_parameters()}
    _require_same_parameters(saved, [name_of[parameter] for group in trained for parameter in group])
    parts: dict[nn.Parameter, slice] = {}
    for index, (parameters, master) in enumerate(zip(trained, _masters(engine.optimizer), strict=True)):
        moments = {kind: torch.zeros_like(master) for kind in saved.kinds if kind != MASTER}
        for parameter, own, place in _placements(parameters, stage, world):
            parts[parameter] = own
            for kind, target in ({MASTER: master} | moments).items():
                values = saved.read(name_of[parameter], kind, own)
                target[place.start : place.start + len(values)].copy_(values)
        if moments:
            optimizer.state[master] = {"step": _count_of(saved.num_updates(index), optimizer, master), **moments}
    unlike = [
        name
        for name, parameter in engine.module.named_parameters()
        if saved.holds_weights(name) and not _set_weights(saved, name, parameter, parts.get(parameter), world)
    ]
    with distributed.shared_failure(f"going on from {folder}"):
        if unlike:
            raise RuntimeError(
                f"{unlike[0]}: DeepSpeed {deepspeed.__version__} holds another master weight than the checkpoint's, so "
                "its parts lie elsewhere than expected; go on with the number of ranks and the ZeRO stage before"
            )


def _count_of(num_updates: int, optimizer: torch.optim.Optimizer, master: Tensor) -> Any:
    """As the optimizer keeps it: torch's in a tensor beside the weights, DeepSpeed's own in a plain number."""
    is_torchs = isinstance(optimizer, torch.optim.AdamW)
    return torch.tensor(float(num_updates), device=master.device) if is_torchs else num_updates


def _masters(optimizer: Any) -> list[Tensor]:
    """This rank's flat fp32 part of each trained component, by the names that DeepSpeed's optimizers give it."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise RuntimeError(
        f"DeepSpeed {deepspeed.__version__}'s {type(optimizer).__name__} keeps its master weights elsewhere than "
        "known; go on with the number of ranks and the ZeRO stage before"
    )


def _placements(parameters: list[Any], stage: int, world: World) -> Iterator[tuple[Any, slice, slice]]:
    """(parameter, which of its elements this rank keeps, where they lie in the rank's flat part of the group)."""
    start = 0
    for parameter in parameters:
        if stage == 3:  # every parameter is cut into equal parts, the last one padded
            part = -(-parameter.ds_numel // world.size)
            own, place = slice(part * world.rank, part * (world.rank + 1)), slice(start, start + part)
            start += part
        elif parameter._hp_mapping is None:  # none of it is this rank's
            continue
        else:
            inside, flat = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
            own = slice(inside.start, inside.start + inside.numel)
            place = slice(flat.start, flat.start + flat.numel)
        yield parameter, own, place


def _set_weights(saved: SavedShards, name: str, parameter: Any, own: slice | None, world: World) -> bool:
    """Set a whole weight; whether its master, if any, is the same (under ZeRO-3 in the part `own`). Collective."""
    partitioned, trained = hasattr(parameter, "ds_id"), parameter.requires_grad
    whole = None
    with deepspeed.zero.GatheredParameters([parameter] if partitioned else [], modifier_rank=0):
        if not partitioned or world.is_main:
            whole = saved.read(name, MASTER) if trained else saved.read_weights(name, parameter.dtype)
            assert whole is not None  # the shards hold it
            parameter.data.copy_(whole.view(parameter.ds_shape if partitioned else parameter.shape))
    if not trained:
        return True
    held = deepspeed.utils.safe_get_full_fp32_param(parameter)
    if held is None:
        return False
    if partitioned:
        assert own is not None  # ZeRO-3 gives each rank a part of every parameter
        return torch.equal(held.flatten()[own].cpu(), saved.read(name, MASTER, own))
    return whole is not None and torch.equal(held.flatten().cpu(), whole)


def _require_same_parameters(saved: SavedShards, trained: list[str]) -> None:
    unlike = sorted(set(saved.names) ^ set(trained))
    if unlike:
        raise ValueError(
            f"{saved.folder}: its shards train {len(saved.names)} parameters, this run {len(trained)}; the first that "
            f"only one of them has is {unlike[0]}"
        )
