"""A packed data set on disk: manifest.json, shards/NAME.tar and index/NAME.idx with one record per sample.

A sample is read with one `pread` of its tar headers and bodies, found through the index; no tar is ever scanned, so
a cut shard is an error and not a shorter data set. Members are read by the names in the sample's JSON; others are
never looked at, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pivot.data.samples import KEY_PATTERN, Sample, parse_sample

MANIFEST_VERSION = 1
BLOCK = 512  # of a tar
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


class ShardSet:
    """A complete data set that was packed by data_tools; rows count through its shards in the manifest's order."""

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: list[Shard], index: np.ndarray) -> None:
        self.folder, self.manifest, self.shards, self.index = folder, manifest, shards, index
        self.name: str = manifest["name"]
        self.kind: str = manifest["kind"]
        self.fingerprint: str = manifest["fingerprint"]
        self.first_rows = np.concatenate([[0], np.cumsum([shard.samples for shard in shards])]).astype(np.int64)
        self._files: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path) -> ShardSet:
        """The data set in folder `path`, its sizes, index and fingerprint checked; ValueError says what is wrong."""
        folder = Path(path)
        manifest = _read_manifest(folder)
        shards = [Shard(**entry) for entry in manifest["shards"]]
        found = set_fingerprint(shards)
        if found != manifest["fingerprint"]:
            raise ValueError(
                f"{folder}/manifest.json: fingerprint {manifest['fingerprint'][:12]} does not match its shard list "
                f"({found[:12]}); the file was edited or mixed up: copy the data set again or pack it again"
            )
        for shard in shards:
            _check_shard(folder, shard)
        index = np.concatenate([_read_index(folder, shard) for shard in shards])
        return cls(folder, manifest, shards, index)

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

    def describe(self, row: int) -> str:
        """The row in words, for messages."""
        shard, ordinal = self.locate(row)
        return f"{self.folder}/shards/{self.shards[shard].name}.tar sample {ordinal} (row {row})"

    def read(self, row: int) -> tuple[Sample, list[bytes]]:
        """The sample of a row and its image files. Raises DamagedSample when the bytes are not those packed."""
        record = self.index[row]
        buffer = self._pread(row, int(record["span"]))
        if zlib.crc32(buffer) != record["crc32"]:
            raise DamagedSample(f"{self.describe(row)}: crc32 differs from the index; the shard is damaged")
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
            self._files[shard] = os.open(self.folder / "shards" / f"{self.shards[shard].name}.tar", os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        state = "pack did not finish" if folder.is_dir() else "the folder does not exist"
        raise ValueError(
            f"{folder} holds no manifest.json ({state}); run python -m data_tools pack again (it resumes), "
            "or name the folder that it wrote"
        )
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the data set again") from error
    if manifest.get("version") != MANIFEST_VERSION:
        raise ValueError(f"{path}: version {manifest.get('version')}, expected {MANIFEST_VERSION}; pack the data again")
    if not manifest["shards"]:
        raise ValueError(f"{path} lists no shards; pack the data again")
    for entry in manifest["shards"]:
        if not SHARD_NAME.fullmatch(entry["name"]):
            raise ValueError(f"{path}: shard name {entry['name']!r} may hold letters, digits, _ and - only")
    return manifest


def _check_shard(folder: Path, shard: Shard) -> None:
    path = folder / "shards" / f"{shard.name}.tar"
    if not path.is_file():
        raise ValueError(f"{path} is missing, though manifest.json lists it; copy the data set again")
    found = path.stat().st_size
    if found != shard.bytes:
        raise ValueError(f"{path} holds {found} bytes, manifest.json says {shard.bytes}; the copy is cut: repeat it")


def _read_index(folder: Path, shard: Shard) -> np.ndarray:
    path = folder / "index" / f"{shard.name}.idx"
    if not path.is_file():
        raise ValueError(f"{path} is missing, though manifest.json lists its shard; copy the data set again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.idx_sha256:
        raise ValueError(f"{path}: sha256 differs from manifest.json; the index is damaged: copy the data set again")
    records = np.frombuffer(data, dtype=INDEX_RECORD)
    if len(records) != shard.samples:
        raise ValueError(f"{path} holds {len(records)} records, manifest.json says {shard.samples}; pack it again")
    return records
