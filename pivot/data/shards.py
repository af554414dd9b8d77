"""A packed data set on disk: manifest.json, shards/NAME.tar and index/NAME.idx with one record per sample.

A sample is read with one `pread` of its tar headers and bodies, found through the index; no tar is ever scanned, so
a cut shard is an error and not a shorter data set. Members are read by the names in the sample's JSON; others are
never looked at, and nothing is unpickled.

A folder may also be a URL (s3://, gs://, hf://, https://): its index is fetched at once, a shard when it is first read.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pivot.data.remote import WINDOW_SHARDS, ShardCache, is_remote, join_url
from pivot.data.samples import KEY_PATTERN, Sample, parse_sample

MANIFEST_VERSION = 1
BLOCK = 512  # of a tar
OPENING_THREADS = 8
OPENING_BATCH = 16  # indexes that a thread takes at a time
MAX_OPEN_FILES = 128  # per process; the usual limit is 1024 and a set may hold 10,000 shards
SHARD_NAME = re.compile(r"[0-9A-Za-z_-]{1,80}")

INDEX_RECORD = np.dtype(
    [
        ("key_hash", "<u8"),
        ("offset", "<u8"),  # of the sample's first tar header
        ("span", "<u4"),  # bytes of all its headers and padded bodies
        ("crc32", "<u4"),  # over the span
        ("json_len", "<u4"),  # the JSON is the first member
        ("n_images", "<u2"),
        ("flags", "<u2"),  # 0; reserved
        ("img_w", "<u2"),  # the largest
        ("img_h", "<u2"),
        ("pixels", "<u4"),  # the sum
        ("chars_prompt", "<u4"),
        ("chars_chosen", "<u4"),
        ("chars_rejected", "<u4"),
        ("reserved", "V12"),
    ]
)
assert INDEX_RECORD.itemsize == 64


class DamagedSample(RuntimeError):
    """A sample whose bytes are not those that were packed: the loader masks it and goes on."""


@dataclass(frozen=True)
class Shard:
    """One entry of the manifest's shard list."""

    name: str
    samples: int
    bytes: int
    sha256: str
    idx_sha256: str
    shape: str = ""  # of every sample in it, by samples.sample_shape; '' where they differ, or nobody looked


def key_hash(key: str) -> int:
    """The u64 that stands for a key in the index."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def set_fingerprint(shards: list[Shard]) -> str:
    """sha256 over the format version and the content of all shards, in order."""
    listed = [[shard.name, shard.samples, shard.sha256] for shard in shards]
    text = json.dumps({"version": MANIFEST_VERSION, "shards": listed}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def walk_members(buffer: bytes) -> Iterator[tuple[str, memoryview]]:
    """(name, body) of each regular member in `buffer`, a whole number of USTAR entries. Raises ValueError if not."""
    view, position = memoryview(buffer), 0
    while position < len(buffer):
        header = buffer[position : position + BLOCK]
        name = header[:100].rstrip(b"\0").decode("ascii")
        size = int(header[124:136].rstrip(b" \0") or b"0", 8)
        body = position + BLOCK
        if not name or body + size > len(buffer):
            raise ValueError(f"no tar member at byte {position} of the sample")
        if header[156:157] in (b"0", b"\0"):
            yield name, view[body : body + size]
        position = body + -(-size // BLOCK) * BLOCK


@dataclass(frozen=True)
class Part:
    """One packed folder of a data set that may be made of several."""

    folder: str  # as it was named: a path or a URL
    name: str
    fingerprint: str
    manifest: dict[str, Any]
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


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
        folder = str(path)
        if is_remote(folder) and cache is None:
            raise ValueError(f"{folder} is remote and there is no shard cache; copy the set to this machine first")
        manifest = _read_manifest(folder, cache)
        shards = tuple(Shard(**entry) for entry in manifest["shards"])
        found = set_fingerprint(list(shards))
        if found != manifest["fingerprint"]:
            raise ValueError(
                f"{folder}/manifest.json: fingerprint {manifest['fingerprint'][:12]} does not match its shard list "
                f"({found[:12]}); the file was edited or mixed up: copy the data set again or pack it again"
            )
        part = Part(folder, manifest["name"], manifest["fingerprint"], manifest, shards)
        return cls((part,), _read_indexes(part, cache), cache if is_remote(folder) else None)

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

    def read(self, row: int) -> tuple[Sample, list[bytes]]:
        """The sample of a row and its image files. Raises DamagedSample when the bytes are not those packed."""
        buffer = self.read_span(row)
        members = dict(walk_members(buffer))
        first = next(iter(members))
        key = first.removesuffix(".json")
        if key == first or not KEY_PATTERN.fullmatch(key):
            raise ValueError(f"{self.describe(row)}: the first member is {first!r}, expected KEY.json")
        sample = self._parse(row, bytes(members[first]))
        try:
            images = [bytes(members[f"{key}.{image['member']}"]) for image in sample["images"]]
        except KeyError as error:
            raise ValueError(f"{self.describe(row)}: the JSON names member {error}, which is not there") from error
        return sample, images

    def read_span(self, row: int) -> bytes:
        """The tar entries of a sample as they lie in the shard, crc32 checked."""
        buffer = self._pread(row, int(self.index[row]["span"]))
        if zlib.crc32(buffer) != self.index[row]["crc32"]:
            raise DamagedSample(f"{self.describe(row)}: crc32 differs from the index; the shard is damaged")
        return buffer

    def read_text(self, row: int) -> Sample:
        """The sample of a row without its images and without the crc check: for counting, where images cost most."""
        buffer = self._pread(row, BLOCK + int(self.index[row]["json_len"]))
        return self._parse(row, buffer[BLOCK:])

    def _parse(self, row: int, data: bytes) -> Sample:
        try:
            return parse_sample(data)
        except ValueError as error:
            raise ValueError(f"{self.describe(row)}: {error}") from error

    def _pread(self, row: int, size: int) -> bytes:
        shard, _ = self.locate(row)
        try:
            buffer = os.pread(self._file(shard), size, int(self.index[row]["offset"]))
        except OSError as error:
            self._files.clear()  # a stale network handle must not spoil the second try
            raise DamagedSample(f"{self.describe(row)}: {error}") from error
        if len(buffer) != size:
            raise DamagedSample(f"{self.describe(row)}: {len(buffer)} bytes found, {size} expected; the shard is cut")
        return buffer

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            if self._cache is not None:
                self._close_evicted()
            self._files[shard] = os.open(self.fetch(shard), os.O_RDONLY)
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


def _read_manifest(folder: str, cache: ShardCache | None) -> dict[str, Any]:
    path = join_url(folder, "manifest.json") if is_remote(folder) else str(Path(folder) / "manifest.json")
    try:
        manifest = json.loads(_read_manifest_text(folder, path, cache))
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise ValueError(f"{path} is not JSON ({error}); copy the data set again") from error
        raise
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        version = manifest.get("version") if isinstance(manifest, dict) else None
        raise ValueError(f"{path}: version {version}, expected {MANIFEST_VERSION}; pack the data again")
    if not manifest["shards"]:
        raise ValueError(f"{path} lists no shards; pack the data again")
    for entry in manifest["shards"]:
        if not SHARD_NAME.fullmatch(entry["name"]):
            raise ValueError(f"{path}: shard name {entry['name']!r} may hold letters, digits, _ and - only")
    return manifest


def _read_manifest_text(folder: str, path: str, cache: ShardCache | None) -> bytes:
    if is_remote(folder):
        assert cache is not None
        return cache.read(path)
    if not Path(path).is_file():
        state = "pack did not finish" if Path(folder).is_dir() else "the folder does not exist"
        raise ValueError(
            f"{folder} holds no manifest.json ({state}); run python -m data_tools pack again (it resumes), "
            "or name the folder that it wrote"
        )
    return Path(path).read_bytes()


def _allocate(samples: int) -> np.ndarray:
    """INDEX_RECORD[samples] in small pages, which the readers touch side by side: 0.3 s of processor time for 640 MB.

    numpy would ask for huge ones. Where memory is in use, as by the files read before, the kernel first moves it about
    to make some: 0.6 to 1.3 s.
    """
    block = mmap.mmap(-1, max(1, samples) * INDEX_RECORD.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(block, dtype=INDEX_RECORD, count=samples)


def _read_indexes(part: Part, cache: ShardCache | None) -> np.ndarray:
    """INDEX_RECORD[samples] of all shards, read into one block: 10 million records take 640 MB and no copy.

    By threads, since reading and hashing leave the interpreter free, and opening files over a network is slow.
    """
    index = _allocate(part.samples)
    block = index.view(np.uint8).data
    ends = np.cumsum([shard.samples for shard in part.shards]) * INDEX_RECORD.itemsize
    local = not is_remote(part.folder)

    def read(first: int) -> None:
        for number in range(first, min(first + OPENING_BATCH, len(part.shards))):
            shard, end = part.shards[number], int(ends[number])
            if local:
                _check_shard(part.folder, shard)
            _read_index(part.folder, shard, cache, block[end - shard.samples * INDEX_RECORD.itemsize : end])

    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        for _ in pool.map(read, range(0, len(part.shards), OPENING_BATCH)):
            pass  # in the manifest's order, so that of several errors the first is raised
    return index


def _check_shard(folder: str, shard: Shard) -> None:
    path = f"{folder}/shards/{shard.name}.tar"
    try:
        found = os.stat(path).st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, though manifest.json lists it; copy the data set again") from error
    if found != shard.bytes:
        raise ValueError(f"{path} holds {found} bytes, manifest.json says {shard.bytes}; the copy is cut: repeat it")


def _read_index(folder: str, shard: Shard, cache: ShardCache | None, block: memoryview) -> None:
    if is_remote(folder):
        assert cache is not None
        path = str(cache.fetch(join_url(folder, "index", f"{shard.name}.idx"), sha256=shard.idx_sha256))
    else:
        path = f"{folder}/index/{shard.name}.idx"
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, though manifest.json lists its shard; copy the data set again") from error
    try:
        size = os.fstat(file).st_size
        if size != len(block) or os.readv(file, [block]) != size:
            raise ValueError(
                f"{path} holds {size} bytes, expected 64 for each of {shard.samples} samples; copy it again"
            )
    finally:
        os.close(file)
    if hashlib.sha256(block).hexdigest() != shard.idx_sha256:
        raise ValueError(f"{path}: sha256 differs from manifest.json; the index is damaged: copy the data set again")
