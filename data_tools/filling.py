"""The shards that `pack` is filling: one for each shape of sample, since `datasets` opens no shard that mixes them.

Shards are numbered in the order in which they are begun, and so are they listed: a function of the input alone, and the
input's order where all samples have one shape.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.convert import Packed
from data_tools.writer import ShardWriter
from pivot.data.manifest import Shard

MAX_OPEN = 64  # files, and a few MB of index records; a shape too many ends the shard that got no sample for longest


@dataclass
class _Open:
    writer: ShardWriter
    rows: list[int] = field(default_factory=list)  # of the input


class Filling:
    """`finished` shards, and the open ones with the rows that are in them.

    An open shard has nothing that lasts: after a kill its rows are converted again, which `state` remembers.
    """

    def __init__(
        self, out: Path, name: str, samples_per_shard: int, bytes_per_shard: int, finished: list[Shard]
    ) -> None:
        self._out, self._name = out, name
        self._samples_per_shard, self._bytes_per_shard = samples_per_shard, bytes_per_shard
        self._finished = list(finished)
        self._open: OrderedDict[str, _Open] = OrderedDict()  # by shape, the latest to get a sample last

    @property
    def shards(self) -> list[Shard]:
        """Those that are finished, by their number."""
        return sorted(self._finished, key=lambda shard: (len(shard.name), shard.name))

    def state(self) -> list[dict[str, Any]]:
        return [{"shape": shape, "name": one.writer.name, "rows": one.rows} for shape, one in self._open.items()]

    def reopen(self, state: list[dict[str, Any]]) -> None:
        """Begin again what a run that ended early was filling; its rows are to be added again."""
        for entry in state:
            self._open[entry["shape"]] = _Open(ShardWriter(self._out, entry["name"]))

    def holds(self, shape: str) -> bool:
        return shape in self._open

    def make_room(self, packed: Packed) -> bool:
        """Finish the shard that `packed` would not fit into, or one when too many are open; False if none had to be."""
        one = self._open.get(packed.shape)
        if one is None and len(self._open) < MAX_OPEN:
            return False
        if one is not None and not self._is_full(one.writer, packed):
            return False
        self._finish(packed.shape if one is not None else next(iter(self._open)))
        return True

    def add(self, packed: Packed, row: int) -> None:
        if packed.shape not in self._open:
            number = len(self._finished) + len(self._open)
            self._open[packed.shape] = _Open(ShardWriter(self._out, f"{self._name}-{number:06d}"))
        one = self._open[packed.shape]
        one.writer.add(packed)
        one.rows.append(row)
        self._open.move_to_end(packed.shape)

    def finish_all(self) -> None:
        for shape in list(self._open):
            self._finish(shape)

    def abandon(self) -> None:
        for one in self._open.values():
            one.writer.abandon()
        self._open.clear()

    def _finish(self, shape: str) -> None:
        self._finished.append(self._open[shape].writer.close())  # it stays open until this has worked
        del self._open[shape]

    def _is_full(self, writer: ShardWriter, packed: Packed) -> bool:
        too_many = len(writer) >= self._samples_per_shard
        return too_many or writer.num_bytes + packed.num_bytes > self._bytes_per_shard
