"""Token counts of every sample: a side-car, because they depend on the processor and the shards do not.

One file per shard, `CACHE_DIR/lengths/PROCESSOR/SHARD.SHA256.npy`, written atomically and by rank 0 only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pivot.batch import CHOSEN, REJECTED
from pivot.data.manifest import Shard
from pivot.data.order import mix64
from pivot.data.samples import all_completions
from pivot.data.shards import ShardSet
from pivot.processor.conversation import ChangedAnswer
from pivot.system import preemption, watchdog
from pivot.system.files import write_array
from pivot.system.workers import worker_pool

if TYPE_CHECKING:
    from pivot.processor import Processor

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks whether to stop, while workers count
BLOCK_ROWS = 500  # between two reports of progress
LENGTH_RECORD = np.dtype(
    [
        ("prompt", "<u4"),  # all tokens of the prompt, image tokens among them; 0 where the template changes an answer
        ("chosen", "<u4"),  # 0 where the sample has none
        ("rejected", "<u4"),  # likewise
        ("image", "<u4"),  # image tokens of the prompt
        ("same", "<u4"),  # 1 where chosen and rejected are the same tokens
        ("image_prefix", "<u4"),  # tokens of the prompt up to its last image token: what pairs about one image share
        ("image_prefix_hash", "<u8"),  # of those tokens and of the images; 0 without an image
    ]
)
LENGTHS_VERSION = 2  # part of the side-cars' folder: raise it when LENGTH_RECORD changes


class Borrowed(NamedTuple):
    """Of each row the answer to another's prompt that KTO scores beside its own; see borrowed.py."""

    lender: np.ndarray  # int64[rows]: the row whose answer it is
    is_rejected: np.ndarray  # bool[rows]: of its lender the rejected one
    tokens: np.ndarray  # int64[rows]: how many of its first tokens


@dataclass(frozen=True)
class Lengths:
    """int64[rows] each, as in LENGTH_RECORD; `borrowed` where the objective needs it."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    image: np.ndarray
    same: np.ndarray
    image_prefix: np.ndarray
    image_prefix_hash: np.ndarray
    borrowed: Borrowed | None = None

    @classmethod
    def from_records(cls, records: np.ndarray) -> Lengths:
        columns: dict[str, Any] = {name: records[name].astype(np.int64) for name in LENGTH_RECORD.names or ()}
        return cls(**columns)

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def mismatched(self) -> np.ndarray:
        """int64[rows]: tokens of the borrowed answers."""
        assert self.borrowed is not None, "the plan of an objective that borrows answers needs borrowed.borrow"
        return self.borrowed.tokens

    @property
    def fingerprint(self) -> str:
        """Of what every plan reads; the image prefixes follow from the data set and the processor."""
        columns = (self.prompt, self.chosen, self.rejected, self.image, self.same)
        return hashlib.sha256(b"".join(column.astype("<i8").tobytes() for column in columns)).hexdigest()

    def image_groups(self) -> np.ndarray:
        """int64[rows], equal where prompts begin with the same tokens and images; a row without an image is alone."""
        keys = self.image_prefix_hash.astype(np.uint64)
        alone = np.flatnonzero(keys == 0)
        keys[alone] = mix64(alone.astype(np.uint64))
        return np.unique(keys, return_inverse=True)[1].astype(np.int64)

    def completion_tokens(self, roles: tuple[str, ...]) -> np.ndarray:
        """int64[rows]: the tokens to score, summed over `roles`."""
        return sum((getattr(self, role) for role in roles), np.zeros(len(self), dtype=np.int64))


def build_lengths(
    shards: ShardSet,
    processor: Processor,
    cache_dir: str | Path,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 0,
) -> int:
    """Write the side-cars that are missing and return how many samples that took; `progress` gets (done, all).

    `workers` processes share the shards; with 0 all is done in this one. Counts that were uploaded with a remote set
    are taken from there: to count, every shard must be fetched.
    """
    missing = missing_lengths(shards, processor, cache_dir)
    missing = missing[_fetch_lengths(shards, processor, cache_dir, missing) :]
    total = sum(shards.shards[i].samples for i in missing)
    done = reported = 0
    with _counting(shards, processor, workers if len(missing) > 1 else 0) as count:
        for i, blocks in count(missing):
            parts = []
            for block in blocks:
                preemption.check()
                watchdog.move()
                parts.append(block)
                done += len(block)
                if progress is not None and (done - reported >= BLOCK_ROWS or done == total):
                    reported = done
                    progress(done, total)
            write_array(_path(cache_dir, processor, shards.shards[i]), np.concatenate(parts))
    return total


def missing_lengths(shards: ShardSet, processor: Processor, cache_dir: str | Path) -> list[int]:
    """The numbers of the shards whose tokens were not counted yet."""
    return [i for i, shard in enumerate(shards.shards) if not _path(cache_dir, processor, shard).is_file()]


def _fetch_lengths(shards: ShardSet, processor: Processor, cache_dir: str | Path, numbers: list[int]) -> int:
    """How many of the shards, from the first on, had their counts beside them; those were written to `cache_dir`."""
    for done, number in enumerate(numbers):
        preemption.check()
        watchdog.move()
        path = _path(cache_dir, processor, shards.shards[number])
        data = shards.read_beside(number, "lengths", path.parent.name, path.name)
        if data is None:
            return done
        records = _parse_records(data, shards.shards[number].samples)
        if records is None:
            logger.warning("lengths/%s/%s beside the set holds no token counts of it; counting", *path.parts[-2:])
            return done
        write_array(path, records)
    return len(numbers)


def _parse_records(data: bytes, samples: int) -> np.ndarray | None:
    """LENGTH_RECORD[samples] of a side-car that somebody uploaded; None where it holds anything else."""
    try:
        records = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, MemoryError):  # MemoryError: a header that tells of more than the file has
        return None
    return records if records.dtype == LENGTH_RECORD and records.shape == (samples,) else None


CountShards = Callable[[list[int]], Iterator[tuple[int, Iterable[np.ndarray]]]]


@contextlib.contextmanager
def _counting(shards: ShardSet, processor: Processor, workers: int) -> Iterator[CountShards]:
    """A function from shard numbers to (number, blocks of LENGTH_RECORD), in their order."""
    if not workers:
        yield lambda numbers: ((i, _count_blocks(shards, processor, i)) for i in numbers)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    with worker_pool(workers, _start_worker, shards, processor) as pool:
        yield lambda numbers: zip(numbers, map(_wait, [pool.submit(_count_shard, n) for n in numbers]), strict=True)


def _wait(counted: Future[list[np.ndarray]]) -> list[np.ndarray]:
    """What a worker counts in a shard; Preempted as soon as this process is asked to stop."""
    while not counted.done():
        preemption.check()
        wait([counted], LOOK_S)
    return counted.result()


_worker_state: tuple[ShardSet, Processor] | None = None  # of a worker process: what would be costly to send each time


def _start_worker(shards: ShardSet, processor: Processor) -> None:
    global _worker_state
    _worker_state = shards, processor


def _count_shard(number: int) -> list[np.ndarray]:
    assert _worker_state is not None
    return list(_count_blocks(*_worker_state, number))


def _count_blocks(shards: ShardSet, processor: Processor, number: int) -> Iterator[np.ndarray]:
    first, last = int(shards.first_rows[number]), int(shards.first_rows[number + 1])
    for start in range(first, last, BLOCK_ROWS):
        rows = range(start, min(start + BLOCK_ROWS, last))
        yield np.array([count_tokens(shards, row, processor) for row in rows], dtype=LENGTH_RECORD)


def load_lengths(shards: ShardSet, processor: Processor, cache_dir: str | Path) -> Lengths:
    """The side-cars of all shards. Raises ValueError when one is missing or does not fit its shard."""
    parts = []
    for shard in shards.shards:
        path = _path(cache_dir, processor, shard)
        try:  # without looking first: every rank reads every file, and looking asks the file server once more
            records = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            told = f"{path} is missing: the token counts of {shard.name} were not built (rank 0 builds them)"
            raise ValueError(told) from error
        if records.dtype != LENGTH_RECORD or len(records) != shard.samples:
            raise ValueError(f"{path} holds {records.shape} of {records.dtype}, not one record per sample; delete it")
        parts.append(records)
    return Lengths.from_records(np.concatenate(parts))


def count_tokens(shards: ShardSet, row: int, processor: Processor) -> tuple[int, ...]:
    """One LENGTH_RECORD, zeros where the template changes an answer.

    Raises ValueError, naming the sample, when it cannot be encoded.
    """
    sample = shards.read_text(row)
    try:
        encoded = processor.encode(sample["prompt"], all_completions(sample))
    except ChangedAnswer:
        return (0,) * len(LENGTH_RECORD.names or ())
    except ValueError as error:
        raise ValueError(f"{shards.describe(row)}: {error}") from error
    none = np.zeros(0, dtype=np.int64)
    chosen, rejected = encoded.completions.get(CHOSEN, none), encoded.completions.get(REJECTED, none)
    image_tokens = encoded.num_images * processor.geometry.num_tokens
    same = int(np.array_equal(chosen, rejected))
    prefix = image_prefix(encoded.prompt, processor.image_token_id)
    prefix_hash = _hash_prefix(encoded.prompt[:prefix], [image["sha256"] for image in sample["images"]])
    return len(encoded.prompt), len(chosen), len(rejected), image_tokens, same, prefix, prefix_hash


def image_prefix(prompt: np.ndarray, image_token_id: int) -> int:
    """How many tokens the prompt has up to its last image token; 0 without one."""
    places = np.flatnonzero(prompt == image_token_id)
    return int(places[-1]) + 1 if len(places) else 0


def _hash_prefix(tokens: np.ndarray, images: list[str]) -> int:
    if not len(tokens):
        return 0
    content = tokens.astype("<i8").tobytes() + "".join(images).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") or 1


def _path(cache_dir: str | Path, processor: Processor, shard: Shard) -> Path:
    # The shard's own hash in the name: two sets with equal names may share a cache_dir.
    folder = f"{processor.fingerprint[:16]}-{LENGTHS_VERSION}"
    return Path(cache_dir) / "lengths" / folder / f"{shard.name}.{shard.sha256[:16]}.npy"
