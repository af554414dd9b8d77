"""What a run needs before it loads weights: settings resolved against the machine, data opened, steps planned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pivot.batch import MISMATCHED
from pivot.config import COMPONENTS, Config
from pivot.config_check import read_deepspeed_json
from pivot.data.lengths import build_lengths
from pivot.data.loader import Loader
from pivot.data.plan import Plan
from pivot.data.shards import ShardSet
from pivot.engine import build_deepspeed_config
from pivot.evaluate.held_out import HeldOut, open_held_out
from pivot.models.attention import Choice, choose_attention
from pivot.models.build import WeightSources, resolve_sources
from pivot.models.language import check_positions, check_text_config
from pivot.models.skeleton import Skeleton, build_skeleton
from pivot.objectives import Objective, build_objective
from pivot.pretrained import read_text_config
from pivot.processor import Processor, build_processor
from pivot.startup.agreement import require_same_settings
from pivot.startup.data import TrainingData, open_training_data, resolve_cache_dir, resolve_plan
from pivot.system import distributed
from pivot.system.distributed import World

LANGUAGE_MODEL = COMPONENTS[-1]  # the one that text alone goes through

Say = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """What a run needs to know before it loads weights; each fact is worked out here, once."""

    sources: WeightSources
    reference: WeightSources  # of the reference model's weights: by default those that the run starts from
    skeleton: Skeleton
    processor: Processor
    objective: Objective
    data: TrainingData
    plan: Plan
    held_out: HeldOut | None  # of data.eval
    total_steps: int
    deepspeed: dict[str, Any]  # DeepSpeed's JSON with what the run's YAML owns
    dtype: torch.dtype
    attention: Choice  # the back end of the prefix trees
    warning: str | None  # of positions that the language model was not trained on


def open_inputs(config: Config, world: World, say: Say) -> Inputs:
    """Open and check everything but the weights. Collective: rank 0 counts tokens where no side-car has them."""
    require_same_settings(config)
    dtype = resolve_dtype(config.train.precision, world)
    deepspeed = build_deepspeed_config(
        read_deepspeed_json(config.deepspeed),
        max_grad_norm=config.optim.max_grad_norm,
        bf16=dtype == torch.bfloat16,
    )
    objective = build_objective(config.objective)
    sources = resolve_sources(config)
    processor = build_processor(sources.model, config.data, sources.encoder)
    skeleton = build_skeleton(sources.model, len(processor.tokenizer), sources.encoder)
    warning = check_positions(skeleton.text_config, _longest_text(config))
    reference = _resolve_reference(config, sources, objective.reference_folder)
    attention = _resolve_attention(config.train.attention, skeleton, world.device, dtype)
    data = open_training_data(config)
    data = replace(data, cache_dir=distributed.broadcast(data.cache_dir))
    _count_tokens(data, processor, config.data.workers, say)
    settings = resolve_plan(config, data, processor, skeleton, objective=objective, world_size=world.size)
    plan = Plan(settings)
    _require_images(config, plan)
    if objective.learns_from_single_answers:
        _require_both_labels(plan)
    distributed.require_equal("the data plan", plan.fingerprint)
    steps = config.train.max_steps or math.ceil((config.train.num_epochs or 0) * plan.steps_per_epoch)
    held_out = _open_held_out(config, data, processor, objective, world, say)
    return Inputs(
        sources=sources,
        reference=reference,
        skeleton=skeleton,
        processor=processor,
        objective=objective,
        data=data,
        plan=plan,
        held_out=held_out,
        total_steps=max(1, steps),
        deepspeed=deepspeed,
        dtype=dtype,
        attention=attention,
        warning=warning,
    )


def _resolve_reference(config: Config, sources: WeightSources, folder: str | None) -> WeightSources:
    """Where the reference's weights come from: `folder`, which must be able to score the same rows, or `sources`."""
    if folder is None:
        return sources
    reference = resolve_sources(replace(config, init_from=folder, init_parts=None))
    path = reference.model.language_model.path or folder
    text_config = read_text_config(path)
    check_text_config(text_config, path)
    check_positions(text_config, config.data.max_tokens)
    return reference


def _count_tokens(data: TrainingData, processor: Processor, workers: int, say: Say) -> None:
    """Collective: rank 0 counts what no side-car has."""
    distributed.on_main(
        "counting tokens",
        lambda: build_lengths(
            data.shards, processor, data.cache_dir, lambda done, of: say(f"counting tokens: {done} of {of}"), workers
        ),
    )
    distributed.check_preemption()


def _require_images(config: Config, plan: Plan) -> None:
    """Raise ValueError where what images go through is trained without any: only weight decay would move it."""
    lost = [name for name in config.optim.trained() if name != LANGUAGE_MODEL]
    if lost and not plan.num_with_images:
        raise ValueError(
            f"optim.{lost[0]}.lr is {config.optim.component(lost[0]).lr:g}, but none of the {int(plan.kept.sum())} "
            "samples of data.train has an image; pack the data with its images (python -m data_tools info counts "
            f"them), or freeze {' and '.join(lost)} with lr: null"
        )


def _require_both_labels(plan: Plan) -> None:
    """Raise ValueError where all answers are good ones, or all bad: one way lies open, and nothing holds the model."""
    chosen, rejected = (int((column[plan.kept] > 0).sum()) for column in (plan.lengths.chosen, plan.lengths.rejected))
    if not (chosen and rejected):
        raise ValueError(
            f"data.train: {chosen} answers are desirable and {rejected} are not, but KTO needs both; add some of the "
            "other label to the data (python -m data_tools info counts them), or train with SFT on desirable ones alone"
        )


def _open_held_out(
    config: Config, data: TrainingData, processor: Processor, objective: Objective, world: World, say: Say
) -> HeldOut | None:
    if config.data.eval is None:
        return None
    return open_held_out(
        config.data.eval,
        processor,
        world,
        roles=tuple(role for role in objective.roles if role != MISMATCHED),
        single_answers=objective.learns_from_single_answers,
        cache_dir=distributed.broadcast(resolve_cache_dir(config, config.data.eval)),
        num_samples=config.evaluate.num_samples,
        max_tokens=config.data.max_tokens,
        max_tokens_per_micro_batch=config.train.max_tokens_per_micro_batch,
        say=say,
        shard_cache=data.shard_cache,
    )


def _longest_text(config: Config) -> int:
    """Tokens of the longest text that the language model may see: a pair, or a held-out prompt with its answer."""
    return config.data.max_tokens + (0 if config.data.eval is None else config.evaluate.max_new_tokens)


def resolve_dtype(precision: str, world: World) -> torch.dtype:
    """The dtype of all ranks: auto is bf16 where every GPU computes in it, not by slow emulation. Collective."""
    if precision == "auto":
        fast = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if all(distributed.gather(fast)) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _resolve_attention(wanted: str, skeleton: Skeleton, device: torch.device, dtype: torch.dtype) -> Choice:
    heads = int(skeleton.text_config.num_attention_heads)
    return choose_attention(
        wanted,
        device=device,
        dtype=dtype,
        heads=heads,
        key_heads=int(getattr(skeleton.text_config, "num_key_value_heads", None) or heads),
        head_size=skeleton.head_size,
    )


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
        shards or inputs.data.shards,
        plan,
        inputs.processor,
        rank=world.rank,
        first_step=first_step,
        workers=config.data.workers,
        bad_samples_dir=bad_samples_dir,
        pin_memory=world.device.type == "cuda",
        timeout_s=config.train.timeout_s,
    )
