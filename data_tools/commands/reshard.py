from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.arguments import count, seed
from data_tools.console import Output, count_text
from data_tools.copying import (
    BYTES_PER_SHARD,
    SAMPLES_PER_SHARD,
    Choice,
    check_copy,
    copy_samples,
    deal_rows,
    first_of_each_key,
    open_sets,
)
from data_tools.draw import shuffled


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folders", nargs="+", metavar="DIR", help="packed sets; several become one")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--name", help="of the new set; by default that of the first")
    command.add_argument("--samples-per-shard", type=count, default=SAMPLES_PER_SHARD, help="at most (%(default)s)")
    command.add_argument(
        "--megabytes-per-shard", type=count, default=BYTES_PER_SHARD >> 20, help="at most (%(default)s)"
    )
    command.add_argument(
        "--shuffle", action="store_true", help="a drawn order, for readers that read shards front to back"
    )
    command.add_argument("--seed", type=seed, default=0, help="of --shuffle (%(default)s)")


def run(options: argparse.Namespace, output: Output) -> int:
    shards = open_sets(options.folders)
    rows = first_of_each_key(shards)
    drops = {"duplicate": len(shards) - len(rows)} if len(rows) < len(shards) else {}
    if options.shuffle:
        rows = rows[shuffled(shards.index["key_hash"][rows], options.seed)]
    made_by = {"command": "reshard", "shuffle_seed": options.seed if options.shuffle else None}
    choice = Choice(
        folders=tuple(options.folders),
        rows=rows,
        name=options.name or shards.parts[0].name,
        made_by=made_by,
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.megabytes_per_shard << 20,
        facts={"drops": drops},
    )
    if options.dry_run:
        check_copy(choice, options.out)
        num_shards = len(deal_rows(shards, rows, choice.samples_per_shard, choice.bytes_per_shard))
    else:
        line = output.progress("samples")
        num_shards = len(copy_samples(choice, options.out, workers=options.workers, progress=line))
        line.close()
    text = f"{count_text(len(rows), 'sample')} in {count_text(num_shards, 'shard')}"
    text += f"; {count_text(drops['duplicate'], 'duplicate')} left out" if drops else ""
    output.say(f"would write {text}, to {options.out}" if options.dry_run else f"{options.out}: {text}")
    output.result({"out": str(options.out), "samples": len(rows), "shards": num_shards, "drops": drops})
    return 0
