"""Commands as a user runs them, each in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rank_free_environment() -> dict[str, str]:
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in names} | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
