"""Runs with a rank that holds up the others, and with a signal to one rank while another works alone."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from launch import command
from pivot.config_load import load_config
from pivot.data import lengths
from tests.kit.ranks.scenarios_signals import RUN

ROW_S = 2.0  # for counting a row; the set has 24
STRUCK_AFTER_S = 3.0


def _start(folder: Path, name: str, overrides: list[str]) -> int:
    path = folder / f"{name}-{dist.get_rank()}.yaml"
    path.write_text(RUN.format(folder=folder, name=name, cache=f"cache-{name}", every=0))
    return command.train(load_config(path, overrides, "dpo"), False)


def slow_rank(folder: Path) -> None:
    os.environ["PIVOT_FAULT"] = "rank=1,step=2-7,kind=slow:1.5"
    with mock.patch("pivot.run.stragglers.WINDOW_S", 1.0):
        _start(folder, "slow", ["evaluate.every_steps=0", "train.max_steps=7"])


def counting(folder: Path) -> None:
    """Rank 0 counts, for 48 s if nobody stops it; rank 1 gets a signal."""
    rank, counted, original = dist.get_rank(), 0, lengths.count_tokens

    def count(*arguments: Any) -> tuple[int, ...]:
        nonlocal counted
        counted += 1
        time.sleep(ROW_S)
        return original(*arguments)

    dist.barrier()
    if rank == 1:
        threading.Timer(STRUCK_AFTER_S, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with mock.patch("pivot.data.lengths.count_tokens", count), mock.patch("pivot.data.lengths.BLOCK_ROWS", 1):
        code = _start(folder, "counting", [])
    told = {"code": code, "counted": counted, "seconds": time.monotonic() - began}
    (folder / f"counting-{rank}.json").write_text(json.dumps(told))
