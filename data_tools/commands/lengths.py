from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arguments import count
from data_tools.console import Output
from data_tools.runs import count_tokens, num_uncounted, open_run, read_overrides
from pivot.config import DataConfig, LanguageModelConfig, ModelConfig, VisionTowerConfig
from pivot.data.lengths import Lengths, load_lengths
from pivot.data.shards import ShardSet

LIMITS = (512, 1024, 2048, 4096, 8192)
PERCENTILES = (0, 50, 90, 99, 100)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", nargs="?", metavar="DIR", help="a packed set; or --config")
    command.add_argument("--config", type=Path, help="a run's YAML: count for that run, where it will look")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings over --config")
    command.add_argument("--tokenizer", help="folder or hub id of the language model")
    command.add_argument("--vision-tower", help="folder, hub id, CONFIG.json or open_clip:MODEL: tokens per image")
    command.add_argument("--image-size", type=count, help="pixels a side, if not the encoder's own")
    command.add_argument("--chat-template", help="a Jinja file, if not the tokenizer's own")
    command.add_argument("--cache-dir", type=Path, help="where to keep the counts (DIR)")
    command.add_argument("--limit", type=count, action="append", help=f"show the share over it; repeatable {LIMITS}")


def run(options: argparse.Namespace, output: Output) -> int:
    overrides = read_overrides(options)
    if options.config is not None:
        shards, processor, cache_dir = open_run(options.config, overrides).countable
    else:
        shards, processor, cache_dir = _open(options)
    if options.dry_run:
        missing = num_uncounted(shards, processor, cache_dir, output)
        if not missing:
            output.say(f"{cache_dir}/lengths holds the counts of all samples; nothing would be written")
        output.result({"missing": missing})
        return 0
    count_tokens(shards, processor, cache_dir, output, options.workers)
    lengths = load_lengths(shards, processor, cache_dir)
    facts = summarise(lengths, tuple(options.limit or LIMITS))
    facts |= {"samples": len(lengths), "tokens_per_image": processor.geometry.num_tokens, "cache_dir": str(cache_dir)}
    _show(facts, output)
    output.result(facts)
    return 0


def _open(options: argparse.Namespace) -> tuple[ShardSet, Any, Path]:
    from pivot.processor import build_processor

    if options.folder is None or options.tokenizer is None or options.vision_tower is None:
        raise ValueError(
            "give --config RUN.yaml, or DIR with --tokenizer and --vision-tower (images become tokens too)"
        )
    tower = VisionTowerConfig(path=options.vision_tower, image_size=options.image_size)
    model = ModelConfig(vision_tower=tower, language_model=LanguageModelConfig(path=options.tokenizer))
    processor = build_processor(model, DataConfig(chat_template=options.chat_template))
    return ShardSet.open(options.folder), processor, options.cache_dir or Path(options.folder)


def summarise(lengths: Lengths, limits: tuple[int, ...]) -> dict[str, Any]:
    """Percentiles of each column, and per limit what share of the pairs is longer."""
    pair = lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)
    columns = {
        "prompt": lengths.prompt,
        "image": lengths.image,
        "chosen": lengths.chosen,
        "rejected": lengths.rejected,
        "longest": pair,  # what data.max_tokens looks at
    }
    percentiles = {
        name: [int(value) for value in np.percentile(column, PERCENTILES)] for name, column in columns.items()
    }
    over = {str(limit): {"pairs": int((pair > limit).sum()), "share": float((pair > limit).mean())} for limit in limits}
    total = int((lengths.prompt + lengths.chosen + lengths.rejected).sum())
    return {"percentiles": percentiles, "over": over, "total_tokens": total}


def _show(facts: dict[str, Any], output: Output) -> None:
    heads = ("tokens", *(f"{percentile} %" for percentile in PERCENTILES))
    names = {"image": "of it images", "longest": "image + prompt + longer answer"}
    rows = [(names.get(name, name), *(f"{v:,}" for v in values)) for name, values in facts["percentiles"].items()]
    output.table(heads, rows)
    rows = [(f"{int(limit):,}", f"{over['pairs']:,}", f"{over['share']:.2%}") for limit, over in facts["over"].items()]
    output.table(("data.max_tokens", "pairs over it", "share"), rows)
    output.say(
        f"{facts['samples']:,} samples, {facts['total_tokens']:,} tokens with the prompt once a pair; "
        f"counts are in {facts['cache_dir']}/lengths"
    )
