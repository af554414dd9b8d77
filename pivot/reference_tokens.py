"""The reference's log-prob of each completion token, for who asks for it: two flat arrays a shard.

`SHARD.SHA256.tokens.npy` float32[all tokens of the shard's completions] and `SHARD.SHA256.offsets.npy`
int64[2 * samples + 1]: chosen of sample i is [offsets[2 i], offsets[2 i + 1]), rejected the span behind it, both empty
where the sample was not scored. The offsets are written last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pivot.batch import CHOSEN, DUMMY_SAMPLE, REJECTED, PackedBatch
from pivot.data.shards import ShardSet
from pivot.system.files import write_array

PLACES = {CHOSEN: 0, REJECTED: 1}


def split_tokens(batch: PackedBatch) -> Iterator[tuple[int, str, slice]]:
    """(row, role, its span of the batch's targets) of every completion of a batch on the host that is really scored."""
    bounds = np.searchsorted(batch.target_completion.numpy(), np.arange(batch.num_completions + 1))
    real = (batch.sample_index.numpy() != DUMMY_SAMPLE) & (batch.pair_weight().numpy() > 0)
    for pair in np.flatnonzero(real):
        for role in PLACES:
            completion = int(batch.by_role[role][pair])
            yield int(batch.sample_index[pair]), role, slice(int(bounds[completion]), int(bounds[completion + 1]))


class TokenSideCars:
    """One set's files; what was scored and not written yet is held on top of them."""

    def __init__(self, folder: Path, shards: ShardSet) -> None:
        self._folder, self._shards = folder, shards
        self._pending: dict[int, dict[str, np.ndarray]] = {}
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # shard -> (offsets, values)

    def has(self, rows: np.ndarray) -> np.ndarray:
        """bool[len(rows)]"""
        return np.array([len(self.read(row, CHOSEN)) > 0 for row in rows.tolist()], dtype=bool)

    def keep(self, tokens: Iterable[tuple[int, str, np.ndarray]]) -> None:
        for row, role, values in tokens:
            self._pending.setdefault(row, {})[role] = values

    def read(self, row: int, role: str) -> np.ndarray:
        """float32[tokens], empty where there are none."""
        return self._pending[row][role] if row in self._pending else self._stored(row, role)

    def write(self, number: int) -> None:
        """Shard `number` with all that is known of it."""
        first = int(self._shards.first_rows[number])
        rows = range(first, first + self._shards.shards[number].samples)
        parts = [np.asarray(self.read(row, role), dtype=np.float32) for row in rows for role in PLACES]
        tokens, offsets = self._paths(number)
        offsets.unlink(missing_ok=True)  # old offsets must never meet new tokens
        write_array(tokens, np.concatenate(parts))
        write_array(offsets, np.cumsum([0, *map(len, parts)], dtype=np.int64))
        self._open.pop(number, None)
        for row in rows:
            self._pending.pop(row, None)

    def _paths(self, number: int) -> tuple[Path, Path]:
        shard = self._shards.shards[number]
        stem = f"{shard.name}.{shard.sha256[:16]}"
        return self._folder / f"{stem}.tokens.npy", self._folder / f"{stem}.offsets.npy"

    def _stored(self, row: int, role: str) -> np.ndarray:
        number, ordinal = self._shards.locate(row)
        if number not in self._open:
            tokens, offsets = self._paths(number)
            if not offsets.is_file():
                return np.zeros(0, dtype=np.float32)
            self._open[number] = (np.load(offsets, allow_pickle=False), np.load(tokens, mmap_mode="r"))
        bounds, values = self._open[number]
        place = 2 * ordinal + PLACES[role]
        return values[bounds[place] : bounds[place + 1]]
