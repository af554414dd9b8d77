"""Ctrl-C on a made-up launcher whose child, the node, has one child, the rank: the rank is told, and waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Launcher and node: they run what follows, and die of any signal.
RELAY = (sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)")
RANK = """
import signal, sys, time
def stop(number, frame):
    print('told by', signal.Signals(number).name, flush=True)
    if sys.argv[1] == 'saves':
        time.sleep(0.5)
        print('saved', flush=True)
        sys.exit(75)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
print('running', flush=True)
while True:
    time.sleep(0.05)
"""
STAGE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
from launch.stopping import run_until_stopped
print(*run_until_stopped(sys.argv[1:], dict(os.environ), '.'), flush=True)
"""
Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the stage in a process group of its own, as a shell does; the rank is running when it returns."""
    started: list[subprocess.Popen[str]] = []

    def start_stage(behaviour: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", STAGE, *RELAY, *RELAY, sys.executable, "-c", RANK, behaviour]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, process_group=0))
        assert read_line(started[-1]) == "running"
        return started[-1]

    yield start_stage
    for stage in started:
        for process in (*psutil.Process(stage.pid).children(recursive=True), stage) if stage.poll() is None else ():
            process.kill()
        stage.wait()


def read_line(stage: subprocess.Popen[str]) -> str:
    assert stage.stdout is not None
    return stage.stdout.readline().strip()


def press_ctrl_c(stage: subprocess.Popen[str]) -> None:
    os.killpg(stage.pid, signal.SIGINT)


def test_the_rank_saves_before_the_stage_ends(start: Start) -> None:
    stage = start("saves")
    press_ctrl_c(stage)
    assert [read_line(stage) for _ in range(3)] == ["told by SIGTERM", "saved", "75 True"]


def test_a_second_ctrl_c_ends_at_once_and_leaves_nobody(start: Start) -> None:
    stage = start("never ends")
    processes = psutil.Process(stage.pid).children(recursive=True)
    press_ctrl_c(stage)
    assert read_line(stage) == "told by SIGTERM"
    press_ctrl_c(stage)
    assert read_line(stage) == f"{-signal.SIGKILL} True"
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_without_a_signal_the_code_is_the_commands_own(start: Start) -> None:
    stage = start("saves")
    rank = psutil.Process(stage.pid).children(recursive=True)[-1]
    rank.send_signal(signal.SIGTERM)  # from elsewhere
    assert [read_line(stage) for _ in range(3)] == ["told by SIGTERM", "saved", "75 False"]
