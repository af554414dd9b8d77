"""The stop signal, in a process of its own; and which GPU is a rank's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pivot.system import distributed

SCRIPT = """
import os, signal, sys
from pivot.system.distributed import StopSignal
stop = StopSignal()
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
    print(stop.received, flush=True)
"""


def send(*names: str) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True)
    return done.returncode, done.stdout.split()


def test_a_stop_is_remembered_and_a_second_ctrl_c_ends_at_once() -> None:
    """DeepSpeed's launcher answers Ctrl-C with a SIGTERM to the ranks, which have had the Ctrl-C already."""
    assert send("SIGINT", "SIGTERM") == (0, ["SIGINT", "SIGTERM"])
    assert send("SIGTERM", "SIGUSR2", "SIGINT") == (0, ["SIGTERM", "SIGUSR2", "SIGINT"])
    assert send("SIGINT", "SIGTERM", "SIGINT") == (130, ["SIGINT", "SIGTERM"])


@pytest.mark.parametrize(
    ("local_rank", "message"),
    [
        (None, "LOCAL_RANK is absent"),
        ("2", r"LOCAL_RANK is 2, but this process sees 2 GPU"),
        ("-1", "LOCAL_RANK is -1"),
    ],
)
def test_a_gpu_that_is_not_a_ranks_own_is_refused(
    local_rank: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed._own_gpu() == 1
    monkeypatch.delenv("LOCAL_RANK")
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ValueError, match=message):
        distributed._own_gpu()
