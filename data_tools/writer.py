"""Writes shards: a tar by webdataset's TarWriter with its index beside it, byte for byte a function of the samples."""

from __future__ import annotations

import hashlib
import mmap
import os
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import webdataset

from data_tools.convert import Packed
from pivot.data.index import INDEX_RECORD, key_hash
from pivot.data.manifest import Shard
from pivot.data.samples import all_completions, message_text
from pivot.system.files import sync_folder, write_atomically

U16, U32 = 2**16 - 1, 2**32 - 1


class ShardWriter:
    """One shard; it exists under its own name only once it is whole and on the disk."""

    def __init__(self, out: Path, name: str) -> None:
        self.name = name
        self._tar_path, self._idx_path = out / "shards" / f"{name}.tar", out / "index" / f"{name}.idx"
        for path in (self._tar_path, self._idx_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _part(self._tar_path).open("w+b")
        # A file object and encoder=False: no shell, no pickle. mtime 0: the same bytes on every run.
        self._writer = webdataset.TarWriter(self._file, encoder=False, compress=False, mtime=0)
        self._writer.tarstream.format = tarfile.USTAR_FORMAT
        self._records: list[np.ndarray] = []
        self._shapes: set[str] = set()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def add(self, packed: Packed) -> None:
        offset = self._writer.tarstream.offset
        for extension, data in packed.members:  # one by one: a single call would sort them, the JSON not first
            self._writer.write({"__key__": packed.key, extension: data})
        self._records.append(_index_record(packed, offset, self._writer.tarstream.offset - offset))
        self._shapes.add(packed.shape)
        self.num_bytes = self._writer.tarstream.offset

    def add_raw(self, entries: bytes, record: np.ndarray, shape: str) -> None:
        """The tar entries of a sample that is packed already, byte for byte, with its index record."""
        moved = record.copy()
        moved["offset"] = self._writer.tarstream.offset
        self._writer.tarstream.fileobj.write(entries)
        self._writer.tarstream.offset += len(entries)
        self._records.append(moved)
        self._shapes.add(shape)
        self.num_bytes = self._writer.tarstream.offset

    def abandon(self) -> None:
        """Remove what was written, after a failure; a full disk is not left full."""
        self._writer.tarstream.fileobj.closed = True  # or its end would be written when it is collected
        # First the name, which frees the space: closing writes what is buffered, and on a full disk that fails again.
        with suppress(OSError):
            _part(self._tar_path).unlink(missing_ok=True)
        with suppress(OSError):
            self._file.close()

    def close(self) -> Shard:
        """Finish both files and rename them into place."""
        self._writer.close()
        self._file.flush()
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for record in self._records:
                start = int(record["offset"])
                record["crc32"] = zlib.crc32(content[start : start + int(record["span"])])
            size, sha256 = len(content), hashlib.sha256(content).hexdigest()
        index = np.array(self._records, dtype=INDEX_RECORD).tobytes()
        _fsync(self._file)
        self._file.close()
        write_atomically(self._idx_path, index)  # while `abandon` still finds the tar, should this fill the disk
        _part(self._tar_path).replace(self._tar_path)
        sync_folder(self._tar_path.parent)
        shape = self._shapes.pop() if len(self._shapes) == 1 else ""
        return Shard(self.name, len(self._records), size, sha256, hashlib.sha256(index).hexdigest(), shape)


def _fsync(file: IO[bytes]) -> None:
    os.fsync(file.fileno())


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _index_record(packed: Packed, offset: int, span: int) -> np.ndarray:
    images = packed.sample["images"]
    record = np.zeros((), dtype=INDEX_RECORD)
    record["key_hash"] = key_hash(packed.key)
    record["offset"], record["span"] = offset, span
    record["json_len"] = len(packed.members[0][1])
    record["n_images"] = min(len(images), U16)
    record["img_w"] = min(max((image["w"] for image in images), default=0), U16)
    record["img_h"] = min(max((image["h"] for image in images), default=0), U16)
    record["pixels"] = min(sum(image["w"] * image["h"] for image in images), U32)
    for field, messages in ({"prompt": packed.sample["prompt"]} | all_completions(packed.sample)).items():
        record[f"chars_{field}"] = min(len(message_text(messages)), U32)
    return record
