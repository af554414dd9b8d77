"""Prefix trees as integers: which tokens of a row attend to which, and where its hidden states are read.

Letters used for shapes: T tokens, S segments, C chains, N targets, M queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """Segments whose tokens lie one behind the other and attend causally among themselves.

    The queries are row positions [first_query, end). The keys are the spans in `prefix` (all ancestors of the chain's
    first segment, root first) followed by the chain itself, under a causal mask aligned at the bottom right.
    """

    start: int
    end: int
    prefix: tuple[tuple[int, int], ...]
    first_query: int

    @property
    def num_queries(self) -> int:
        return self.end - self.first_query

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def num_keys(self) -> int:
        return self.num_tokens + sum(end - start for start, end in self.prefix)


@dataclass(frozen=True)
class Layout:
    """The chains of a row as variable-length attention takes them, on one device. C chains with L keys each."""

    cu_queries: Tensor  # int32[C + 1]
    cu_keys: Tensor  # int32[C + 1]
    key_index: Tensor | None  # int64[sum L]: the row positions of all keys; None: the row as it is
    max_queries: int
    max_keys: int

    def move(self, how: Callable[[Tensor], Tensor]) -> Layout:
        index = None if self.key_index is None else how(self.key_index)
        return dataclasses.replace(self, cu_queries=how(self.cu_queries), cu_keys=how(self.cu_keys), key_index=index)


@dataclass(frozen=True)
class Segments:
    """A forest of prefix trees over the row, kept on the host so that attention needs no synchronisation.

    `start`, `end`: int32[S], the half-open span of each segment; `parent`: int32[S], -1 for a root.
    A token attends causally within its segment and fully to all ancestors of it. Segments are in depth-first order
    and tile the row: a first child lies right behind its parent. Raises ValueError when that does not hold.
    """

    start: np.ndarray
    end: np.ndarray
    parent: np.ndarray
    # int32[C]: where each chain's queries begin; None: at its start. Its keys and values are those of all its tokens.
    first_query: np.ndarray | None = None
    # For attention on the batch's device: made here and moved with the batch, so that attention waits for no copy.
    layout: Layout = field(default=None, compare=False, repr=False)  # type: ignore[assignment]  # see __post_init__
    # Per-forward scratch of the attention back ends (masks), never part of the value.
    cache: dict = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("start", "end", "parent"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int32))
        starts, ends, parents = self.start.tolist(), self.end.tolist(), self.parent.tolist()
        path: list[int] = []  # the open segments from the root down to the previous one
        for i, (start, end, parent) in enumerate(zip(starts, ends, parents, strict=True)):
            expected = ends[i - 1] if i else 0
            if start != expected or end <= start:
                raise ValueError(f"segment {i} is [{start}, {end}); expected a non-empty one that starts at {expected}")
            while path and path[-1] != parent:
                path.pop()
            if parent != -1 and not path:
                raise ValueError(f"segment {i} names parent {parent}, which is not on the path to it (depth-first)")
            path.append(i)
        if self.layout is None:
            object.__setattr__(self, "layout", self._lay_out())

    def __len__(self) -> int:
        return len(self.start)

    @property
    def num_tokens(self) -> int:
        return int(self.end[-1]) if len(self) else 0

    @cached_property
    def num_queries(self) -> int:
        return sum(chain.num_queries for chain in self.chains)

    def ancestors(self, segment: int) -> list[int]:
        """The segments that `segment` attends to in full, root first."""
        path = []
        parent = int(self.parent[segment])
        while parent != -1:
            path.append(parent)
            parent = int(self.parent[parent])
        return path[::-1]

    @cached_property
    def chains(self) -> tuple[Chain, ...]:
        """The row cut into chains: a root or a later child opens one, a first child continues its parent's."""
        heads = [i for i in range(len(self)) if self.parent[i] == -1 or self.parent[i] != i - 1]
        asked = self.start[heads] if self.first_query is None else self.first_query
        chains = []
        for head, following, first in zip(heads, [*heads[1:], len(self)], asked.tolist(), strict=True):
            prefix = tuple((int(self.start[a]), int(self.end[a])) for a in self.ancestors(head))
            chains.append(Chain(int(self.start[head]), int(self.end[following - 1]), prefix, first))
        return tuple(chains)

    def _lay_out(self) -> Layout:
        spans = [[*chain.prefix, (chain.start, chain.end)] for chain in self.chains]
        queries = [chain.num_queries for chain in self.chains]
        keys = [chain.num_keys for chain in self.chains]
        index = np.concatenate([np.arange(start, end) for chain in spans for start, end in chain] or [np.arange(0)])
        return Layout(
            cu_queries=torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32),
            cu_keys=torch.tensor([0, *np.cumsum(keys)], dtype=torch.int32),
            key_index=torch.from_numpy(index) if len(index) != self.num_tokens else None,
            max_queries=max(queries, default=0),
            max_keys=max(keys, default=0),
        )

    def move(self, how: Callable[[Tensor], Tensor]) -> Segments:
        """The same segments, `how` applied to their layout's tensors."""
        return dataclasses.replace(self, layout=self.layout.move(how))

    def asking_from(self, first_query: np.ndarray) -> Segments:
        """The same segments with fewer queries: of each chain those from first_query int32[C] on."""
        return Segments(self.start, self.end, self.parent, first_query)

    def position_ids(self) -> np.ndarray:
        """int64[T]: a root counts from 0, a child goes on where its parent ended."""
        positions = np.empty(self.num_tokens, dtype=np.int64)
        for start, end, parent in zip(self.start, self.end, self.parent, strict=True):
            first = 0 if parent == -1 else positions[self.end[parent] - 1] + 1
            positions[start:end] = np.arange(first, first + end - start)
        return positions


@dataclass(frozen=True)
class Reading:
    """Where hidden states are read, for what need run at no other token: M queries, M >= N but for a shared prompt.

    A chain asks from its first target to its end, so that its queries stay one span; without a target with its last
    token, since attention kernels differ in what they make of no query at all.
    """

    positions: Tensor  # int64[N]: the targets' positions in the row
    queries: Tensor  # int64[M]: the positions that ask
    targets: Tensor  # int64[N]: which of the queries is each target's
    segments: Segments  # the row's, asking from there on

    @classmethod
    def at(cls, positions: Tensor, segments: Segments) -> Reading:
        """The reading of target positions int64[N] on the host."""
        chains, wanted = segments.chains, positions.numpy()
        owner = np.searchsorted([chain.start for chain in chains], wanted, side="right") - 1
        ends = np.array([chain.end for chain in chains], dtype=np.int64)
        first = ends - 1
        np.minimum.at(first, owner, wanted)
        before = np.cumsum(ends - first) - (ends - first)  # queries of the chains in front
        return cls(
            positions=positions,
            queries=torch.from_numpy(np.concatenate([np.arange(*span) for span in zip(first, ends, strict=True)])),
            targets=torch.from_numpy(before[owner] + wanted - first[owner]),
            segments=segments.asking_from(first),
        )

    def move(self, how: Callable[[Tensor], Tensor]) -> Reading:
        return Reading(how(self.positions), how(self.queries), how(self.targets), self.segments.move(how))
