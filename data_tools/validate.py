"""`validate`: whether every byte of a packed data set is what was packed, and every sample one to train on."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from data_tools.copying import read_shape
from data_tools.pack import ordered_map
from pivot.data.images import ImageError, decode_rgb
from pivot.data.index import key_hash
from pivot.data.manifest import Shard
from pivot.data.samples import all_completions, message_text
from pivot.data.shards import DamagedSample, ShardSet


@dataclass
class Validation:
    num_samples: int
    num_images: int
    problems: list[str] = field(default_factory=list)


def validate(
    folder: str | Path,
    *,
    fast: bool = False,
    workers: int = 1,
    progress: Callable[[int, int, str], None] = lambda done, total, remark: None,
) -> Validation:
    """Hashes, index against tar, keys, members, texts, every image decoded; with `fast` what the index tells alone.

    A shard that is missing or cut is a problem like others, and its samples are not counted. Raises ValueError when the
    manifest cannot be read.
    """
    shards, problems = ShardSet.open_sound(folder)
    validation = Validation(len(shards), int(shards.index["n_images"].sum()), problems)
    keys, counts = np.unique(shards.index["key_hash"], return_counts=True)
    validation.problems += [
        f"{folder}: key_hash {int(key):016x} occurs more than once; python -m data_tools reshard keeps the first"
        for key in keys[counts > 1]
    ]
    validation.problems += _check_spans(shards)
    if fast:
        return validation
    done = 0
    # A shard a time: each worker reads its own file from front to back.
    for number, problems in ordered_map(
        partial(_check_shard, str(folder)), range(len(shards.shards)), workers, chunk=1
    ):
        validation.problems += problems
        done += shards.shards[number].samples
        progress(done, len(shards), f"{len(validation.problems)} problems")
    return validation


def _check_spans(shards: ShardSet) -> list[str]:
    """The index must tile each shard from its start."""
    problems = []
    for number, shard in enumerate(shards.shards):
        index = shards.index[shards.first_rows[number] : shards.first_rows[number + 1]]
        ends = np.cumsum(index["span"].astype(np.int64))
        starts = np.concatenate([[0], ends[:-1]])
        if (index["offset"].astype(np.int64) != starts).any() or ends[-1] > shard.bytes:
            problems.append(f"{shards.folder}/index/{shard.name}.idx does not tile its shard; pack it again")
    return problems


@lru_cache(maxsize=1)
def _opened(folder: str) -> ShardSet:
    """Once in each worker: sent with every task, a large index would be copied every time."""
    return ShardSet.open_sound(folder)[0]


def _check_shard(folder: str, number: int) -> list[str]:
    shards = _opened(folder)
    problems = _check_tar(shards, number)
    shapes = set()
    for row in range(int(shards.first_rows[number]), int(shards.first_rows[number + 1])):
        try:
            problems += [f"{shards.describe(row)}: {problem}" for problem in _check_sample(shards, row)]
            shapes.add(read_shape(shards, row))
        except (DamagedSample, ValueError) as error:
            problems.append(str(error))
    if len(shapes) > 1:
        what = f"{shards.fetch(number)} mixes samples of {len(shapes)} shapes"
        problems.append(
            f"{what}, so `datasets` does not open it; python -m data_tools reshard makes shards that it opens"
        )
    return problems


def _check_tar(shards: ShardSet, number: int) -> list[str]:
    shard: Shard = shards.shards[number]
    path = shards.fetch(number)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return [f"{path}: sha256 differs from manifest.json; copy the shard again"]
    index = shards.index[shards.first_rows[number] : shards.first_rows[number + 1]]
    with tarfile.open(path) as tar:
        members = [(member.offset, member.name) for member in tar]
    heads = [(offset, key_hash(name.removesuffix(".json"))) for offset, name in members if name.endswith(".json")]
    if heads != [(int(record["offset"]), int(record["key_hash"])) for record in index]:
        return [f"{path}: its index names other samples; pack it again"]
    if members[-1][0] >= int(index[-1]["offset"]) + int(index[-1]["span"]):
        return [f"{path}: holds {members[-1][1]!r} behind the last sample of its index; pack it again"]
    return []


def _check_sample(shards: ShardSet, row: int) -> list[str]:
    shards.read_entries(row)
    sample, files = shards.read(row)
    problems = []
    if sample["kind"] != shards.kind:
        problems.append(f"kind {sample['kind']} in a set of kind {shards.kind}")
    texts = [message_text(messages).strip() for messages in all_completions(sample).values()]
    if not all(texts):
        problems.append("zero-length completion")
    if len(texts) == 2 and texts[0] == texts[1]:
        problems.append("chosen equals rejected")
    for image, data in zip(sample["images"], files, strict=True):
        if hashlib.sha256(data).hexdigest() != image["sha256"]:
            problems.append(f"image {image['member']} is not the one that was packed")
        try:
            height, width = decode_rgb(data).shape[:2]
        except ImageError as error:
            problems.append(f"image {image['member']}: {error}")
            continue
        if (width, height) != (image["w"], image["h"]):
            problems.append(f"image {image['member']} is {width} x {height}, not {image['w']} x {image['h']}")
    return problems
