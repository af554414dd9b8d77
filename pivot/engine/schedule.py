"""Learning-rate factors as a closed form of the step, so that a resume has nothing to restore."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, floor: float, *, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """The factor on the peak rate at optimizer step `step` (from 0): a linear warm-up, then down to `floor`.

    The warm-up takes ceil(warmup_ratio * total_steps) steps and its first step is not zero: no step is wasted.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        decay = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))  # arxiv.org/abs/1608.03983, eq. 5
    elif schedule == "linear":
        decay = 1.0 - min(1.0, progress)
    else:
        decay = 1.0
    return floor + (1.0 - floor) * decay
