"""Samples that a run shall leave out: a JSON file made by `python -m data_tools exclude` from what runs met.

    {"format": 1, "samples": [{"shard": SHA256, "ordinal": 12, "name": "mmpr-000003", "reason": "..."}]}

A sample is named by its shard's content and its place there, so the list fits every copy of the set and no other.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pivot.data.shards import ShardSet

EXCLUDE_FORMAT = 1


def read_excluded(path: str | Path, shards: ShardSet) -> np.ndarray:
    """bool[rows]: True for the samples that the list names. Raises ValueError when it is none, or of other shards."""
    try:
        listed = json.loads(Path(path).read_bytes())
        samples = [(str(entry["shard"]), int(entry["ordinal"])) for entry in listed["samples"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data.exclude: {path} is no list made by python -m data_tools exclude ({error!r})") from error
    if listed.get("format") != EXCLUDE_FORMAT:
        raise ValueError(f"data.exclude: {path} has format {listed.get('format')}, expected {EXCLUDE_FORMAT}")
    excluded = np.zeros(len(shards), dtype=bool)
    numbers = {shard.sha256: number for number, shard in enumerate(shards.shards)}
    for sha256, ordinal in samples:
        number = numbers.get(sha256)
        if number is None:
            continue  # a list may serve several mixtures
        if ordinal >= shards.shards[number].samples:
            raise ValueError(
                f"data.exclude: {path} names sample {ordinal} of {shards.shards[number].name}, which has "
                f"{shards.shards[number].samples}"
            )
        excluded[int(shards.first_rows[number]) + ordinal] = True
    if samples and not excluded.any():
        raise ValueError(f"data.exclude: {path} names {len(samples)} samples, none of them in data.train")
    return excluded
