"""`pack`: any known format to shards. Workers convert records, one process writes them in the input's order.

The output is a pure function of the input and the options, whatever the number of workers. After each shard the state
is written to `pack.json`; a second run with the same input and options goes on from there, one with others is refused.
`manifest.json` comes last: a folder without it is not a data set.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.convert import Packed, convert
from data_tools.filling import Filling
from data_tools.journal import Journal
from data_tools.readers import find_reader
from data_tools.readers.generic import IMAGE
from data_tools.readers.messages import IMAGE_PLACEHOLDER
from data_tools.records import Drop, Record, shown
from pivot.data.index import INDEX_RECORD, key_hash
from pivot.data.manifest import SHARD_NAME, Shard
from pivot.system.files import write_json
from pivot.system.workers import worker_pool

TOOL_VERSION = 4  # raise it when the same input would give other bytes: an unfinished pack must then start afresh
CHUNK = 16  # records per message to a worker
NUM_EXAMPLES = 3  # dropped rows shown for each reason
SHOWN_DETAIL = 600  # letters of what is said about one
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class PackOptions:
    source: Path
    out: Path
    name: str | None = None  # None: that of the source
    format: str = "auto"
    mapping: Mapping[str, str] = field(default_factory=dict)  # field -> column
    image_roots: tuple[Path, ...] = ()
    allow_roots: tuple[Path, ...] = ()
    # (i, n): rows i, i + n, ... counted from 1, so that n machines pack at once
    share: tuple[int, int] = (1, 1)
    turns: str = "last"  # of an SFT conversation: last | each answer becomes a sample
    max_side: int | None = None  # px; larger images are made smaller, the others keep their bytes
    workers: int = 1
    max_drop: float = 0.01  # share of the rows
    samples_per_shard: int = 2000
    bytes_per_shard: int = 256 << 20


@dataclass
class Tally:
    """What happened to the rows read so far."""

    rows: int = 0
    digest: str = ""  # chained over the rows
    kind: str = ""  # of the first sample, and so of all
    images: int = 0
    with_images: int = 0  # samples
    recoded: dict[str, int] = field(default_factory=dict)  # format -> images that became PNG
    prompts_taken_off: int = 0  # pairs whose answers both began with it
    untrained_answers: int = 0  # in the history of SFT samples: read, but no loss is taken on them
    drops: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    sources: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        return sum(self.drops.values())

    @property
    def num_lost(self) -> int:
        """Rows of which nothing is in the set: of a duplicate all is."""
        return self.num_dropped - self.drops.get(DUPLICATE, 0)

    @property
    def drop_ratio(self) -> float:
        return self.num_lost / max(1, self.rows)

    def read(self, row: Record | Drop) -> None:
        self.rows += 1
        self.digest = hashlib.sha256(self.digest.encode() + row.canonical()).hexdigest()

    def keep(self, record: Record, packed: Packed) -> None:
        source = self.sources.setdefault(packed.source, {"samples": 0, "repeat_time": record.repeat_time})
        source["samples"] += 1
        self.kind = record.kind
        self.images += len(packed.members) - 1
        self.with_images += len(packed.members) > 1
        self.prompts_taken_off += record.prompt_taken_off
        for format in packed.recoded:
            self.recoded[format] = self.recoded.get(format, 0) + 1
        if record.rejected is None:
            self.untrained_answers += sum(role == "assistant" for role, _ in record.history)

    def drop(self, drop: Drop) -> None:
        self.drops[drop.reason] = self.drops.get(drop.reason, 0) + 1
        examples = self.examples.setdefault(drop.reason, [])
        if len(examples) < NUM_EXAMPLES:
            # What is not Unicode in it, often the reason for the drop, can neither be stored nor shown.
            texts = {"id": shown(drop.id), "detail": shown(drop.detail, SHOWN_DETAIL)}.items()
            examples.append({name: text.encode("utf-8", "backslashreplace").decode() for name, text in texts})


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
    known = identity(options)
    options = replace(options, format=known["format"])  # to find it out takes reading
    with Journal(options.out, known) as journal:
        tally = Tally(**journal.state["tally"]) if journal.state else Tally()
        shards = journal.shards
        if journal.finished:
            check_unchanged(options, tally)
            return PackResult(tally, shards, complete=True)
        shards = _write_shards(_rows(options), options, tally, journal, progress)
        complete = tally.drop_ratio <= options.max_drop
        _write_stats(options.out, tally, shards)
        if complete:
            _require_samples(options, tally)
            facts = {"images": tally.images, "sources": tally.sources, "drops": tally.drops, "tally": asdict(tally)}
            journal.finish(shards, name=_name_of(options), kind=tally.kind, **facts)
    return PackResult(tally, shards, complete)


def try_pack(options: PackOptions, progress: Callable[[Tally], None] = lambda tally: None) -> tuple[Tally, int]:
    """(tally, bytes) of what `pack` would do: every image is decoded and nothing is written. Raises what it would."""
    known = identity(options)
    options = replace(options, format=known["format"])
    journal = Journal(options.out, known).look()
    done = Tally(**journal.state["tally"]) if journal.state else Tally()
    if journal.finished:
        check_unchanged(options, done)
        return done, sum(shard.bytes for shard in journal.shards)
    if journal.state:
        deque(_skip(_rows(options), done, options.out), maxlen=0)
    tally, seen, size = Tally(), set[int](), 0
    for row, result in _converted(_rows(options), options):
        result = _judge(row, result, tally, seen)
        if isinstance(result, Packed):
            size += result.num_bytes
            tally.keep(row, result)
            seen.add(key_hash(result.key))
        else:
            tally.drop(result)
        tally.read(row)
        progress(tally)
    if tally.drop_ratio <= options.max_drop:
        _require_samples(options, tally)
    return tally, size


def _require_samples(options: PackOptions, tally: Tally) -> None:
    if tally.num_dropped == tally.rows:
        drops = ", ".join(f"{reason}: {count}" for reason, count in tally.drops.items())
        raise ValueError(f"{options.source}: no sample is left ({drops}); mend the input")


def ordered_map(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, chunk: int = CHUNK
) -> Iterator[tuple[Any, Any]]:
    """(item, function(item)) in the order of the items, with a bounded number of them under way."""
    if workers <= 1:
        yield from ((item, function(item)) for item in items)
        return
    items = iter(items)
    waiting: deque[tuple[list[Any], Future]] = deque()
    with worker_pool(workers) as pool:
        while True:
            while len(waiting) < 3 * workers and (batch := list(islice(items, chunk))):
                waiting.append((batch, pool.submit(_map_chunk, function, batch)))
            if not waiting:
                return
            batch, future = waiting.popleft()
            yield from zip(batch, future.result(), strict=True)


def _map_chunk(function: Callable[[Any], Any], chunk: list[Any]) -> list[Any]:
    return [function(item) for item in chunk]


def _rows(options: PackOptions) -> Iterator[Record | Drop]:
    """Raises ValueError when there is none, before anything is written."""
    format, reader = find_reader(options.source, options.format, options.mapping)
    rows = _cut_turns(reader.read(options.source, options.image_roots, options.mapping.get(IMAGE)), options.turns)
    share, num_shares = options.share
    rows = islice(rows, share - 1, None, num_shares)
    first = next(rows, None)
    if first is None and share > 1:
        raise ValueError(f"{options.source} holds fewer than {share} rows; take fewer than {num_shares} shares")
    if first is None:
        raise ValueError(f"{options.source} holds no row of the format {format}; look into it, or give its --format")
    return chain([first], rows)


def _cut_turns(rows: Iterable[Record | Drop], turns: str) -> Iterator[Record | Drop]:
    for row in rows:
        if turns == "each" and isinstance(row, Record) and row.kind == "sft":
            yield from each_answer(row)
        else:
            yield row


def each_answer(record: Record) -> Iterator[Record]:
    """An SFT record for every answer of the conversation, the messages before it as its prompt.

    Images go with the placeholders that a prompt holds; without any placeholder every record gets all of them.
    """
    turns = [*record.history, ("user", record.prompt), ("assistant", record.chosen)]
    number = 0
    for end in range(1, len(turns)):
        if (turns[end - 1][0], turns[end][0]) != ("user", "assistant"):
            continue
        before = turns[:end]
        shown = sum(text.count(IMAGE_PLACEHOLDER) for _, text in before)
        named = sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns[:-1])
        images = record.images[:shown] if named == len(record.images) else record.images
        yield replace(
            record,
            id=f"{record.id}#{number}",
            history=tuple(before[:-1]),
            prompt=before[-1][1],
            chosen=turns[end][1],
            images=images,
        )
        number += 1


def _convert(row: Record | Drop, trusted: tuple[Path, ...], max_side: int | None) -> Packed | Drop:
    return row if isinstance(row, Drop) else convert(row, trusted, max_side)


def _converted(rows: Iterable[Record | Drop], options: PackOptions) -> Iterator[tuple[Any, Packed | Drop]]:
    return ordered_map(_converter(options, _convert), rows, options.workers)


def _converter(options: PackOptions, function: Callable[..., Packed | Drop]) -> Callable[[Any], Packed | Drop]:
    return partial(function, trusted=_trusted(options), max_side=options.max_side)


def _judge(row: Record | Drop, result: Packed | Drop, tally: Tally, seen: set[int]) -> Packed | Drop:
    """The result, unless the set as a whole has no place for it."""
    if isinstance(result, Packed) and key_hash(result.key) in seen:
        return Drop(DUPLICATE, row.id, "equal conversation and images")
    if isinstance(result, Packed) and tally.kind and result.sample["kind"] != tally.kind:
        return Drop("another kind", row.id, f"{result.sample['kind']}, the first sample is {tally.kind}; pack it apart")
    return result


def _trusted(options: PackOptions) -> tuple[Path, ...]:
    """Where images may really lie: what the user named, links resolved."""
    own = options.source if options.source.is_dir() else options.source.parent
    return tuple(Path(os.path.realpath(folder)) for folder in (own, *options.image_roots, *options.allow_roots))


def _write_shards(
    rows: Iterator[Record | Drop],
    options: PackOptions,
    tally: Tally,
    journal: Journal,
    progress: Callable[[Tally], None],
) -> list[Shard]:
    """All shards, those of earlier runs among them. `tally` goes on from where it was."""
    filling = Filling(
        options.out, _name_of(options), options.samples_per_shard, options.bytes_per_shard, journal.shards
    )
    seen = _known_keys(options.out, filling.shards)
    began = (journal.state or {}).get("filling", [])

    def save() -> None:
        journal.save(filling.shards, tally=asdict(tally), filling=filling.state())

    try:
        if journal.state is None:
            save()
        journal.clear_leftovers()
        filling.reopen(began)
        for row, packed in _converted_again(rows, tally, began, options):
            filling.add(packed, row)
            seen.add(key_hash(packed.key))
        for record, result in _converted(rows, options):
            result = _judge(record, result, tally, seen)
            if isinstance(result, Packed):
                if filling.make_room(result):
                    save()  # before this row counts: it is in no finished shard
                filling.add(result, tally.rows)
                seen.add(key_hash(result.key))
                tally.keep(record, result)
            else:
                tally.drop(result)
            tally.read(record)
            progress(tally)
        filling.finish_all()
        save()
    except BaseException:
        filling.abandon()
        raise
    return filling.shards


def _converted_again(
    rows: Iterator[Record | Drop], done: Tally, began: list[dict[str, Any]], options: PackOptions
) -> Iterator[tuple[int, Packed]]:
    """(row, sample) of what was in open shards when the last run ended; reads past the other rows that it did."""
    shapes = {row: shard["shape"] for shard in began for row in shard["rows"]}
    again = ((number, row) for number, row in _skip(rows, done, options.out) if number in shapes)
    for (number, _), result in ordered_map(_converter(options, _convert_numbered), again, options.workers):
        if not isinstance(result, Packed) or result.shape != shapes[number]:
            raise ValueError(f"{options.out}: row {number} is not what it was when it was packed; choose another --out")
        yield number, result


def _convert_numbered(numbered: tuple[int, Record | Drop], **settings: Any) -> Packed | Drop:
    return _convert(numbered[1], **settings)


def _name_of(options: PackOptions) -> str:
    name = options.name or _default_name(options.source)
    if not SHARD_NAME.fullmatch(name[:73]) or len(name) > 73:  # 7 more for the number
        raise ValueError(f"--name {name!r}: expected at most 73 letters, digits, _ and -")
    return name


def _default_name(source: Path) -> str:
    path = source.absolute()
    stem = path.parent.name if path.name == "meta.json" else path.stem
    return re.sub(r"[^0-9A-Za-z_-]+", "_", stem)[:73] or "data"


def identity(options: PackOptions) -> dict[str, Any]:
    """What must be the same for a pack to be gone on with."""
    format, _ = find_reader(options.source, options.format, options.mapping)
    return {
        "name": _name_of(options),
        "format": format,
        "mapping": dict(options.mapping),
        "image_roots": [str(root) for root in options.image_roots],
        "allow_roots": [str(root) for root in options.allow_roots],
        "turns": options.turns,
        "max_side": options.max_side,
        "samples_per_shard": options.samples_per_shard,
        "bytes_per_shard": options.bytes_per_shard,
        "tool_version": TOOL_VERSION,
        "share": None if options.share == (1, 1) else list(options.share),
    }


def _skip(rows: Iterator[Record | Drop], done: Tally, out: Path) -> Iterator[tuple[int, Record | Drop]]:
    """(number, row) of those that were read before. Raises ValueError at their end when they are others now."""
    passed = Tally()
    for row in islice(rows, done.rows):
        yield passed.rows, row
        passed.read(row)
    if passed.digest != done.digest:
        raise ValueError(
            f"{out} holds a pack of another input (its first {done.rows} rows differ); choose another --out"
        )


def check_unchanged(options: PackOptions, done: Tally) -> None:
    """Raise ValueError unless the input has the rows that were packed and no more."""
    rows = _rows(options)
    deque(_skip(rows, done, options.out), maxlen=0)
    if next(rows, None) is not None:
        raise ValueError(f"{options.out} holds a complete pack, and the input has more rows now; choose another --out")


def _known_keys(out: Path, shards: list[Shard]) -> set[int]:
    indexes = [np.fromfile(out / "index" / f"{shard.name}.idx", dtype=INDEX_RECORD) for shard in shards]
    return {int(key) for index in indexes for key in index["key_hash"]}


def _write_stats(out: Path, tally: Tally, shards: list[Shard]) -> None:
    kept = {"samples": sum(shard.samples for shard in shards), "images": tally.images}
    counts = {"rows": tally.rows, **kept, "bytes": sum(shard.bytes for shard in shards)}
    more = {"with_images": tally.with_images, "recoded": tally.recoded, "prompts_taken_off": tally.prompts_taken_off}
    write_json(out / "stats.json", {**counts, **more, "drops": tally.drops, "examples": tally.examples})
