"""The index of a packed data set: where each sample lies in its shard, and what can be known without reading it."""

from __future__ import annotations

import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pivot.data.manifest import Part, Shard
from pivot.data.remote import ShardCache, is_remote, join_url

OPENING_THREADS = 8
OPENING_BATCH = 16  # indexes that a thread takes at a time

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
BYTES_PER_RECORD = INDEX_RECORD.itemsize
assert BYTES_PER_RECORD == 64


def key_hash(key: str) -> int:
    """The u64 that stands for a key in the index."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def _allocate(samples: int) -> np.ndarray:
    """INDEX_RECORD[samples] in small pages, which the readers touch side by side: 0.3 s of processor time for 640 MB.

    numpy would ask for huge ones. Where memory is in use, as by the files read before, the kernel first moves it about
    to make some: 0.6 to 1.3 s.
    """
    block = mmap.mmap(-1, max(1, samples) * BYTES_PER_RECORD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(block, dtype=INDEX_RECORD, count=samples)


def read_indexes(part: Part, cache: ShardCache | None) -> np.ndarray:
    """INDEX_RECORD[samples] of all shards, read into one block: 10 million records take 640 MB and no copy.

    By threads, since reading and hashing leave the interpreter free, and opening files over a network is slow.
    """
    index = _allocate(part.samples)
    block = index.view(np.uint8).data
    ends = np.cumsum([shard.samples for shard in part.shards]) * BYTES_PER_RECORD
    local = not is_remote(part.folder)

    def read(first: int) -> None:
        for number in range(first, min(first + OPENING_BATCH, len(part.shards))):
            shard, end = part.shards[number], int(ends[number])
            if local:
                check_shard(part.folder, shard)
            read_index(part.folder, shard, cache, block[end - shard.samples * BYTES_PER_RECORD : end])

    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        try:
            for _ in pool.map(read, range(0, len(part.shards), OPENING_BATCH)):
                pass  # in the manifest's order, so that of several errors the first is raised
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a server that is away would be waited for by each
            raise
    return index


def check_shard(folder: str, shard: Shard) -> None:
    """Raise ValueError unless the tar of a local set is there and as long as the manifest says."""
    path = f"{folder}/shards/{shard.name}.tar"
    try:
        size = os.stat(path).st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, though manifest.json lists it; copy the data set again") from error
    if size != shard.bytes:
        raise ValueError(f"{path} holds {size} bytes, manifest.json says {shard.bytes}; the copy is cut: repeat it")


def read_index(folder: str, shard: Shard, cache: ShardCache | None, block: memoryview) -> None:
    """Fill `block` with the records of one shard. Raises ValueError when they are not those that were packed."""
    if is_remote(folder):
        assert cache is not None
        url = join_url(folder, "index", f"{shard.name}.idx")
        path = str(cache.fetch(url, sha256=shard.idx_sha256, num_bytes=len(block), suffix=".idx"))
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
