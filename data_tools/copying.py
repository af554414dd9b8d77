"""Chosen samples of packed sets, in a chosen order, as a new set: bytes are copied by the index, nothing is encoded.

Which sample goes to which shard is settled before anything is copied, so shards are written in parallel and the result
is a function of the choice alone. Every shard has samples of one shape, in the choice's order; shards are numbered by
their first sample. A run that was interrupted goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.console import count_text
from data_tools.journal import Journal
from data_tools.writer import ShardWriter
from pivot.data.manifest import SHARD_NAME, Shard
from pivot.data.samples import sample_shape
from pivot.data.shards import ShardSet, walk_members
from pivot.system.workers import worker_pool

COPY_VERSION = 2  # raise it when the same choice would give other bytes
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
    facts: dict[str, Any] = field(default_factory=dict)  # more for the manifest


def open_sets(folders: Sequence[str | Path]) -> ShardSet:
    return ShardSet.join([ShardSet.open(folder) for folder in folders])


def copy_samples(
    choice: Choice,
    out: Path,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Shard]:
    """Write the set, or go on writing it.

    Raises ValueError as `check_copy` does, and where a sample holds members that it does not list; DamagedSample on
    damage.
    """
    shards = check_copy(choice, out)
    parts = deal_rows(shards, choice.rows, choice.samples_per_shard, choice.bytes_per_shard)
    with Journal(out, _identity(choice, shards)) as journal:
        done = journal.shards
        if journal.finished:
            return done
        counts = Counter((journal.state or {}).get("sources", {}))
        journal.save(done, sources=dict(counts))
        journal.clear_leftovers()
        tasks = [
            (choice.folders, rows, shape, str(out), f"{choice.name}-{i:06d}")
            for i, (shape, rows) in enumerate(parts)
            if i >= len(done)
        ]
        for shard, sources in _in_order(tasks, workers):
            done.append(shard)
            counts.update(sources)
            journal.save(done, sources=dict(counts))
            progress(sum(one.samples for one in done), len(choice.rows))
        images = int(shards.index["n_images"][choice.rows].sum())
        facts = {"images": images, "sources": _sources(counts, shards), "drops": {}, "made_by": choice.made_by}
        journal.finish(done, name=choice.name, kind=shards.kind, **(facts | choice.facts))
    return done


def check_copy(choice: Choice, out: Path) -> ShardSet:
    """The sets of the choice. Raises ValueError when `copy_samples` would not write it to `out`; changes nothing."""
    if not SHARD_NAME.fullmatch(choice.name[:73]) or len(choice.name) > 73:
        raise ValueError(f"--name {choice.name!r}: expected at most 73 letters, digits, _ and -")
    if not len(choice.rows):
        raise ValueError(f"no sample is left for {out}")
    shards = open_sets(choice.folders)
    repeated = len(choice.rows) - len(np.unique(shards.index["key_hash"][choice.rows]))
    if repeated:
        raise ValueError(
            f"{' '.join(choice.folders)}: {count_text(repeated, 'sample')} with the key of another; run python -m "
            "data_tools reshard on it, which keeps the first of each"
        )
    journal = Journal(out, _identity(choice, shards))
    try:
        journal.look()
    except ValueError as error:
        before = ((journal.state or {}).get("options", {}).get("made_by") or {}).get("command")
        if journal.state is not None and before != choice.made_by.get("command"):
            raise ValueError(f"{out} holds a set made by another command; choose another --out") from error
        raise
    return shards


def first_of_each_key(shards: ShardSet) -> np.ndarray:
    """int64[n]: all rows but those whose key an earlier row has; twice in one shard, no other reader opens it."""
    return np.sort(np.unique(shards.index["key_hash"], return_index=True)[1])


def deal_rows(
    shards: ShardSet, rows: np.ndarray, samples_per_shard: int, bytes_per_shard: int
) -> list[tuple[str, np.ndarray]]:
    """(shape, rows) of each shard to write."""
    shapes, codes = _shapes_of(shards, rows)
    parts = []
    for code, places in _groups(codes):
        cuts = cut_rows(shards.index["span"][rows[places]], samples_per_shard, bytes_per_shard)
        parts += [(shapes[code], places[start:end]) for start, end in pairwise(cuts)]
    return [(shape, rows[places]) for shape, places in sorted(parts, key=lambda part: int(part[1][0]))]


def _shapes_of(shards: ShardSet, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(shapes, int64[n]: the number of each row's shape). Read from samples only where the manifest says none."""
    numbers: dict[str, int] = {}
    codes = np.empty(len(rows), dtype=np.int64)
    for shard, places in _groups(np.searchsorted(shards.first_rows, rows, side="right") - 1):
        shape = shards.shards[shard].shape
        if shape:
            codes[places] = numbers.setdefault(shape, len(numbers))
            continue
        for place in places.tolist():
            codes[place] = numbers.setdefault(read_shape(shards, int(rows[place])), len(numbers))
    return list(numbers), codes


def _groups(values: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    """(value, places where it stands) for each value."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-1))
    return zip(values[order][starts].tolist(), np.split(order, starts[1:]), strict=True)


def read_shape(shards: ShardSet, row: int) -> str:
    """As it is in the shard, not as the manifest says."""
    members = dict(walk_members(shards.read_span(row)))
    key = next(iter(members)).removesuffix("json")
    return sample_shape((name.removeprefix(key) for name in members), shards.read_text(row))


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


def _write_shard(
    folders: tuple[str, ...], rows: np.ndarray, shape: str, out: str, name: str
) -> tuple[Shard, Counter[str]]:
    shards = _opened(folders)
    writer, sources = ShardWriter(Path(out), name), Counter[str]()
    try:
        for row in rows.tolist():
            sample, entries = shards.read_entries(row)
            writer.add_raw(entries, shards.index[row], shape)
            sources[sample.get("source") or ""] += 1
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
