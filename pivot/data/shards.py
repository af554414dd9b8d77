"""A packed data set on disk: manifest.json, shards/NAME.tar and index/NAME.idx with one record per sample.

A sample is read with one `pread` of its tar headers and bodies, found through the index; no tar is ever scanned, so
a cut shard is an error and not a shorter data set. Members are read by the names in the sample's JSON; others are
never looked at, and nothing is unpickled.

A folder may also be a URL (s3://, gs://, hf://, https://): its index is fetched at once, a shard when it is first read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pivot.data.index import BYTES_PER_RECORD, check_shard, read_index, read_indexes
from pivot.data.manifest import Part, read_part
from pivot.data.remote import WINDOW_SHARDS, ShardCache, is_remote, join_url
from pivot.data.samples import KEY_PATTERN, UNPAIRED, Sample, parse_sample

BLOCK = 512  # of a tar
REGULAR = ("0", "\0")  # types of tar entries
MAX_OPEN_FILES = 128  # per process; the usual limit is 1024 and a set may hold 10,000 shards
OCTAL = re.compile(rb"[0-7]+")
PICTURE = re.compile(r"([0-9A-Za-z_-]+\.)?(jpg|jpeg|png|webp)")  # what may follow KEY. without being listed


class DamagedSample(RuntimeError):
    """A sample whose bytes are not those that were packed: the loader masks it and goes on."""


def walk_members(buffer: bytes) -> Iterator[tuple[str, memoryview]]:
    """(name, body) of each regular member in `buffer`, a whole number of USTAR entries. Raises ValueError if not."""
    return ((name, body) for name, kind, body in walk_entries(buffer) if kind in REGULAR)


def walk_entries(buffer: bytes) -> Iterator[tuple[str, str, memoryview]]:
    """(name, type, body) of each entry, links and the like among them."""
    view, position = memoryview(buffer), 0
    while position < len(buffer):
        header = buffer[position : position + BLOCK]
        folder, name = (part.rstrip(b"\0").decode("ascii", "replace") for part in (header[345:500], header[:100]))
        digits = header[124:136].strip(b" \0") or b"0"
        octal = OCTAL.fullmatch(digits) is not None  # int() would take a sign, and a size below 0 leads back
        size, body = int(digits, 8) if octal else 0, position + BLOCK
        if not name or not octal or body + size > len(buffer):
            raise ValueError(f"no tar member at byte {position} of the sample")
        yield f"{folder}/{name}" if folder else name, chr(header[156]), view[body : body + size]
        position = body + -(-size // BLOCK) * BLOCK


def require_kind(where: str, shards: ShardSet, *, single_answers: bool) -> None:
    """Raise ValueError for a set of single labelled answers, unless they are what is learned from or scored."""
    if shards.kind == UNPAIRED and not single_answers:
        raise ValueError(
            f"{where}: {shards.name} is of kind {UNPAIRED}, single answers with a label; only KTO learns from them "
            "(launch/train_kto.py). Name a set of kind preference or sft, or train with KTO"
        )


class ShardSet:
    """A complete data set that was packed by data_tools; rows count through its shards in the manifest's order.

    `join` makes one of several, whose rows count through the first, then the second, and so on.
    """

    def __init__(self, parts: tuple[Part, ...], index: np.ndarray, cache: ShardCache | None = None) -> None:
        kinds = sorted({part.manifest["kind"] for part in parts})
        if len(kinds) > 1:
            raise ValueError(f"the sets are of different kinds ({', '.join(kinds)}); train on sets of one kind")
        self.parts, self.index, self._cache = parts, index, cache
        self.kind: str = kinds[0]
        self.name = "+".join(part.name for part in parts)
        self.shards = [shard for part in parts for shard in part.shards]
        self._folders = [part.folder for part in parts for _ in part.shards]
        self.first_rows = np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)
        self._files: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, cache: ShardCache | None = None) -> ShardSet:
        """The data set at `path`, its sizes, index and fingerprint checked; ValueError says what is wrong.

        A URL needs a `cache` for its shards.
        """
        part = read_part(path, cache)
        return cls((part,), read_indexes(part, cache), cache if is_remote(part.folder) else None)

    @classmethod
    def open_sound(cls, path: str | Path) -> tuple[ShardSet, list[str]]:
        """The data set at `path` without the shards for which `open` refuses it, and what is wrong with each of them.

        Raises ValueError when the manifest does not say which shards there are.
        """
        part, sound, problems = read_part(path, None), [], []
        for shard in part.shards:
            try:
                check_shard(part.folder, shard)
                read_index(part.folder, shard, None, memoryview(bytearray(shard.samples * BYTES_PER_RECORD)))
                sound.append(shard)
            except ValueError as error:
                problems.append(str(error))
        part = replace(part, shards=tuple(sound))
        return cls((part,), read_indexes(part, None)), problems

    @classmethod
    def join(cls, sets: list[ShardSet]) -> ShardSet:
        """The sets one behind the other. Raises ValueError when one occurs twice or their kinds differ."""
        if len(sets) == 1:
            return sets[0]
        parts = tuple(part for one in sets for part in one.parts)
        for place, part in enumerate(parts):
            if part.fingerprint in {other.fingerprint for other in parts[:place]}:
                raise ValueError(f"{part.folder} occurs twice; name it once, with repeat or weight")
        caches = [one._cache for one in sets if one._cache is not None]
        return cls(parts, np.concatenate([one.index for one in sets]), caches[0] if caches else None)

    @property
    def folder(self) -> Path:
        """Of a set with one part."""
        return Path(self.parts[0].folder)

    @property
    def manifest(self) -> dict[str, Any]:
        """Of a set with one part."""
        return self.parts[0].manifest

    @property
    def fingerprint(self) -> str:
        """That of the manifest, or one over those of all parts."""
        if len(self.parts) == 1:
            return self.parts[0].fingerprint
        return hashlib.sha256(json.dumps([part.fingerprint for part in self.parts]).encode()).hexdigest()

    @property
    def is_remote(self) -> bool:
        """Whether any part is fetched while it is read."""
        return any(is_remote(part.folder) for part in self.parts)

    @property
    def cache_bytes(self) -> int | None:
        """The cap of what is kept of remote parts."""
        return None if self._cache is None else self._cache.max_bytes

    def check_cache(self, *, whole: bool = False) -> None:
        """Raise ValueError unless two windows of every remote part fit under the cap: one read, one fetched ahead.

        With `whole` all of it must: a set whose order has no windows.
        """
        last = None if whole else 2 * WINDOW_SHARDS
        remote = [part for part in self.parts if is_remote(part.folder)]
        needed = sum(sum(sorted((shard.bytes for shard in part.shards), reverse=True)[:last]) for part in remote)
        if self._cache is not None and needed > self._cache.max_bytes:
            what = f"all of {self.name}" if whole else f"two windows of {WINDOW_SHARDS} shards"
            mend = "sample a part of the set" if whole else "reshard the set into smaller shards"
            raise ValueError(
                f"data.shard_cache_gb: {self._cache.max_bytes / 1e9:g} GB, but {what} need {needed / 1e9:.3g}; raise "
                f"it, or {mend}"
            )

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # a worker process opens its own files

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(shard.samples for shard in self.shards)

    def locate(self, row: int) -> tuple[int, int]:
        """(shard number, ordinal inside that shard) of a row."""
        shard = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return shard, row - int(self.first_rows[shard])

    def part_of(self, shard: int) -> Part:
        """The part that a shard belongs to."""
        ends = np.cumsum([len(part.shards) for part in self.parts])
        return self.parts[int(np.searchsorted(ends, shard, side="right"))]

    def describe(self, row: int) -> str:
        """The row in words, for messages."""
        shard, ordinal = self.locate(row)
        return f"{self._folders[shard]}/shards/{self.shards[shard].name}.tar sample {ordinal} (row {row})"

    def address(self, row: int) -> dict[str, Any]:
        """The row in a record, as `python -m data_tools exclude` finds it again in any copy of the set."""
        shard, ordinal = self.locate(row)
        record = self.index[row]
        return {
            "dataset": self.part_of(shard).name,
            "shard": self.shards[shard].name,
            "ordinal": ordinal,
            "key_hash": f"{int(record['key_hash']):016x}",
            "offset": int(record["offset"]),
        }

    def read(self, row: int) -> tuple[Sample, list[bytes]]:
        """The sample of a row and its image files. Raises DamagedSample when the bytes are not those packed."""
        sample, listed, members = self._take_apart(row, self.read_span(row))
        try:
            images = [bytes(members[name]) for name in listed[1:]]
        except KeyError as error:
            raise ValueError(f"{self.describe(row)}: the JSON names member {error}, which is not there") from error
        return sample, images

    def read_entries(self, row: int) -> tuple[Sample, bytes]:
        """The sample of a row and its tar entries, to be copied byte for byte.

        Raises ValueError when anything lies there but its JSON, the images that it lists and further pictures, such as
        the demo's masks: we would never look at it, but another reader may run it.
        """
        buffer = self.read_span(row)
        sample, listed, _ = self._take_apart(row, buffer)
        members = [name if kind in REGULAR else f"{name} (type {kind})" for name, kind, _ in walk_entries(buffer)]
        key, more = listed[0].removesuffix("json"), members[len(listed) :]
        pictures = all(name.startswith(key) and PICTURE.fullmatch(name.removeprefix(key)) for name in more)
        if members[: len(listed)] != listed or not pictures or len(set(members)) < len(members):
            shard, _ = self.locate(row)
            raise ValueError(
                f"{self.describe(row)}: holds the members {members}, expected {listed} and pictures at most; another "
                f"may be code: python -m data_tools pack {self._folders[shard]}/shards --out NEW leaves it out"
            )
        return sample, buffer

    def read_span(self, row: int) -> bytes:
        """The tar entries of a sample as they lie in the shard, crc32 checked."""
        buffer = self._pread(row, int(self.index[row]["span"]))
        if zlib.crc32(buffer) != self.index[row]["crc32"]:
            raise DamagedSample(
                f"{self.describe(row)}: crc32 differs from the index; the shard is damaged: copy it again"
            )
        return buffer

    def read_text(self, row: int) -> Sample:
        """The sample of a row without its images and without the crc check: for counting, where images cost most."""
        buffer = self._pread(row, BLOCK + int(self.index[row]["json_len"]))
        return self._parse(row, buffer[BLOCK:])

    def _take_apart(self, row: int, buffer: bytes) -> tuple[Sample, list[str], dict[str, memoryview]]:
        """(sample, names of its JSON and of the images that it lists, name -> body of what is there)."""
        try:
            members = dict(walk_members(buffer))
        except ValueError as error:
            raise ValueError(f"{self.describe(row)}: {error}") from error
        first = next(iter(members), "")
        key = first.removesuffix(".json")
        if key == first or not KEY_PATTERN.fullmatch(key):
            raise ValueError(f"{self.describe(row)}: the first member is {first!r}, expected KEY.json")
        sample = self._parse(row, bytes(members[first]))
        return sample, [first, *(f"{key}.{image['member']}" for image in sample["images"])], members

    def _parse(self, row: int, data: bytes) -> Sample:
        try:
            return parse_sample(data)
        except ValueError as error:
            raise ValueError(f"{self.describe(row)}: {error}") from error

    def _pread(self, row: int, size: int) -> bytes:
        shard, _ = self.locate(row)
        path = None if shard in self._files else self.fetch(shard)  # not a damaged sample where it cannot be had
        try:
            buffer = os.pread(self._file(shard, path), size, int(self.index[row]["offset"]))
        except OSError as error:
            self._files.clear()  # a stale network handle must not spoil the second try
            raise DamagedSample(f"{self.describe(row)}: {error}") from error
        if len(buffer) != size:
            raise DamagedSample(
                f"{self.describe(row)}: {len(buffer)} bytes found, {size} expected; the shard is cut: copy it again"
            )
        return buffer

    def _file(self, shard: int, path: Path | None) -> int:
        """The open file of a shard; `path` is where it lies, None when it is open."""
        if path is not None:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            if self._cache is not None:
                self._close_evicted()
            self._files[shard] = os.open(path, os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def fetch(self, shard: int) -> Path:
        """Where the tar of a shard lies on this machine; a remote one is downloaded unless the cache has it."""
        folder, entry = self._folders[shard], self.shards[shard]
        if not is_remote(folder):
            return Path(folder) / "shards" / f"{entry.name}.tar"
        assert self._cache is not None
        url = join_url(folder, "shards", f"{entry.name}.tar")
        return self._cache.fetch(url, sha256=entry.sha256, num_bytes=entry.bytes)

    def read_beside(self, shard: int, *names: str) -> bytes | None:
        """A file that was uploaded with a remote set, or None where there is none."""
        if self._cache is None or not is_remote(self._folders[shard]):
            return None
        return self._cache.read_if_there(join_url(self._folders[shard], *names))

    def _close_evicted(self) -> None:
        """An open file keeps its place on the disk after the cache removed it."""
        for shard, descriptor in list(self._files.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._files.pop(shard))
