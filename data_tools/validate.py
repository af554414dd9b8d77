"""`info` and `validate`: what a packed data set holds, and whether every byte of it is what was packed."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np

from pivot.data.images import ImageError, decode_rgb
from pivot.data.samples import ROLES_OF_KIND, message_text
from pivot.data.shards import INDEX_RECORD, DamagedSample, Shard, ShardSet, key_hash


def describe(folder: Path) -> dict[str, str]:
    """field -> value, for people."""
    shards = ShardSet.open(folder)
    index, manifest = shards.index, shards.manifest
    sources = (
        f"{name}: {source['samples']:,} samples, repeat_time {source['repeat_time']:g}"
        for name, source in manifest["sources"].items()
    )
    facts = {
        "name": shards.name,
        "kind": shards.kind,
        "samples": f"{len(shards):,}",
        "images": f"{int(index['n_images'].sum()):,}",
        "bytes": f"{sum(shard.bytes for shard in shards.shards):,}",
        "shards": str(len(shards.shards)),
        "fingerprint": shards.fingerprint,
        "sources": "\n".join(sources),
        "dropped": ", ".join(f"{reason}: {count}" for reason, count in manifest["drops"].items()) or "none",
        "largest image": f"{index['img_w'].max()} x {index['img_h'].max()} (widest, highest)",
    }
    for field in ("prompt", "chosen", "rejected"):
        low, middle, high = np.percentile(index[f"chars_{field}"], [0, 50, 100])
        facts[f"letters of {field}"] = f"{low:.0f} to {high:.0f}, half of them up to {middle:.0f}"
    return facts


def validate(folder: Path) -> tuple[int, list[str]]:
    """(samples read, problems found): hashes, index against tar, keys, texts, and every image decoded."""
    shards = ShardSet.open(folder)
    problems = [problem for shard in shards.shards for problem in _check_tar(folder, shard)]
    keys, counts = np.unique(shards.index["key_hash"], return_counts=True)
    problems += [f"{folder}: key_hash {int(key):016x} occurs more than once" for key in keys[counts > 1]]
    for row in range(len(shards)):
        try:
            problems += [f"{shards.describe(row)}: {problem}" for problem in _check_sample(shards, row)]
        except (DamagedSample, ValueError) as error:
            problems.append(str(error))
    return len(shards), problems


def _check_tar(folder: Path, shard: Shard) -> list[str]:
    path = folder / "shards" / f"{shard.name}.tar"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return [f"{path}: sha256 differs from manifest.json; copy the shard again"]
    index = np.fromfile(folder / "index" / f"{shard.name}.idx", dtype=INDEX_RECORD)
    with tarfile.open(path) as tar:
        heads = [(m.offset, key_hash(m.name.removesuffix(".json"))) for m in tar if m.name.endswith(".json")]
    if heads != [(int(record["offset"]), int(record["key_hash"])) for record in index]:
        return [f"{path}: its index names other samples; pack it again"]
    return []


def _check_sample(shards: ShardSet, row: int) -> list[str]:
    sample, files = shards.read(row)
    problems = []
    texts = [message_text(sample[role]).strip() for role in ROLES_OF_KIND[sample["kind"]]]
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
