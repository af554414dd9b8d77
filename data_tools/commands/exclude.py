from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from data_tools.console import Output
from data_tools.copying import open_sets
from pivot.data.exclude import EXCLUDE_FORMAT
from pivot.data.shards import ShardSet
from pivot.system.files import write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folders", nargs="+", metavar="DIR", help="the packed sets of the runs")
    command.add_argument(
        "--from",
        dest="logs",
        type=Path,
        nargs="+",
        required=True,
        metavar="LOG",
        help="bad-samples-rank*.jsonl and skipped.jsonl in the runs' folders",
    )
    command.add_argument("--out", type=Path, required=True, help="list to write, for data.exclude")


def run(options: argparse.Namespace, output: Output) -> int:
    shards = open_sets(options.folders)
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    for log in options.logs:
        for number, line in enumerate(_read(log).splitlines(), 1):
            entry = _entry(shards, line, f"{log}:{number}")
            entries.setdefault((entry["shard"], entry["ordinal"]), entry)
    samples = [entries[key] for key in sorted(entries)]
    if not options.dry_run:
        write_json(options.out, {"format": EXCLUDE_FORMAT, "samples": samples})
    verb = "would write" if options.dry_run else "wrote"
    output.say(f"{verb} {len(samples)} samples to {options.out}; a new run leaves them out with data.exclude=...")
    output.result({"out": str(options.out), "samples": samples})
    return 0


def _read(log: Path) -> str:
    try:
        return log.read_text("utf-8")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--from {log}: no such text file; name bad-samples-rank*.jsonl in the output_dir of a run that met damage"
        ) from error


def _entry(shards: ShardSet, line: str, where: str) -> dict[str, Any]:
    try:
        bad = json.loads(line)
        name, ordinal, key_hash = str(bad["shard"]), int(bad["ordinal"]), int(bad["key_hash"], 16)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: expected the record of a sample, found {line[:80]!r}") from error
    for number, shard in enumerate(shards.shards):
        row = int(shards.first_rows[number]) + ordinal
        # Two sets may have shards of one name: the key says which is meant.
        if shard.name == name and ordinal < shard.samples and int(shards.index["key_hash"][row]) == key_hash:
            return {"shard": shard.sha256, "ordinal": ordinal, "name": name, "reason": str(bad.get("reason", ""))}
    raise ValueError(f"{where}: sample {ordinal} of {name} is in none of the sets named; name the run's sets")
