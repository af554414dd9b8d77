"""The `log.profile_steps` switch: a trace of a few steps per rank, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pivot.system.distributed import World

SKIPPED_STEPS = 2  # caches fill and kernels are chosen there


class Tracer:
    """Call `before_step` ahead of each step; it starts, stops and writes FOLDER/rankN.json by itself."""

    def __init__(self, folder: Path, num_steps: int, world: World, say: Callable[[str], None]) -> None:
        self._path = folder / f"rank{world.rank}.json"
        self._num_steps, self._say, self._seen = num_steps, say, 0
        self._on_gpu = world.device.type == "cuda"
        self._profile: profile | None = None

    def before_step(self) -> None:
        if self._num_steps and self._seen == SKIPPED_STEPS:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_gpu else [])
            self._profile = profile(activities=activities, acc_events=True)  # one cycle; else torch warns of several
            self._profile.start()
        if self._seen == SKIPPED_STEPS + self._num_steps:
            self.stop()
        self._seen += 1

    def stop(self) -> None:
        """Write what was traced; nothing where no trace runs. Also for a run that ends before its steps are through."""
        if self._profile is None:
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
        self._say(f"profile    {self._path} (one file a rank; open it in ui.perfetto.dev)")
