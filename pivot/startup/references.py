"""Which reference log-probs a run needs, and the making of those that are missing: one path, one fingerprint.

Training opens them with the engine that already holds the weights; `launch/reference.py` with a plain model per rank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from pivot.batch import MISMATCHED, PackedBatch
from pivot.config import Config, ConfigError
from pivot.data.plan import Plan
from pivot.data.reference_cache import ReferenceCache, Score, reference_fingerprint
from pivot.data.shards import ShardSet
from pivot.models.build import WeightSources, build_mllm, weights_fingerprint
from pivot.startup.inputs import Inputs, Say, open_inputs, open_loader
from pivot.startup.screen import first_screen
from pivot.system import distributed
from pivot.system.distributed import World


@dataclass(frozen=True)
class References:
    """Complete caches; None where the objective needs none, or there is no held-out set."""

    train: ReferenceCache | None = None
    held_out: ReferenceCache | None = None


def open_references(
    config: Config, inputs: Inputs, world: World, say: Say, *, start_weights: Score | None = None
) -> References:
    """Open the caches of the training and the held-out set, and score what is missing. Collective.

    `start_weights` scores with the weights that the run starts from, where a model of them is there anyway.
    """
    if not inputs.objective.needs_reference:
        return References()
    own = inputs.reference is inputs.sources
    score = start_weights if own and start_weights is not None else _Lazy(partial(_build_scorer, config, inputs, world))
    # By rank 0: it reads every byte of the weights.
    fingerprint = distributed.broadcast(resolve_fingerprint(config, inputs) if world.is_main else "")
    distributed.check_preemption()

    def complete(shards: ShardSet, cache_dir: Path, plan: Plan) -> ReferenceCache:
        cache = ReferenceCache(cache_dir, fingerprint, shards, borrowed=MISMATCHED in plan.roles)
        missing = distributed.broadcast(cache.first_missing(plan))
        if missing is not None:
            started = time.monotonic()
            loader = open_loader(config, inputs, world, plan, shards=shards, first_step=missing)
            cache.fill(loader, score, world, say, first_step=missing)
            say(f"reference log-probs are in {cache.folder} ({time.monotonic() - started:.0f} s, once)")
        return cache

    # Every pair once, shard by shard, so that a shard is whole, and on disk, as soon as may be.
    plan = inputs.plan.another(limit=int(inputs.plan.kept.sum()), mixture=None, window_shards=1)
    train = complete(inputs.data.shards, inputs.data.cache_dir, plan)
    held_out = inputs.held_out
    if held_out is None:
        return References(train)
    return References(train, complete(held_out.shards, held_out.cache_dir, held_out.plan))


def resolve_fingerprint(config: Config, inputs: Inputs) -> str:
    """What the run's reference log-probs depend on besides the shards."""
    return reference_fingerprint(
        weights=weights_fingerprint(inputs.reference, seed=config.train.seed),
        processor=inputs.processor.fingerprint,
        facts={"dtype": str(inputs.dtype), "attention": inputs.attention.name},
    )


class _Lazy:
    """A scorer that is built when the first batch asks for it: a complete cache loads no weights."""

    def __init__(self, build: Callable[[], Score]) -> None:
        self._build = build
        self._score: Score | None = None

    def __call__(self, batch: PackedBatch) -> Tensor:
        if self._score is None:
            self._score = self._build()
        return self._score(batch)


def _build_scorer(config: Config, inputs: Inputs, world: World) -> Score:
    """The reference's weights in a plain model on this rank's device: whole, since nothing is differentiated."""
    sources: WeightSources = inputs.reference
    model = build_mllm(
        sources,
        inputs.processor,
        seed=config.train.seed,
        dtype=inputs.dtype,
        loading=contextlib.nullcontext,
        gather=lambda _: contextlib.nullcontext(),
        attention=inputs.attention.name,
    ).to(world.device)
    return lambda batch: model(batch.to(world.device))


def make_references(config: Config, *, check_only: bool = False) -> None:
    """What `launch/reference.py` does. Collective. Raises ConfigError where the loss needs no reference."""
    world = distributed.start(config.train.timeout_s)
    inputs = open_inputs(config, world, world.say)
    world.say(first_screen(config, inputs, world))
    if not inputs.objective.needs_reference:
        raise ConfigError(f"{inputs.objective} needs no reference, so there is nothing to score")
    if check_only:
        return
    references = open_references(config, inputs, world, world.say)
    for name, cache in (("training set", references.train), ("held-out set", references.held_out)):
        if cache is not None:
            world.say(f"complete   {name}: {cache.folder}")
