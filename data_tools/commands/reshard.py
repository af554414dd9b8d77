from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from data_tools.console import Output, count_text
from data_tools.copying import BYTES_PER_SHARD, SAMPLES_PER_SHARD, Choice, copy_samples, deal_rows, open_sets
from data_tools.draw import shuffled


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="packed sets; several become one")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--name", help="of the new set; by default that of the first")
    command.add_argument("--samples-per-shard", type=int, default=SAMPLES_PER_SHARD, help="at most (%(default)s)")
    command.add_argument("--megabytes-per-shard", type=int, default=BYTES_PER_SHARD >> 20, help="at most (%(default)s)")
    command.add_argument(
        "--shuffle", action="store_true", help="a drawn order, for readers that read shards front to back"
    )
    command.add_argument("--seed", type=int, default=0, help="of --shuffle (%(default)s)")


def run(options: argparse.Namespace, output: Output) -> int:
    if min(options.samples_per_shard, options.megabytes_per_shard) < 1:
        raise ValueError("--samples-per-shard and --megabytes-per-shard: expected at least 1")
    shards = open_sets(options.folders)
    rows = shuffled(shards.index["key_hash"], options.seed) if options.shuffle else np.arange(len(shards))
    made_by = {"command": "reshard", "shuffle_seed": options.seed if options.shuffle else None}
    choice = Choice(
        folders=tuple(str(folder) for folder in options.folders),
        rows=rows,
        name=options.name or shards.parts[0].name,
        made_by=made_by,
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.megabytes_per_shard << 20,
    )
    if options.dry_run:
        num_shards = len(deal_rows(shards, rows, choice.samples_per_shard, choice.bytes_per_shard))
        output.say(f"would write {len(rows)} samples in {count_text(num_shards, 'shard')} to {options.out}")
    else:
        line = output.progress("samples")
        num_shards = len(copy_samples(choice, options.out, workers=options.workers, progress=line))
        line.close()
        output.say(f"{options.out}: {len(rows)} samples in {count_text(num_shards, 'shard')}")
    output.result({"out": str(options.out), "samples": len(rows), "shards": num_shards})
    return 0
