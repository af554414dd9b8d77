"""Names ranks that hold up the others, from how long each rank worked by itself in the last steps."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from pivot.run.log import RunLog
from pivot.system import distributed

WINDOW_S, WINDOW_STEPS = 30.0, 5  # what is judged at once: at least as long, and as many steps
SHARE = 0.25  # by which a straggler works longer than the median rank
# The share of all time that this must come to. Time is counted from about 300 looks, so one rank's error is 3 % of it.
FLOOR = 0.15


class Stragglers:
    """Sums over a window of steps, the same on every rank. A rank is named once, on the terminal and in the log."""

    def __init__(self, log: RunLog, say: Callable[[str], None]) -> None:
        """Collective: the names of all hosts."""
        self._log, self._say = log, say
        self._hosts = distributed.gather(socket.gethostname())
        self._named: set[int] = set()
        self._since: float | None = None  # the run's first step is not counted: it compiles, and much lies before it

    def _restart(self) -> None:
        self._busy_s, self._num_steps, self._since = [0.0] * len(self._hosts), 0, time.monotonic()

    def add(self, step: int, busy_s: Sequence[float]) -> None:
        """Count a step, with the seconds that each rank worked in it; tell the stragglers of a window that is over."""
        for row in self._find(busy_s):
            self._log.event("straggler", step=step, **row)
            self._say(f"straggler  {_describe(row)}")

    def _find(self, busy_s: Sequence[float]) -> list[dict[str, Any]]:
        if self._since is None:
            self._restart()
            return []
        self._busy_s = [total + seconds for total, seconds in zip(self._busy_s, busy_s, strict=True)]
        self._num_steps += 1
        passed_s = time.monotonic() - self._since
        if passed_s < WINDOW_S or self._num_steps < WINDOW_STEPS:
            return []
        # The lower one of two: of two ranks the slower must not pull up what it is compared to.
        median_s, steps = statistics.median_low(self._busy_s), self._num_steps
        found: list[dict[str, Any]] = [
            {"rank": rank, "host": host, "busy_s": seconds / steps, "median_busy_s": median_s / steps}
            for rank, (host, seconds) in enumerate(zip(self._hosts, self._busy_s, strict=True))
            if rank not in self._named and seconds > (1 + SHARE) * median_s and seconds - median_s > FLOOR * passed_s
        ]
        self._named |= {row["rank"] for row in found}
        self._restart()
        return found


def _describe(row: dict[str, Any]) -> str:
    return (
        f"rank {row['rank']} on {row['host']} works {row['busy_s']:.2f} s a step by itself, the median rank "
        f"{row['median_busy_s']:.2f} s; the others wait for it"
    )
