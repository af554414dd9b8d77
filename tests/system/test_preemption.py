"""What asks a process to stop, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pivot.config import REPOSITORY

SCRIPT = """
import os, signal, sys
from pivot.system import preemption
with preemption.listening():
    for name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(signal, name))
        print(preemption.reason(), flush=True)
print(preemption.reason())
"""


def send(*names: str, ignored: signal.Signals | None = None) -> tuple[int, list[str]]:
    def ignore() -> None:
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    command = [sys.executable, "-c", SCRIPT, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, preexec_fn=ignore)
    return done.returncode, done.stdout.split()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_the_first_signal_is_remembered(name: str) -> None:
    assert send(name, "SIGTERM") == (0, [name, name, "None"])


def test_a_second_ctrl_c_ends_at_once() -> None:
    """DeepSpeed's launcher answers Ctrl-C with a SIGTERM to the ranks, which have had the Ctrl-C already."""
    assert send("SIGINT", "SIGTERM") == (0, ["SIGINT", "SIGINT", "None"])
    assert send("SIGINT", "SIGTERM", "SIGINT") == (130, ["SIGINT", "SIGINT"])


def test_an_ignored_hangup_stays_ignored() -> None:
    """As under nohup. USR2 is ignored in job scripts, so that launchers survive it, and must reach the ranks."""
    assert send("SIGHUP", ignored=signal.SIGHUP) == (0, ["None", "None"])
    assert send("SIGUSR2", ignored=signal.SIGUSR2) == (0, ["SIGUSR2", "None"])


STUCK = """
import ctypes, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = [open("/dev/null") for _ in range(int(sys.argv[1]))]
from pivot.system import preemption
preemption.last_words = lambda: print("last words", flush=True)
with preemption.listening():
    mutex, c = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    print("ready", flush=True)
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)  # for ever, whatever signal comes
"""


@pytest.mark.parametrize("num_files", ["0", "1100"])
def test_a_second_ctrl_c_ends_a_process_that_waits_in_c(num_files: str) -> None:
    """Where handlers of Python do not run: only the thread sees it, also with more files open than select() takes."""
    command = [sys.executable, "-c", STUCK, num_files]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert process.stdout.read() == "last words\n"


WAITING = """
import os, signal, sys, time
from pivot.system import preemption
with preemption.listening():
    print(preemption.unless_asked(lambda: "came"), flush=True)
    print(preemption.unless_asked(lambda: time.sleep(60)), preemption.reason(), flush=True)
    print(preemption.unless_asked(lambda: "came"), flush=True)
"""


def test_a_request_breaks_off_a_wait() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == "came\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=10)[0] == "None SIGUSR1\nNone\n"


RANK = """
import time
from pivot.system import preemption
with preemption.listening():
    print("ready", flush=True)
    for _ in range(300):
        time.sleep(0.1)
        if preemption.reason():
            break
    print(preemption.reason(), flush=True)
"""
# As DeepSpeed's: the command starts a launcher, which starts the rank; each says its number.
RELAY = "import subprocess, sys, os; print(os.getpid(), flush=True); sys.exit(subprocess.run(sys.argv[1:]).returncode)"


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_rank_sees_that_its_launcher_is_gone(tmp_path: Path, name: str, killed: int) -> None:
    """Its parent, or that one's own parent, by SIGKILL."""
    (tmp_path / name).write_text(RELAY)
    relay = [sys.executable, str(tmp_path / name)]
    assert watch([*relay, *relay, sys.executable, "-c", RANK], killed).startswith("its launcher, process ")


def test_a_process_that_a_shell_started_outlives_it() -> None:
    relay = [sys.executable, "-c", RELAY]
    assert watch([*relay, *relay, sys.executable, "-c", RANK.replace("300", "30")], 1) == "None"


def watch(command: list[str], killed: int) -> str:
    """What the rank says after the launcher of this number, from the outside, was killed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None
    launchers = [int(process.stdout.readline()) for _ in range(2)]
    assert process.stdout.readline() == "ready\n"
    os.kill(launchers[killed], signal.SIGKILL)
    said = process.stdout.readline().strip()
    process.wait()
    return said
