"""Time and memory of one process, on the CPU and on a GPU."""

from __future__ import annotations

import os
import threading
import time

import torch


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """The length of each step, in seconds of the clock and of the processors (which other jobs leave alone)."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.start()

    def start(self) -> None:
        synchronise(self._device)
        self._last = time.perf_counter(), time.process_time()

    def tick(self) -> None:
        synchronise(self._device)
        now = time.perf_counter(), time.process_time()
        self.seconds.append(now[0] - self._last[0])
        self.cpu_seconds.append(now[1] - self._last[1])
        self._last = now


class Memory:
    """The most this process held beyond what it held when this was made: after the imports, before any model.

    On a GPU torch's own count; on the CPU the resident set, watched from a thread (the kernel's high-water mark would
    count what importing took for a moment).
    """

    INTERVAL_S = 0.01

    def __init__(self, device: str) -> None:
        self._device = device
        self._start = self._peak = _resident_bytes()
        if device == "cpu":
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        pause = threading.Event()
        while True:
            self._peak = max(self._peak, _resident_bytes())
            pause.wait(self.INTERVAL_S)

    def restart(self) -> None:
        """Forget the peak so far, not the start: what follows is measured alone."""
        self._peak = _resident_bytes()
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return (self._peak - self._start) / 2**30


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
