"""The training data of a run, opened once: its sets, where their side-cars lie, and what its plan is made of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pivot.batch import MISMATCHED
from pivot.config import Config, TrainSource
from pivot.config_check import read_train_sources
from pivot.data.borrowed import borrow
from pivot.data.exclude import read_excluded
from pivot.data.lengths import load_lengths
from pivot.data.order import build_mixture
from pivot.data.plan import PlanSettings
from pivot.data.remote import WINDOW_SHARDS, ShardCache
from pivot.data.shards import ShardSet, require_kind
from pivot.models.skeleton import Skeleton
from pivot.objectives import Objective
from pivot.processor import Processor
from pivot.startup.flops import training_costs


@dataclass(frozen=True)
class TrainingData:
    """`data.train`: what it names, joined; the shards of remote sets are fetched when they are read."""

    sources: list[TrainSource]
    shards: ShardSet
    cache_dir: Path  # of its side-cars: token counts and reference log-probs
    shard_cache: ShardCache  # of remote sets, held-out ones too

    @property
    def is_mixture(self) -> bool:
        """Whether the sources are weighed, repeated or chosen from, so that the order is not that of one plain set."""
        return len(self.sources) > 1 or self.sources[0] != TrainSource(self.sources[0].path)


def open_training_data(config: Config) -> TrainingData:
    """Open the sets of `data.train`. ValueError, naming the set, for one that cannot be read."""
    sources = read_train_sources(config.data.train)
    cache_dir = resolve_cache_dir(config, sources[0].path)
    folder = config.data.shard_cache or cache_dir / "fetched"
    shard_cache = ShardCache(folder, int(config.data.shard_cache_gb * 1e9))
    shards = ShardSet.join([ShardSet.open(source.path, shard_cache) for source in sources])
    shards.check_cache()
    return TrainingData(sources, shards, cache_dir, shard_cache)


def resolve_cache_dir(config: Config, set_path: str) -> Path:
    """Where the side-cars of a set lie: `data.cache_dir`, else beside the set where that is writable."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    beside = Path(set_path)
    return beside if os.access(beside, os.W_OK) else Path(config.output_dir) / "cache"


def resolve_plan(
    config: Config,
    data: TrainingData,
    processor: Processor,
    skeleton: Skeleton,
    *,
    objective: Objective,
    world_size: int,
) -> PlanSettings:
    """The settings of the run's plan. ValueError where tokens were not counted yet, and for a set of the wrong kind."""
    shards = data.shards
    require_kind("data.train", shards, single_answers=objective.learns_from_single_answers)
    lengths = load_lengths(shards, processor, data.cache_dir)
    if MISMATCHED in objective.roles:
        lengths = borrow(lengths, shards.shard_sizes)
    return PlanSettings(
        fingerprint=shards.fingerprint,
        shard_sizes=shards.shard_sizes,
        lengths=lengths,
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        max_tokens=config.data.max_tokens,
        max_tokens_per_micro_batch=config.train.max_tokens_per_micro_batch,
        world_size=world_size,
        roles=objective.roles,
        single_answers=objective.learns_from_single_answers,
        describe=shards.describe,
        image_trees=config.data.image_trees,
        window_shards=WINDOW_SHARDS if shards.is_remote else None,
        mixture=build_mixture(shards, data.sources) if data.is_mixture else None,
        excluded=None if config.data.exclude is None else read_excluded(config.data.exclude, shards),
        costs=training_costs(skeleton, config.optim.trained()),
    )
