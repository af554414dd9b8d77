"""Chosen samples of packed sets, in a chosen order, as a new set: bytes are copied by the index, nothing is encoded.

Which sample goes to which shard is settled before anything is read, so shards are written in parallel and the result
is a function of the choice alone. A run that was interrupted goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.journal import Journal
from data_tools.workers import worker_pool
from data_tools.writer import ShardWriter
from pivot.data.samples import parse_sample
from pivot.data.shards import BLOCK, SHARD_NAME, Shard, ShardSet

COPY_VERSION = 1  # raise it when the same choice would give other bytes
SAMPLES_PER_SHARD, BYTES_PER_SHARD = 2000, 256 << 20


@dataclass(frozen=True)
class Choice:
    """What a new set is made of."""

    folders: tuple[str, ...]  # of packed sets; rows count through them
    rows: np.ndarray  # int64[n], in the order of the new set
    name: str
    made_by: dict[str, Any] = field(default_factory=dict)  # command and options, for the manifest
    samples_per_shard: int = SAMPLES_PER_SHARD
    bytes_per_shard: int = BYTES_PER_SHARD


def open_sets(folders: Sequence[str | Path]) -> ShardSet:
    return ShardSet.join([ShardSet.open(folder) for folder in folders])


def copy_samples(
    choice: Choice,
    out: Path,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Shard]:
    """Write the set, or go on writing it. Raises ValueError when `out` holds another, DamagedSample on damage."""
    if not SHARD_NAME.fullmatch(choice.name[:73]) or len(choice.name) > 73:
        raise ValueError(f"--name {choice.name!r}: expected at most 73 letters, digits, _ and -")
    if not len(choice.rows):
        raise ValueError(f"no sample is left for {out}")
    shards = open_sets(choice.folders)
    parts = cut_rows(shards.index["span"][choice.rows], choice.samples_per_shard, choice.bytes_per_shard)
    with Journal(out, _identity(choice, shards)) as journal:
        done = journal.shards
        if journal.finished:
            return done
        counts = Counter((journal.state or {}).get("sources", {}))
        journal.save(done, sources=dict(counts))
        journal.clear_leftovers()
        tasks = [
            (choice.folders, choice.rows[parts[i] : parts[i + 1]], str(out), f"{choice.name}-{i:06d}")
            for i in range(len(done), len(parts) - 1)
        ]
        for shard, sources in _in_order(tasks, workers):
            done.append(shard)
            counts.update(sources)
            journal.save(done, sources=dict(counts))
            progress(sum(one.samples for one in done), len(choice.rows))
        images = int(shards.index["n_images"][choice.rows].sum())
        facts = {"images": images, "sources": _sources(counts, shards), "drops": {}, "made_by": choice.made_by}
        journal.finish(done, name=choice.name, kind=shards.kind, **facts)
    return done


def cut_rows(spans: np.ndarray, samples_per_shard: int, bytes_per_shard: int) -> list[int]:
    """[0, ..., n]: where each shard starts among samples of these sizes."""
    ends = np.cumsum(spans.astype(np.int64))
    cuts = [0]
    while cuts[-1] < len(spans):
        start = cuts[-1]
        before = int(ends[start - 1]) if start else 0
        fitting = int(np.searchsorted(ends, before + bytes_per_shard, side="right")) - start
        cuts.append(min(len(spans), start + max(1, min(samples_per_shard, fitting))))
    return cuts


def _in_order(tasks: list[Any], workers: int) -> Iterable[tuple[Shard, Counter[str]]]:
    if workers <= 1 or len(tasks) <= 1:
        yield from (_write_shard(*task) for task in tasks)
        return
    with worker_pool(min(workers, len(tasks))) as pool:
        yield from pool.map(_write_shard, *zip(*tasks, strict=True))


@lru_cache(maxsize=1)
def _opened(folders: tuple[str, ...]) -> ShardSet:
    return open_sets(folders)  # once in each worker


def _write_shard(folders: tuple[str, ...], rows: np.ndarray, out: str, name: str) -> tuple[Shard, Counter[str]]:
    shards = _opened(folders)
    writer, sources = ShardWriter(Path(out), name), Counter[str]()
    try:
        for row in rows.tolist():
            record = shards.index[row]
            entries = shards.read_span(row)
            writer.add_raw(entries, record)
            sample = parse_sample(entries[BLOCK : BLOCK + int(record["json_len"])])
            sources[str(sample.get("source") or "")] += 1
        return writer.close(), sources
    except BaseException:
        writer.abandon()
        raise


def _sources(counts: Counter[str], shards: ShardSet) -> dict[str, dict[str, float]]:
    """How many samples each source has now, with its repeat_time as before."""
    repeat_times: dict[str, float] = {}
    for part in shards.parts:
        for name, source in part.manifest.get("sources", {}).items():
            repeat_times.setdefault(name, source["repeat_time"])
    return {name: {"samples": counts[name], "repeat_time": repeat_times.get(name, 1.0)} for name in sorted(counts)}


def _identity(choice: Choice, shards: ShardSet) -> dict[str, Any]:
    return {
        "name": choice.name,
        "input": [part.fingerprint for part in shards.parts],
        "rows": hashlib.sha256(choice.rows.astype("<i8").tobytes()).hexdigest(),
        "made_by": choice.made_by,
        "samples_per_shard": choice.samples_per_shard,
        "bytes_per_shard": choice.bytes_per_shard,
        "copy_version": COPY_VERSION,
    }
