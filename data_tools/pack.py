"""`pack`: any known format to shards. Workers convert records, one process writes them in the input's order.

The output is a pure function of the input and the options, whatever the number of workers. After each shard the state
is written to `pack.json`; a second run with the same input and options goes on behind the last finished shard, one
with others is refused. `manifest.json` comes last: a folder without it is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.convert import Packed, convert
from data_tools.readers import find_reader
from data_tools.records import Drop, Record
from data_tools.writer import ShardWriter, write_json
from pivot.data.shards import INDEX_RECORD, MANIFEST_VERSION, SHARD_NAME, Shard, key_hash, set_fingerprint

TOOL_VERSION = 1  # raise it when the same input would give other bytes: an unfinished pack must then start afresh
CHUNK = 16  # records per message to a worker
NUM_EXAMPLES = 3  # dropped rows shown for each reason


@dataclass(frozen=True)
class PackOptions:
    source: Path
    out: Path
    name: str | None = None  # None: that of the source
    format: str = "auto"
    image_roots: tuple[Path, ...] = ()
    allow_roots: tuple[Path, ...] = ()
    workers: int = 1
    max_drop: float = 0.01  # share of the rows
    samples_per_shard: int = 2000
    bytes_per_shard: int = 256 << 20


@dataclass
class Tally:
    """What happened to the rows read so far."""

    rows: int = 0
    digest: str = ""  # chained over the rows
    images: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    sources: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        return sum(self.drops.values())

    @property
    def drop_ratio(self) -> float:
        return self.num_dropped / max(1, self.rows)

    def read(self, row: Record | Drop) -> None:
        self.rows += 1
        self.digest = hashlib.sha256(self.digest.encode() + row.canonical()).hexdigest()

    def keep(self, record: Record, packed: Packed) -> None:
        source = self.sources.setdefault(packed.source, {"samples": 0, "repeat_time": record.repeat_time})
        source["samples"] += 1
        self.images += len(packed.members) - 1

    def drop(self, drop: Drop) -> None:
        self.drops[drop.reason] = self.drops.get(drop.reason, 0) + 1
        examples = self.examples.setdefault(drop.reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append({"id": drop.id, "detail": drop.detail})


@dataclass(frozen=True)
class PackResult:
    tally: Tally
    shards: list[Shard]
    complete: bool  # manifest.json was written, or was there

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def pack(options: PackOptions, progress: Callable[[Tally], None] = lambda tally: None) -> PackResult:
    """Pack the source, or go on packing it. Without `complete` too much was dropped, and no manifest was written.

    Raises ValueError for a source that no reader knows, and for an output folder that holds another pack.
    """
    format, reader = find_reader(options.source, options.format)
    name = options.name or _default_name(options.source)
    if not SHARD_NAME.fullmatch(name[:73]) or len(name) > 73:  # 7 more for the number
        raise ValueError(f"--name {name!r}: expected at most 73 letters, digits, _ and -")
    journal = _Journal(options.out, _identity(options, name, format))
    tally, shards = journal.load()
    rows = reader.read(options.source, options.image_roots)
    _skip(rows, tally, options.out)
    if journal.finished:
        _refuse_more(rows, options.out)
        return PackResult(tally, shards, complete=True)
    _clear_leftovers(options.out, shards)
    _write_shards(rows, options, name, tally, shards, journal, progress)
    complete = tally.drop_ratio <= options.max_drop
    _write_stats(options.out, tally, shards)
    if complete:
        if not shards:
            raise ValueError(f"{options.source}: no sample is left; the reasons are in {options.out}/stats.json")
        journal.finish(_manifest(name, tally, shards))
    return PackResult(tally, shards, complete)


def ordered_map(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """(item, function(item)) in the order of the items, with a bounded number of them under way."""
    if workers <= 1:
        yield from ((item, function(item)) for item in items)
        return
    items = iter(items)
    waiting: deque[tuple[list[Any], Future]] = deque()
    with ProcessPoolExecutor(workers) as pool:
        while True:
            while len(waiting) < 3 * workers and (chunk := list(islice(items, CHUNK))):
                waiting.append((chunk, pool.submit(_map_chunk, function, chunk)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            yield from zip(chunk, future.result(), strict=True)


def _map_chunk(function: Callable[[Any], Any], chunk: list[Any]) -> list[Any]:
    return [function(item) for item in chunk]


def _convert(row: Record | Drop, trusted: tuple[Path, ...]) -> Packed | Drop:
    return row if isinstance(row, Drop) else convert(row, trusted)


def _trusted(options: PackOptions) -> tuple[Path, ...]:
    """Where images may really lie: what the user named, links resolved."""
    own = options.source if options.source.is_dir() else options.source.parent
    return tuple(Path(os.path.realpath(folder)) for folder in (own, *options.image_roots, *options.allow_roots))


def _write_shards(
    rows: Iterator[Record | Drop],
    options: PackOptions,
    name: str,
    tally: Tally,
    shards: list[Shard],
    journal: _Journal,
    progress: Callable[[Tally], None],
) -> None:
    seen = _known_keys(options.out, shards)
    writer: ShardWriter | None = None
    for row, result in ordered_map(partial(_convert, trusted=_trusted(options)), rows, options.workers):
        if isinstance(result, Packed) and key_hash(result.key) in seen:
            result = Drop("duplicate", row.id, "equal conversation and images")
        if isinstance(result, Packed):
            if writer is not None and _is_full(writer, result, options):
                shards.append(writer.close())
                journal.save(tally, shards)  # before this row counts: it is not in the shard
                writer = None
            writer = writer or ShardWriter(options.out, f"{name}-{len(shards):06d}")
            writer.add(result)
            seen.add(key_hash(result.key))
            tally.keep(row, result)
        else:
            tally.drop(result)
        tally.read(row)
        progress(tally)
    if writer is not None:
        shards.append(writer.close())
    journal.save(tally, shards)


def _is_full(writer: ShardWriter, packed: Packed, options: PackOptions) -> bool:
    too_many = len(writer) >= options.samples_per_shard
    return too_many or writer.num_bytes + packed.num_bytes > options.bytes_per_shard


def _default_name(source: Path) -> str:
    path = source.absolute()
    stem = path.parent.name if path.name == "meta.json" else path.stem
    return re.sub(r"[^0-9A-Za-z_-]+", "_", stem)[:73] or "data"


def _identity(options: PackOptions, name: str, format: str) -> dict[str, Any]:
    """What must be the same for a pack to be gone on with."""
    return {
        "name": name,
        "format": format,
        "image_roots": [str(root) for root in options.image_roots],
        "allow_roots": [str(root) for root in options.allow_roots],
        "samples_per_shard": options.samples_per_shard,
        "bytes_per_shard": options.bytes_per_shard,
        "tool_version": TOOL_VERSION,
    }


class _Journal:
    """How far a pack has come: pack.json while it runs, manifest.json when it is complete."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self._out, self._identity = out, identity
        self._path, self._manifest = out / "pack.json", out / "manifest.json"
        self.finished = self._manifest.is_file()

    def load(self) -> tuple[Tally, list[Shard]]:
        """The state to go on from. Raises ValueError when the folder holds something else."""
        path = self._manifest if self.finished else self._path
        if not path.is_file():
            if self._out.exists() and any(self._out.iterdir()):
                raise ValueError(f"{self._out} is not empty and holds no pack; choose another --out")
            self._out.mkdir(parents=True, exist_ok=True)
            self.save(Tally(), [])
            return Tally(), []
        state = json.loads(path.read_text())
        changed = [
            f"{key} was {state['options'].get(key)!r}, is {value!r}"
            for key, value in self._identity.items()
            if state["options"].get(key) != value
        ]
        if changed:
            raise ValueError(
                f"{self._out} holds a pack with other options ({'; '.join(changed)}); choose another --out"
            )
        return Tally(**state["tally"]), [Shard(**shard) for shard in state["shards"]]

    def save(self, tally: Tally, shards: list[Shard]) -> None:
        write_json(self._path, self._state(tally, shards))

    def finish(self, manifest: dict[str, Any]) -> None:
        write_json(self._manifest, manifest | {"options": self._identity})
        self._path.unlink()

    def _state(self, tally: Tally, shards: list[Shard]) -> dict[str, Any]:
        listed = [asdict(shard) for shard in shards]
        return {"options": self._identity, "tally": asdict(tally), "shards": listed}


def _skip(rows: Iterator[Record | Drop], done: Tally, out: Path) -> None:
    """Read past the rows that are packed already, and make sure that they are the same rows."""
    passed = Tally()
    for row in islice(rows, done.rows):
        passed.read(row)
    if passed.digest != done.digest:
        raise ValueError(
            f"{out} holds a pack of another input (its first {done.rows} rows differ); choose another --out"
        )


def _refuse_more(rows: Iterator[Record | Drop], out: Path) -> None:
    if next(rows, None) is not None:
        raise ValueError(f"{out} holds a complete pack, and the input has more rows now; choose another --out")


def _clear_leftovers(out: Path, shards: list[Shard]) -> None:
    """Remove what an interrupted run left behind the last shard that the journal knows."""
    known = {shard.name for shard in shards}
    for path in chain((out / "shards").glob("*"), (out / "index").glob("*")):
        if path.name.split(".")[0] not in known or path.name.endswith(".part"):
            path.unlink()


def _known_keys(out: Path, shards: list[Shard]) -> set[int]:
    indexes = [np.fromfile(out / "index" / f"{shard.name}.idx", dtype=INDEX_RECORD) for shard in shards]
    return {int(key) for index in indexes for key in index["key_hash"]}


def _write_stats(out: Path, tally: Tally, shards: list[Shard]) -> None:
    kept = {"samples": sum(shard.samples for shard in shards), "images": tally.images}
    counts = {"rows": tally.rows, **kept, "bytes": sum(shard.bytes for shard in shards)}
    write_json(out / "stats.json", {**counts, "drops": tally.drops, "examples": tally.examples})


def _manifest(name: str, tally: Tally, shards: list[Shard]) -> dict[str, Any]:
    return {
        "version": MANIFEST_VERSION,
        "name": name,
        "kind": "preference",
        "samples": sum(shard.samples for shard in shards),
        "images": tally.images,
        "bytes": sum(shard.bytes for shard in shards),
        "sources": tally.sources,
        "drops": tally.drops,
        "fingerprint": set_fingerprint(shards),
        "shards": [asdict(shard) for shard in shards],
        "tally": asdict(tally),
    }
