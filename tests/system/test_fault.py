"""Faults on purpose: what a text asks for, whom and when it strikes, and that without one nothing happens."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pivot.system import fault
from pivot.system.fault import Fault, announce, fill_disk, inject, read, spoil
from tests.kit.commands import ROOT


@pytest.fixture(autouse=True)
def nothing_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault, "_due", set())
    monkeypatch.delenv("PIVOT_FAULT", raising=False)


def ask(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PIVOT_FAULT", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rank=1,step=3,kind=sigkill", [Fault(1, range(3, 4), "sigkill")]),
        ("kind=slow:0.5, step=3-9, rank=0", [Fault(0, range(3, 10), "slow", 0.5)]),
        (
            "rank=0,step=1,kind=nan;rank=12,step=2,kind=enospc",
            [Fault(0, range(1, 2), "nan"), Fault(12, range(2, 3), "enospc")],
        ),
        ("", []),
    ],
)
def test_a_text_says_whom_and_when(monkeypatch: pytest.MonkeyPatch, text: str, expected: list[Fault]) -> None:
    ask(monkeypatch, text)
    assert read() == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "rank=1,step=3,kind=sigkil",
            "kind is sigkil in 'rank=1,step=3,kind=sigkil', expected sigkill, sigstop, raise",
        ),
        ("rank=1,step=3,kind=slow", "kind is slow in"),
        ("rank=1,step=3,kind=nan:4", "kind is nan:4 in"),
        ("rank=one,step=3,kind=nan", "rank is one in 'rank=one,step=3,kind=nan', expected a rank, from 0"),
        ("rank=1,step=0,kind=nan", "step is 0 in 'rank=1,step=0,kind=nan', expected a step, from 1, or steps such as"),
        ("rank=1,step=9-3,kind=nan", "step is 9-3 in 'rank=1,step=9-3,kind=nan', expected the lower one first"),
        ("rank=1,kind=nan", "step is nothing in 'rank=1,kind=nan'"),
        ("rank=1,rank=2,step=1,kind=nan", "rank is 1 and 2 in"),
        ("rank=1,step=3,kind=nan,seconds=4", "found 'seconds' in 'rank=1,step=3,kind=nan,seconds=4', expected rank, "),
        ("rank=1,step=3,kind=nan;", "rank is nothing in ''"),
        ("sigkill", "rank is nothing in 'sigkill'"),
    ],
)
def test_a_wrong_text_is_one_sentence(monkeypatch: pytest.MonkeyPatch, text: str, sentence: str) -> None:
    ask(monkeypatch, text)
    with pytest.raises(ValueError, match="^PIVOT_FAULT: .*; write rank=1,step=3,kind=sigkill, or unset it$") as refused:
        read()
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_it_strikes_its_rank_in_its_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "rank=1,step=2-3,kind=raise")
    for rank, step in ((0, 2), (0, 3), (1, 1), (1, 4)):
        inject(rank, step)
    for step in (2, 3):
        with pytest.raises(RuntimeError, match="PIVOT_FAULT asked for this error"):
            inject(1, step)


def test_a_loss_is_nan_during_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is its gradient."""
    ask(monkeypatch, "rank=0,step=2,kind=nan")
    found = []
    for step in (1, 2, 3):
        inject(0, step)
        weight = torch.ones(1, requires_grad=True)
        loss = spoil(3 * weight.sum())
        loss.backward()
        assert weight.grad is not None
        found.append((float(loss.isnan()), float(weight.grad.isnan())))
    assert found == [(0, 0), (1, 1), (0, 0)]


def test_the_disk_is_full_for_one_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ask(monkeypatch, "rank=0,step=2,kind=enospc")
    for step in (1, 2, 3):  # of another step than the save, which may come later
        inject(0, step)
        if step == 1:
            fill_disk(tmp_path)
    with pytest.raises(OSError, match="No space left on device") as full:
        fill_disk(tmp_path)
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path))
    fill_disk(tmp_path)


def test_a_wait_takes_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "rank=0,step=1,kind=slow:0.2")
    began = time.monotonic()
    inject(0, 1)
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_signals(number: signal.Signals) -> None:
    code = "from pivot.system.fault import inject; inject(0, 1)"
    environment = os.environ | {"PIVOT_FAULT": f"rank=0,step=1,kind={number.name.lower()}"}
    struck = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    _, status = os.waitpid(struck.pid, os.WUNTRACED)
    if number is signal.SIGSTOP:
        assert os.WIFSTOPPED(status)
        struck.kill()
        os.waitpid(struck.pid, 0)
    else:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    struck.returncode = 0


def test_without_a_text_nothing_happens(tmp_path: Path) -> None:
    loss = torch.zeros(1)
    inject(0, 1)
    fill_disk(tmp_path)
    assert spoil(loss) is loss
    announce(pytest.fail)


def test_the_reader_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "rank=1,step=3,kind=nan;rank=0,step=2-5,kind=slow:4")
    told: list[str] = []
    announce(told.append)
    assert told == [
        "warning: PIVOT_FAULT is set, for tests alone: nan on rank 1 in step 3",
        "warning: PIVOT_FAULT is set, for tests alone: slow on rank 0 in steps 2 to 5",
    ]


def test_it_loads_nothing_of_torchs() -> None:
    code = "import sys, pivot.system.fault; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
