"""The micro-batches of one rank, step by step, read ahead by worker processes that change nothing but the speed.

A sample whose bytes are damaged keeps its slot with weight 0 and is written to `bad-samples-rankN.jsonl`; order, step
count and modules that run stay the same. Too many of them stop the run.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from pivot.batch import CHOSEN, DUMMY_SAMPLE, MISMATCHED, REJECTED, PackedBatch
from pivot.data.ahead import FetchAhead
from pivot.data.collate import Completion, Example, collate, masked_example
from pivot.data.images import ImageError, load_image
from pivot.data.plan import Plan, StepPlan
from pivot.data.samples import completions_of
from pivot.data.shards import DamagedSample, ShardSet
from pivot.system.preemption import SIGNALS
from pivot.system.sentences import in_our_words
from pivot.system.workers import be_worker_of, ending

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pivot.processor import EncodedPair, Processor

logger = logging.getLogger(__name__)

# pack decodes every image, so damage at training time is a fault of disk or network: rare, or to be mended first.
MAX_BAD_RATIO = 0.001
MIN_BAD = 5  # so that a short run survives a handful
MAX_BAD_IN_A_ROW = 20


PREFETCH = 4  # micro-batches that each worker reads ahead; some 4 MB each


class Task(NamedTuple):
    """What one micro-batch is made of; it travels to a worker."""

    step: int
    rows: list[int]


class Made(NamedTuple):
    """A micro-batch and the record of each sample that had to be masked; it travels back."""

    batch: PackedBatch
    rows: list[int]
    bad: dict[int, dict[str, Any]]  # place in `rows` -> record


class MicroBatches(Dataset):
    """Reads, decodes, encodes and packs the rows of a task, in whichever process it runs."""

    def __init__(self, shards: ShardSet, plan: Plan, processor: Processor) -> None:
        self._shards, self._processor = shards, processor
        self._lengths, self._roles, self._image_trees = plan.lengths, plan.roles, plan.settings.image_trees
        self._own_roles = tuple(role for role in self._roles if role != MISMATCHED)

    def __getitem__(self, task: Task) -> Made | Exception:
        """The micro-batch, or the error that ends the run: raised here it would be buried in torch's report of it."""
        try:
            return self._make(task)
        except Exception as error:
            if in_our_words(error):
                return error
            raise

    def _make(self, task: Task) -> Made:
        examples, bad = [], {}
        decoded: dict[str, Tensor] = {}  # of this micro-batch: pairs about one image share its pixels
        processor = self._processor
        for place, row in enumerate(task.rows):
            try:
                examples.append(self._load(row, decoded))
            except (DamagedSample, ImageError) as error:
                examples.append(masked_example(row, self._roles, processor.image_token_id))
                bad[place] = self._shards.address(row) | {"step": task.step, "reason": str(error)}
        if not examples:  # a rank with nothing to do runs along with the others
            examples.append(masked_example(DUMMY_SAMPLE, self._roles, processor.image_token_id))
        batch = collate(examples, processor.geometry, processor.image_token_id, image_trees=self._image_trees)
        return Made(batch, task.rows, bad)

    def _load(self, row: int, decoded: dict[str, Tensor]) -> Example:
        try:
            sample, files = self._shards.read(row)
        except DamagedSample:
            sample, files = self._shards.read(row)  # a network file system may do better the second time
        encoded = self._processor.encode(sample["prompt"], completions_of(sample, self._own_roles))
        self._check_lengths(row, encoded, len(files))
        names = [image["sha256"] for image in sample["images"]]
        for name, data in zip(names, files, strict=True):
            if name not in decoded:
                decoded[name] = load_image(data, self._processor.geometry)
        completions = [Completion(role, ids) for role, ids in encoded.completions.items()]
        if MISMATCHED in self._roles:
            completions.append(Completion(MISMATCHED, self._borrow(row)))
        return Example(row, encoded.prompt, completions, [decoded[name] for name in names], names)

    def _borrow(self, row: int) -> np.ndarray:
        """The tokens of the answer to another prompt that the row borrows. Raises DamagedSample."""
        assert self._lengths.borrowed is not None
        lender, is_rejected, tokens = (column[row] for column in self._lengths.borrowed)
        role = REJECTED if is_rejected else CHOSEN
        try:
            sample = self._shards.read_text(int(lender))
        except ValueError:  # bytes that are no JSON: the whole sample has a checksum, and a second try
            sample, _ = self._shards.read(int(lender))
        encoded = self._processor.encode(sample["prompt"], completions_of(sample, (role,)))
        return encoded.completions[role][: int(tokens)]

    def _check_lengths(self, row: int, encoded: EncodedPair, num_images: int) -> None:
        encoded_lengths = {"prompt": len(encoded.prompt)}
        encoded_lengths |= {role: len(encoded.completions.get(role, ())) for role in self._own_roles}
        expected = {name: int(getattr(self._lengths, name)[row]) for name in encoded_lengths}
        if encoded_lengths != expected:
            raise ValueError(
                f"{self._shards.describe(row)}: {encoded_lengths} tokens, but the plan counted {expected}; the token "
                "counts in data.cache_dir are not of this processor: delete its lengths folder"
            )
        if encoded.num_images != num_images:
            raise ValueError(
                f"{self._shards.describe(row)}: the prompt has {encoded.num_images} image part(s), "
                f"the sample {num_images} image(s)"
            )


class Loader:
    """Iterates the steps of one rank from `first_step`, to the plan's end or without end.

        for step_plan, micro_batches in loader:
            for batch in micro_batches: ...

    `data_wait_s` is the time spent waiting for batches; `num_masked` counts the samples that this rank
    masked since it started. Raises RuntimeError when too many are damaged or none comes, and ValueError when a sample
    is not what the plan counted.
    """

    def __init__(
        self,
        shards: ShardSet,
        plan: Plan,
        processor: Processor,
        *,
        rank: int = 0,
        first_step: int = 0,
        workers: int = 0,
        bad_samples_dir: str | Path | None = None,  # None: they are logged only
        pin_memory: bool = False,  # batches in page-locked memory, for a GPU
        timeout_s: float = 0.0,  # the longest that workers may take for a batch; 0: no limit
    ) -> None:
        self._source = MicroBatches(shards, plan, processor)
        self.plan, self._rank, self._workers, self._pin_memory = plan, rank, workers, pin_memory
        self._shards, self._timeout_s = shards, timeout_s
        self._bad_samples = Path(bad_samples_dir) / f"bad-samples-rank{rank}.jsonl" if bad_samples_dir else None
        self._steps = first_step  # consumed, not read ahead
        self._made: Iterator[Made | Exception] = iter(())
        self._planned: deque[StepPlan] = deque()  # of the steps whose tasks were handed out
        self._num_read = self._bad_in_a_row = 0
        self.num_masked = 0
        self.data_wait_s = 0.0

    def __iter__(self) -> Iterator[tuple[StepPlan, Iterator[PackedBatch]]]:
        self._planned.clear()
        others = active_children()
        self._made = iter(self._open_stream())  # forks the workers; threads start after that
        workers = [process for process in active_children() if process not in others]
        ahead = FetchAhead(self._shards, self.plan, self._steps) if self._shards.is_remote else None
        try:
            while self.plan.num_steps is None or self._steps < self.plan.num_steps:
                if ahead is not None:
                    ahead.move_to(self._steps)
                first = self._next()  # draws the step's tasks, and so its plan
                step_plan = self._planned.popleft()
                micro_batches = self._step(step_plan, first)
                yield step_plan, micro_batches
                for _ in micro_batches:
                    pass  # what the caller left unread still belongs to this step
        finally:
            if ahead is not None:
                ahead.stop()
            with ending(workers):
                self._made = iter(())  # the last reference, so torch tells the workers to end and waits for each

    def _step(self, step_plan: StepPlan, first: Made) -> Iterator[PackedBatch]:
        self._count(first)
        yield first.batch
        for _ in range(step_plan.num_micro_batches - 1):
            following = self._next()
            self._count(following)
            yield following.batch
        self._steps += 1

    def _next(self) -> Made:
        start = time.perf_counter()
        try:
            item = next(self._made)
        except RuntimeError as error:
            if self._timeout_s and time.perf_counter() - start >= self._timeout_s:
                raise RuntimeError(
                    f"rank {self._rank} got no batch within {self._timeout_s:g} s (train.timeout_s): its workers "
                    "wait for data; see whether the file system or the server of data.train answers, then resume"
                ) from error
            raise
        if isinstance(item, Exception):
            raise item
        self.data_wait_s += time.perf_counter() - start
        return item

    def _tasks(self) -> Iterator[Task]:
        step = self._steps
        while self.plan.num_steps is None or step < self.plan.num_steps:
            step_plan = self.plan.step(step)
            self._planned.append(step_plan)
            for rows in step_plan.micro_batches[self._rank]:
                yield Task(step, rows)
            step += 1

    def _open_stream(self) -> DataLoader:
        if self._workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
        return DataLoader(
            self._source,
            sampler=_Once(self._tasks()),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=PREFETCH if self._workers else None,
            pin_memory=self._pin_memory,
            timeout=self._timeout_s if self._workers else 0,
            worker_init_fn=partial(_start_worker, os.getpid()) if self._workers else None,
            generator=torch.Generator(),  # it would draw from the trainer's
        )

    def _count(self, made: Made) -> None:
        for place in range(len(made.rows)):
            self._num_read += 1
            self._bad_in_a_row = self._bad_in_a_row + 1 if place in made.bad else 0
            if place in made.bad:
                self._report(made.bad[place])

    def _report(self, record: dict[str, Any]) -> None:
        self.num_masked += 1
        logger.warning("masked a damaged sample at step %d: %s", record["step"], record["reason"])
        if self._bad_samples is not None:
            self._bad_samples.parent.mkdir(parents=True, exist_ok=True)
            with self._bad_samples.open("a") as file:
                file.write(json.dumps(record) + "\n")
        allowed = max(MIN_BAD, int(MAX_BAD_RATIO * self._num_read))
        if self.num_masked > allowed or self._bad_in_a_row > MAX_BAD_IN_A_ROW:
            raise RuntimeError(
                f"{self.num_masked} of {self._num_read} samples read by rank {self._rank} are damaged "
                f"({self._bad_in_a_row} in a row; at most {allowed} and {MAX_BAD_IN_A_ROW} are let pass); the last: "
                f"{record['reason']}; check the disk with python -m data_tools validate, then resume"
            )


class _Once:
    """An iterator dressed as the sampler that DataLoader asks for."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[Task]:
        return self._tasks


def _start_worker(trainer: int, worker: int) -> None:
    """A cluster signals every process of a job: the trainer decides what follows, its workers keep reading."""
    be_worker_of(trainer, ignore=SIGNALS)
