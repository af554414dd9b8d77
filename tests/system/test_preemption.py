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


IMPORTING = """
import os, time
from pivot.system import preemption
preemption.MEET_WITHIN_S = 1.0
with preemption.listening():
    print(os.getpid(), flush=True)
    began = time.monotonic()
    while time.monotonic() < began + 4.0:
        time.sleep(0.1)
    print(preemption.reason())
"""
UNMET = "stopped by {} before the ranks met: nothing was there to save\n"


@pytest.mark.parametrize(("struck", "number"), [("launcher", signal.SIGKILL), ("rank", signal.SIGTERM)])
def test_a_rank_that_has_met_nobody_leaves_alone(tmp_path: Path, struck: str, number: signal.Signals) -> None:
    """While it is importing, say; where others are on other machines it would leave them waiting, and stays."""
    (tmp_path / "torchrun").write_text(RELAY)
    command = [sys.executable, str(tmp_path / "torchrun"), sys.executable, "-c", IMPORTING]
    for size in ("2", "4"):
        environment = os.environ | {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert process.stdout is not None
        launcher, rank = (int(process.stdout.readline()) for _ in range(2))
        os.kill({"launcher": launcher, "rank": rank}[struck], number)
        said, reason = process.stdout.read(), {"launcher": f"its launcher, process {launcher}, is gone"}.get(struck)
        assert said == (UNMET.format(reason or "a signal") if size == "2" else f"{reason or 'SIGTERM'}\n")
        assert process.wait() == (-number if struck == "launcher" else 75 if size == "2" else 0)


def test_a_process_that_a_shell_started_outlives_it() -> None:
    relay = [sys.executable, "-c", RELAY]
    assert watch([*relay, *relay, sys.executable, "-c", RANK.replace("300", "30")], 1) == "None"


ORPHANED = """
import os, time
parent = os.getppid()
print("waits", flush=True)
while os.getppid() == parent:
    time.sleep(0.05)
"""


LAUNCH = """
import os, subprocess, sys
print(os.getpid(), flush=True)
{waits}
sys.exit(subprocess.run(sys.argv[2:]).returncode)
"""


@pytest.mark.parametrize(
    ("killed", "variable", "option", "said"),
    [
        (0, "CROSS_RANK", "--master_addr=here", "its launcher is gone"),
        (0, "CROSS_RANK", "--node_rank=0", "None"),  # where ssh may have started launch.py, and be gone by right
        (1, "CROSS_RANK", "--master_addr=here", "its launcher is gone"),
        (1, "TORCHELASTIC_RUN_ID", "--master_addr=here", "its launcher is gone"),
        (1, "OF_NOBODY", "--master_addr=here", "None"),  # a shell started it, and its user has gone home
    ],
)
def test_a_launcher_that_was_gone_before_its_rank_looked(
    tmp_path: Path, killed: int, variable: str, option: str, said: str
) -> None:
    """DeepSpeed's command, killed while launch.py is importing, or launch.py, killed while its rank is."""
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()  # else the real one goes first
    (package / "runner.py").write_text(RELAY)
    (package / "launch.py").write_text(LAUNCH.format(waits="" if killed else ORPHANED))
    start = [sys.executable, "-m"]
    command = [*start, "deepspeed.launcher.runner", *start, "deepspeed.launcher.launch", option]
    command += [sys.executable, "-c", (ORPHANED if killed else "") + RANK.replace("300", "30")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", variable: "0"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert process.stdout is not None
    launchers = [int(process.stdout.readline()) for _ in range(2)]
    assert process.stdout.readline() == "waits\n"
    os.kill(launchers[killed], signal.SIGKILL)
    assert process.stdout.read().split("\n")[:2] == ["ready", said]
    process.wait()


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
