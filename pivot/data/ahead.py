"""Fetches the shards that the next steps will read, before they read them; for sets that lie elsewhere."""

from __future__ import annotations

import logging
import threading

import numpy as np

from pivot.data.plan import Plan
from pivot.data.remote import WINDOW_SHARDS
from pivot.data.shards import ShardSet

logger = logging.getLogger(__name__)


class FetchAhead:
    """A thread that fetches the shards of this step and of those behind it, in the order in which they are needed.

    It keeps to two windows' worth of shards. What it fails to fetch, the reader tries again and reports.
    """

    def __init__(self, shards: ShardSet, plan: Plan, first_step: int, max_shards: int = 2 * WINDOW_SHARDS) -> None:
        self._shards, self._plan, self._max_shards = shards, plan, max_shards
        self._step, self._done = first_step, -1
        self._moved = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)
        self._thread.start()

    def move_to(self, step: int) -> None:
        """The trainer has come to `step`."""
        with self._moved:
            self._step = step
            self._moved.notify()

    def stop(self) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify()

    def _run(self) -> None:
        while (step := self._wait()) is not None:
            for shard in self.upcoming(step):
                if self._stopped:
                    return
                try:
                    self._shards.fetch(shard)
                except (OSError, ValueError) as error:
                    logger.warning("fetching ahead: %s", error)
                    break
            self._done = step

    def _wait(self) -> int | None:
        """The step that the trainer has come to, once it is another than that done; None to stop."""
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or self._step > self._done)
            return None if self._stopped else self._step

    def upcoming(self, step: int) -> list[int]:
        """The next shards that are read from `step` on, the first needed first: at most max_shards, and what fits."""
        numbers_ahead: dict[int, None] = {}
        room = self._shards.cache_bytes
        last = step + 2 * self._steps_per_window()
        while step < last and (self._plan.num_steps is None or step < self._plan.num_steps):
            numbers = np.searchsorted(self._shards.first_rows, self._plan.step_ids(step), side="right") - 1
            for number in numbers.tolist():
                if number in numbers_ahead:
                    continue
                size = self._shards.shards[number].bytes
                if len(numbers_ahead) == self._max_shards or (room is not None and size > room):
                    return list(numbers_ahead)
                numbers_ahead[number] = None
                room = None if room is None else room - size
            step += 1
        return list(numbers_ahead)

    def _steps_per_window(self) -> int:
        samples = max(self._shards.shard_sizes) * WINDOW_SHARDS
        return 1 + samples // self._plan.global_batch_size
