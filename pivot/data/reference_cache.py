"""Reference log-probs: computed once, kept in side-cars beside the shards, never a resident reference model.

`CACHE_DIR/ref/FINGERPRINT/SHARD.SHA256.npy` holds a record per sample, NaN where none was computed; for KTO also the
log-prob of the answer that the sample borrows. The fingerprint covers weights, processor, image policy, precision,
attention and LOGPROB_VERSION, so one changed byte is a miss, and a set's references are shared by every run that starts
from the same weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pivot.batch import CHOSEN, DUMMY_SAMPLE, MISMATCHED, REFERENCE, REJECTED, PackedBatch
from pivot.data.borrowed import BORROWED_VERSION
from pivot.data.loader import Loader
from pivot.data.plan import Plan
from pivot.data.shards import ShardSet
from pivot.system import distributed
from pivot.system.distributed import World
from pivot.system.files import write_array

LOGPROB_VERSION = 1  # raise it whenever the same weights and tokens would give other log-probs

PAIR = (CHOSEN, REJECTED)
Score = Callable[[PackedBatch], Tensor]  # a batch on the host -> float32[N], wherever that is computed


def reference_fingerprint(*, weights: str, processor: str, facts: dict[str, Any]) -> str:
    """What the log-probs depend on besides the shard, which names itself by its own hash."""
    parts = {"weights": weights, "processor": processor, "facts": facts, "logprob_version": LOGPROB_VERSION}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def record_of(roles: tuple[str, ...]) -> np.dtype:
    """The record of a sample with these roles: sums of log-probs, then numbers of tokens."""
    return np.dtype([*((f"{role}_logp", "<f4") for role in roles), *((f"{role}_tokens", "<u4") for role in roles)])


class ReferenceCache:
    """The reference log-probs of one data set under one reference model.

    Both answers of a pair are kept whatever is trained, so that runs can share them. With `borrowed` also that of the
    answer to another prompt, in a folder of its own.
    """

    def __init__(self, cache_dir: str | Path, fingerprint: str, shards: ShardSet, *, borrowed: bool = False) -> None:
        self._roles = (*PAIR, MISMATCHED) if borrowed else PAIR
        self._record = record_of(self._roles)
        name = f"{fingerprint[:16]}-borrowed{BORROWED_VERSION}" if borrowed else fingerprint[:16]
        self.folder = Path(cache_dir) / "ref" / name
        self._shards = shards
        parts = [self._read(number) for number in range(len(shards.shards))]
        self._records = np.concatenate(parts)

    def _path(self, number: int) -> Path:
        shard = self._shards.shards[number]
        return self.folder / f"{shard.name}.{shard.sha256[:16]}.npy"

    def _read(self, number: int) -> np.ndarray:
        path, samples = self._path(number), self._shards.shards[number].samples
        try:  # without looking first, as for the token counts
            records = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            empty = np.zeros(samples, dtype=self._record)
            for role in self._roles:
                empty[f"{role}_logp"] = np.nan
            return empty
        if records.dtype != self._record or len(records) != samples:
            raise ValueError(f"{path} holds {records.shape} of {records.dtype}, expected {samples} records; delete it")
        return records

    def first_missing(self, plan: Plan) -> int | None:
        """The first step of `plan` (one with an end) that holds a sample without a value, or None."""
        for step in range(plan.num_steps or 0):
            if self._missing(plan.step_ids(step)).any():
                return step
        return None

    def _missing(self, rows: np.ndarray) -> np.ndarray:
        """bool[len(rows)]: not scored yet. A masked sample, at infinity, is done with."""
        return np.isnan(self._records["chosen_logp"][rows])

    def add_to(self, batches: Iterable[PackedBatch]) -> Iterator[PackedBatch]:
        """The batches, on the host, with their completions' log-probs under the reference."""
        for batch in batches:
            batch.completion_values[REFERENCE] = self.lookup(batch)
            yield batch

    def lookup(self, batch: PackedBatch) -> Tensor:
        """float32[C] for a batch on the host, 0 where the weight is 0.

        Raises ValueError when a value is missing or not of these tokens.
        """
        logps = torch.zeros(batch.num_completions)
        for role in self._roles:
            index = batch.completions_of[role]
            index = index[batch.completion_weight[index] > 0]
            rows = batch.completion_rows[index].numpy()
            records = self._records[rows]
            values = torch.from_numpy(records[f"{role}_logp"].copy())
            tokens = torch.from_numpy(records[f"{role}_tokens"].astype(np.int64))
            wrong = ~torch.isfinite(values) | (tokens != batch.completion_tokens[index])
            if wrong.any():
                row = int(rows[int(wrong.nonzero()[0])])
                raise ValueError(
                    f"{self._shards.describe(row)}: {self.folder} holds no reference log-prob of this {role} "
                    "completion (another template, or an unfinished cache); delete the folder, it is made anew"
                )
            logps[index] = values
        return logps

    def fill(
        self, loader: Loader, score: Score, world: World, say: Callable[[str], None], *, first_step: int = 0
    ) -> None:
        """Score every pair that `loader` gives from `first_step` on, and write each shard once it is whole. Collective.

        A run that was cut goes on with the first shard that is missing. A plan that visits a part of the set leaves
        shards with values for that part.
        """
        try:
            self._fill(loader, score, world, say, first_step)
        finally:  # also when the ranks are asked to stop: what was scored stays
            if world.is_main:
                self._write_unfinished(loader.plan)
        torch.distributed.barrier()

    def _fill(self, loader: Loader, score: Score, world: World, say: Callable[[str], None], first_step: int) -> None:
        done, total = first_step * loader.plan.global_batch_size, loader.plan.limit or loader.plan.num_pairs
        for step_plan, micro_batches in distributed.until_asked(loader):
            own = [self._score(batch, score) for batch in micro_batches]
            for scored in distributed.gather(np.concatenate(own)):
                self._records[scored["row"]] = scored["record"]
            done += len(step_plan.ids)
            if world.is_main:
                self._write_finished(step_plan.ids, loader.plan)
            say(f"reference log-probs: {done} of {total} pairs")

    @torch.no_grad()
    def _score(self, batch: PackedBatch, score: Score) -> np.ndarray:
        """The row and the record of each sample, without dummies; 0 for an answer that it has not."""
        logps = batch.completion_logps(score(batch).float().cpu()).numpy()
        rows = batch.sample_index.numpy()
        scored = np.zeros(len(rows), dtype=[("row", "<i8"), ("record", self._record)])
        scored["row"] = rows
        for role in self._roles:
            index = batch.completions_of[role].numpy()
            group, weight = batch.group.numpy()[index], batch.completion_weight.numpy()[index]
            # A masked sample is done with, at infinity: NaN would keep its shard unfinished for ever.
            scored["record"][f"{role}_logp"][group] = np.where(weight > 0, logps[index], np.inf)
            scored["record"][f"{role}_tokens"][group] = batch.completion_tokens.numpy()[index]
        return scored[rows != DUMMY_SAMPLE]

    def _write_finished(self, rows: np.ndarray, plan: Plan) -> None:
        for number in sorted({self._shards.locate(int(row))[0] for row in rows}):
            span = self._span(number)
            if not self._missing(np.arange(span.start, span.stop))[plan.kept[span]].any():
                self._write(number)

    def _write_unfinished(self, plan: Plan) -> None:
        for number in range(len(self._shards.shards)):
            span = self._span(number)
            empty = np.isnan(self._records["chosen_logp"][span])
            if not empty.all() and empty[plan.kept[span]].any():
                self._write(number)

    def _write(self, number: int) -> None:
        write_array(self._path(number), self._records[self._span(number)])

    def _span(self, number: int) -> slice:
        first = int(self._shards.first_rows[number])
        return slice(first, first + self._shards.shards[number].samples)
