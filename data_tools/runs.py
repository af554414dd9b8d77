"""The data side of a run from its YAML, without weights: what `lengths`, `simulate` and `twins` share with training."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.console import Output
from pivot.config import Config
from pivot.config_load import load_config
from pivot.data.lengths import build_lengths
from pivot.data.plan import Plan
from pivot.data.shards import ShardSet
from pivot.processor import Processor


@dataclass(frozen=True)
class RunData:
    config: Config
    processor: Processor
    shards: ShardSet
    cache_dir: Path

    def plan(self, world_size: int, **changes: Any) -> Plan:
        """The plan of the run on so many ranks."""
        import torch

        from pivot.distributed import World
        from pivot.inputs import build_plan

        world = World(rank=0, size=world_size, device=torch.device("cpu"))
        return build_plan(self.config, self.shards, self.processor, self.cache_dir, world, **changes)


def open_run(config: Path, overrides: list[str], output: Output, workers: int, *, count: bool = True) -> RunData:
    """Open the data that a run would train on, and, with `count`, count tokens where that was not done yet."""
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed greets; stdout is for the result
        from pivot.inputs import open_data, settle_cache_dir
        from pivot.models.build import settle_sources
        from pivot.processor import build_processor

    loaded = load_config(config, overrides)
    processor = build_processor(settle_sources(loaded).model, loaded.data)
    shards, cache_dir = open_data(loaded), settle_cache_dir(loaded, loaded.data.train)
    if count:
        line = output.progress("samples")
        build_lengths(shards, processor, cache_dir, line, workers)
        line.close()
    return RunData(loaded, processor, shards, cache_dir)
