"""What a run needs before it loads weights: settings resolved against the machine, data opened, steps planned."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pivot.batch import CHOSEN, REJECTED
from pivot.config import COMPONENTS, Config, ConfigError, TrainSource
from pivot.config_check import read_deepspeed_json, read_train_sources
from pivot.data.exclude import read_excluded
from pivot.data.lengths import build_lengths, load_lengths
from pivot.data.loader import Loader
from pivot.data.order import build_mixture
from pivot.data.plan import Plan
from pivot.data.remote import WINDOW_SHARDS, ShardCache
from pivot.data.shards import ShardSet
from pivot.engine import build_deepspeed_config
from pivot.evaluate.held_out import HeldOut, open_held_out
from pivot.models.attention import Choice, choose_attention
from pivot.models.build import Sources, settle_sources
from pivot.models.language import check_positions, check_text_config
from pivot.models.skeleton import Skeleton, build_skeleton
from pivot.objectives import Objective, build_objective
from pivot.pretrained import read_text_config
from pivot.processor import Processor, build_processor
from pivot.run.folder import flatten
from pivot.startup.flops import training_costs
from pivot.system import distributed
from pivot.system.distributed import World

LANGUAGE_MODEL = COMPONENTS[-1]  # the one that text alone goes through

Say = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """What a run needs to know before it loads weights."""

    sources: Sources
    reference: Sources  # of the reference model's weights: by default those that the run starts from
    skeleton: Skeleton
    processor: Processor
    objective: Objective
    shards: ShardSet
    cache_dir: Path
    plan_settings: dict[str, Any]
    plan: Plan
    held_out: HeldOut | None  # of data.eval
    total_steps: int
    deepspeed: dict[str, Any]
    dtype: torch.dtype
    attention: Choice  # the back end of the prefix trees
    warning: str | None  # of positions that the language model was not trained on

    def another_plan(self, **changes: Any) -> Plan:
        """Another walk over the same pairs; `changes` are arguments of Plan."""
        return Plan(**(self.plan_settings | changes))


def open_inputs(config: Config, world: World, say: Say) -> Inputs:
    """Open and check everything but the weights. Collective: rank 0 counts tokens where no side-car has them."""
    require_same_settings(config)
    dtype = _settle_dtype(config.train.precision, world)
    max_grad_norm = config.optim.max_grad_norm
    settings = read_deepspeed_json(config.deepspeed)
    deepspeed = build_deepspeed_config(settings, max_grad_norm=max_grad_norm, bf16=dtype == torch.bfloat16)
    objective = build_objective(config.objective)
    sources = settle_sources(config)
    folder = config.objective.dpo.reference if config.objective.dpo is not None else None
    reference = sources if folder is None else settle_sources(replace(config, init_from=folder, init_parts=None))
    processor = build_processor(sources.model, config.data)
    skeleton = build_skeleton(sources.model, len(processor.tokenizer))
    positions = check_positions(skeleton.text_config, _longest_text(config))
    if folder is not None:  # the reference scores the same rows
        path = reference.model.language_model.path or folder
        text_config = read_text_config(path)
        check_text_config(text_config, path)
        check_positions(text_config, config.data.max_tokens)
    attention = _settle_attention(config.train.attention, skeleton, world.device, dtype)
    shards = open_data(config)
    cache_dir = distributed.broadcast(settle_cache_dir(config, config.data.train))
    with distributed.shared_failure("counting tokens"):
        if world.is_main:
            build_lengths(
                shards,
                processor,
                cache_dir,
                lambda done, of: say(f"counting tokens: {done} of {of}"),
                config.data.workers,
            )
    plan_settings = settle_plan(config, shards, processor, cache_dir, world, skeleton)
    plan = Plan(**plan_settings)
    _require_images(config, plan)
    distributed.require_equal("the data plan", plan.fingerprint)
    steps = config.train.max_steps or math.ceil((config.train.num_epochs or 0) * plan.steps_per_epoch)
    held_out = _open_held_out(config, processor, objective, world, say)
    return Inputs(
        sources=sources,
        reference=reference,
        skeleton=skeleton,
        processor=processor,
        objective=objective,
        shards=shards,
        cache_dir=cache_dir,
        plan_settings=plan_settings,
        plan=plan,
        held_out=held_out,
        total_steps=max(1, steps),
        deepspeed=deepspeed,
        dtype=dtype,
        attention=attention,
        warning=positions,
    )


def _require_images(config: Config, plan: Plan) -> None:
    """Raise ValueError where what images go through is trained without any: only weight decay would move it."""
    lost = [name for name in config.optim.trained() if name != LANGUAGE_MODEL]
    if lost and not plan.num_with_images:
        raise ValueError(
            f"optim.{lost[0]}.lr is {config.optim.component(lost[0]).lr:g}, but none of the {int(plan.kept.sum())} "
            "samples of data.train has an image; pack the data with its images (python -m data_tools info counts "
            f"them), or freeze {' and '.join(lost)} with lr: null"
        )


# What the machines of a run may have of their own: it decides no number, and no step waits for it elsewhere.
_FREE_ON_RANKS = ("data.workers", "data.cache_dir", "data.shard_cache", "data.shard_cache_gb")


def require_same_settings(config: Config) -> None:
    """ConfigError on every rank, naming key, ranks and values, unless all have the same settings. Collective."""
    mine = {key: repr(value) for key, value in flatten(config).items() if key not in _FREE_ON_RANKS}
    mine |= {f"deepspeed's {key}": repr(value) for key, value in read_deepspeed_json(config.deepspeed).items()}
    if len(set(distributed.gather(hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()))) == 1:
        return
    ranks = distributed.gather(mine)
    differences = []
    for key in sorted(set().union(*ranks)):
        values = [rank.get(key, "absent") for rank in ranks]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differences.append(f"{key} is {values[0]} on rank 0 and {values[other]} on rank {other}")
    more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
    raise ConfigError(
        f"the ranks have different settings ({'; '.join(differences[:5])}{more}); start all of them with the same "
        "command line and the same files"
    )


def _open_held_out(
    config: Config, processor: Processor, objective: Objective, world: World, say: Say
) -> HeldOut | None:
    if config.data.eval is None:
        return None
    return open_held_out(
        config.data.eval,
        processor,
        world,
        roles=objective.roles,
        cache_dir=distributed.broadcast(settle_cache_dir(config, config.data.eval)),
        num_samples=config.evaluate.num_samples,
        max_tokens=config.data.max_tokens,
        max_tokens_per_micro_batch=config.train.max_tokens_per_micro_batch,
        say=say,
        shard_cache=_shard_cache(config),
    )


def _longest_text(config: Config) -> int:
    """Tokens of the longest text that the language model may see: a pair, or a held-out prompt with its answer."""
    return config.data.max_tokens + (0 if config.data.eval is None else config.evaluate.max_new_tokens)


def _settle_dtype(precision: str, world: World) -> torch.dtype:
    """Of all ranks. Collective: auto is bf16 where each rank's GPU computes in it, not by emulation, which is slow."""
    if precision == "auto":
        fast = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if all(distributed.gather(fast)) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _settle_attention(wanted: str, skeleton: Skeleton, device: torch.device, dtype: torch.dtype) -> Choice:
    heads = int(skeleton.text_config.num_attention_heads)
    return choose_attention(
        wanted,
        device=device,
        dtype=dtype,
        heads=heads,
        key_heads=int(getattr(skeleton.text_config, "num_key_value_heads", None) or heads),
        head_size=skeleton.head_size,
    )


def open_data(config: Config) -> ShardSet:
    """The sets of `data.train`, joined; the shards of remote ones are fetched when they are read."""
    paths = [source.path for source in read_train_sources(config.data.train)]
    shards = ShardSet.join([ShardSet.open(path, _shard_cache(config)) for path in paths])
    shards.check_cache()
    return shards


def _shard_cache(config: Config) -> ShardCache:
    """Of training and evaluation alike; a local set does not touch it."""
    folder = config.data.shard_cache or settle_cache_dir(config, config.data.train) / "fetched"
    return ShardCache(folder, int(config.data.shard_cache_gb * 1e9), allow_pipe=config.data.allow_pipe)


def settle_cache_dir(config: Config, data: Any) -> Path:
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    beside = Path(read_train_sources(data)[0].path)
    return beside if os.access(beside, os.W_OK) else Path(config.output_dir) / "cache"


def build_plan(
    config: Config, shards: ShardSet, processor: Processor, cache_dir: Path, world: World, **changes: Any
) -> Plan:
    """The run's plan for those who need nothing else of its inputs; `changes` are arguments of Plan."""
    skeleton = build_skeleton(settle_sources(config).model, len(processor.tokenizer))
    return Plan(**(settle_plan(config, shards, processor, cache_dir, world, skeleton) | changes))


def settle_plan(
    config: Config, shards: ShardSet, processor: Processor, cache_dir: Path, world: World, skeleton: Skeleton
) -> dict[str, Any]:
    """The arguments of the run's Plan."""
    sources = read_train_sources(config.data.train)
    plain = len(sources) == 1 and sources[0] == TrainSource(sources[0].path)
    return {
        "fingerprint": shards.fingerprint,
        "shard_sizes": shards.shard_sizes,
        "lengths": load_lengths(shards, processor, cache_dir),
        "seed": config.train.seed,
        "global_batch_size": config.train.global_batch_size,
        "max_tokens": config.data.max_tokens,
        "max_tokens_per_micro_batch": config.train.max_tokens_per_micro_batch,
        "world_size": world.size,
        "roles": (CHOSEN,) if config.objective.sft is not None else (CHOSEN, REJECTED),
        "describe": shards.describe,
        "image_trees": config.data.image_trees,
        "window_shards": WINDOW_SHARDS if shards.is_remote else None,
        "mixture": None if plain else build_mixture(shards, sources),
        "excluded": None if config.data.exclude is None else read_excluded(config.data.exclude, shards),
        "costs": training_costs(skeleton, config.optim.trained()),
    }


def open_loader(
    config: Config,
    inputs: Inputs,
    world: World,
    plan: Plan,
    *,
    shards: ShardSet | None = None,
    first_step: int = 0,
    bad_samples_dir: Path | None = None,
) -> Loader:
    """This rank's micro-batches of `plan`, over the training set unless `shards` says another."""
    return Loader(
        shards or inputs.shards,
        plan,
        inputs.processor,
        rank=world.rank,
        first_step=first_step,
        workers=config.data.workers,
        bad_samples_dir=bad_samples_dir,
        pin_memory=world.device.type == "cuda",
        timeout_s=config.train.timeout_s,
    )
