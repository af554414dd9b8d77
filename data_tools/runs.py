"""The data side of a run from its YAML, without weights: what `lengths`, `simulate` and `twins` share with training."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.console import Output, count_text
from pivot.config import Config
from pivot.config_load import load_config
from pivot.data.lengths import build_lengths, missing_lengths
from pivot.data.plan import Plan
from pivot.data.shards import ShardSet
from pivot.processor import Processor

if TYPE_CHECKING:
    from pivot.models.skeleton import Skeleton
    from pivot.startup.data import TrainingData


@dataclass(frozen=True)
class RunData:
    """What a run's YAML says of its data, opened, and the parts of its model as shapes."""

    config: Config
    processor: Processor
    data: TrainingData
    skeleton: Skeleton

    @property
    def shards(self) -> ShardSet:
        return self.data.shards

    @property
    def countable(self) -> tuple[ShardSet, Processor, Path]:
        return self.data.shards, self.processor, self.data.cache_dir

    def plan(self, world_size: int, **changes: Any) -> Plan:
        """The plan of the run on so many ranks; `changes` are fields of PlanSettings."""
        from pivot.objectives import build_objective
        from pivot.startup.data import resolve_plan

        objective = build_objective(self.config.objective)
        settings = resolve_plan(
            self.config, self.data, self.processor, self.skeleton, objective=objective, world_size=world_size
        )
        return Plan(replace(settings, **changes))


def read_overrides(options: argparse.Namespace) -> list[str]:
    """The key=value settings over --config. Raises ValueError where there is nothing that they could be over."""
    if options.config is not None:  # argparse takes the first of them for DIR
        return [*([options.folder] if options.folder is not None else []), *options.overrides]
    if options.overrides:
        raise ValueError(f"{options.overrides[0]}: key=value settings need the --config RUN.yaml that they change")
    return []


def open_run(config: Path, overrides: list[str]) -> RunData:
    """Open the data that a run would train on; of a remote set the index is fetched."""
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed greets; stdout is for the result
        from pivot.models.build import resolve_sources
        from pivot.models.skeleton import build_skeleton
        from pivot.processor import build_processor
        from pivot.startup.data import open_training_data

    loaded = load_config(config, overrides)
    sources = resolve_sources(loaded)
    processor = build_processor(sources.model, loaded.data, sources.encoder)
    skeleton = build_skeleton(sources.model, len(processor.tokenizer), sources.encoder)
    return RunData(loaded, processor, open_training_data(loaded), skeleton)


def count_tokens(shards: ShardSet, processor: Processor, cache_dir: Path, output: Output, workers: int) -> None:
    """Count where that was not done yet, as the start of a run does."""
    line = output.progress("samples")
    build_lengths(shards, processor, cache_dir, line, workers)
    line.close()


def num_uncounted(shards: ShardSet, processor: Processor, cache_dir: Path, output: Output) -> int:
    """For --dry-run: how many samples `count_tokens` would count, said in words if there are any."""
    missing = missing_lengths(shards, processor, cache_dir)
    count = sum(shards.shards[number].samples for number in missing)
    if count:
        what = f"{count_text(count, 'sample')} in {count_text(len(missing), 'shard')}"
        output.say(f"would count the tokens of {what}, into {cache_dir}/lengths")
    return count
