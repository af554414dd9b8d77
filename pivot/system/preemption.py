"""Whether this process was asked to stop: by a signal, by the end of its launcher, by a file. Nothing here loads torch.

A request only sets a flag. The ranks agree on it where all of them come by (`distributed.check_preemption`); there
`Preempted` is raised on all, and what is not on the disk yet is saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPTED, AGAIN = 130, 75  # exit codes: by a second Ctrl-C; stopped before there was anything to lose
LOOK_EVERY_S = 1.0  # for the launcher
MEET_WITHIN_S = 2.0  # from a signal on: for ranks that have not met yet, and so have nothing to lose
_LAUNCH = "deepspeed.launcher.launch"  # on each machine; below the command that the user gave, or below ssh
_MODULES = (_LAUNCH, "deepspeed.launcher.runner", "torch.distributed.run")
_COMMANDS = ("deepspeed", "deepspeed.pt", "torchrun")
_OF_LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # variables that launch.py and torchrun set for their ranks

Value = TypeVar("Value")


class Preempted(Exception):
    """The ranks stop together; the text says who asked for it. The same command goes on."""


class _Woken(BaseException):
    """Raised by a handler inside `unless_asked` alone."""


@dataclass
class _State:
    """Of this process, as signals are."""

    reason: str | None = None  # why it was asked to stop
    interrupts: int = 0
    listens: bool = False
    waiting: bool = False  # inside `unless_asked`
    meeting: bool = False  # inside `meeting`
    met: bool = False  # behind it


_state = _State()
last_words: Callable[[], object] = lambda: None  # noqa: E731  # before a second Ctrl-C ends the process


def reason() -> str | None:
    """Why this process was asked to stop; None where it was not."""
    return _state.reason


def ask(text: str) -> None:
    """Ask this process to stop, from any of its threads; a wait inside `unless_asked` ends."""
    _state.reason = _state.reason or text
    main = threading.main_thread().ident
    if _state.listens and main is not None:
        signal.pthread_kill(main, signal.SIGUSR2)


def check() -> None:
    """Preempted where this process was asked to stop; for a rank that works alone inside distributed.shared_failure."""
    if _state.reason is not None:
        raise Preempted(_state.reason)


def unless_asked(wait: Callable[[], Value]) -> Value | None:
    """What `wait` gives. None once this process is asked to stop: the wait is broken off at once, or not begun."""
    try:
        _state.waiting = True
        try:
            if _state.reason is None:
                return wait()
        finally:
            _state.waiting = False
    except _Woken:
        pass
    return None


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGNALS ask this process to stop instead of ending it; a second SIGINT still ends it at once.

    So does the end of the launcher that started it: without one nobody would see what the ranks do, or end them. A
    SIGHUP that is ignored (nohup) stays so. Inside another `listening`, and in a thread, nothing changes.
    """
    if _state.listens or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, _remember)
    _state.listens = True
    # A handler waits until C++ gives control back, which a collective may never do: a thread gets the numbers, too.
    told, numbers = socket.socketpair()
    numbers.setblocking(False)
    previous, over = signal.set_wakeup_fd(numbers.fileno(), warn_on_full_buffer=False), threading.Event()
    links = _launchers()
    threading.Thread(target=_watch, args=(told, over, links), name="preemption", daemon=True).start()
    try:
        if _came_too_late(links):
            _obey_orphaned("its launcher is gone", alone=_are_all_ranks_here())
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(previous)
        numbers.close()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _state.reason, _state.interrupts, _state.listens = None, 0, False


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Inside, the ranks wait for each other in C++; one that is asked to stop leaves alone, after a while."""
    _state.meeting = True
    try:
        yield
        _state.met = True
    finally:
        _state.meeting = False


def _remember(number: int, frame: FrameType | None) -> None:
    _state.interrupts += number == signal.SIGINT
    if _state.interrupts > 1:  # counted: to the first Ctrl-C DeepSpeed's launcher adds a SIGTERM
        _end_now()
    _state.reason = _state.reason or signal.Signals(number).name
    if _state.waiting:
        _state.waiting = False
        raise _Woken


def _end_now() -> None:
    with contextlib.suppress(Exception):
        last_words()
    os._exit(INTERRUPTED)


def _watch(told: socket.socket, over: threading.Event, links: list[tuple[int, int]]) -> None:
    """Sees what the main thread may be unable to see: a second Ctrl-C, and that the launcher is gone."""
    interrupts, asked_at = 0, None
    # The others have the same launcher, which ends them when this one leaves; else they would wait for it.
    alone = bool(links) and _are_all_ranks_here()
    told.settimeout(LOOK_EVERY_S)  # not select: a process may have more than its 1,024 files open
    with told:
        while not over.is_set():
            try:
                numbers = told.recv(64)
            except TimeoutError:
                numbers = b""
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                _end_now()
            if asked_at is None and any(number in SIGNALS for number in numbers):
                asked_at = time.monotonic()
            gone = next((parent for child, parent in links if _parent_of(child) != parent), None)
            if gone is not None and not over.is_set():
                links = []
                _obey_orphaned(f"its launcher, process {gone}, is gone", alone=alone)
            waits_alone = not _state.met and (alone or _state.meeting)
            if waits_alone and asked_at is not None and time.monotonic() > asked_at + MEET_WITHIN_S:
                _leave_alone("a signal")


def _obey_orphaned(reason: str, *, alone: bool) -> None:
    """Without a launcher: at once, while `alone` nobody waits for this rank yet; else together with the others."""
    if alone and not _state.met:
        _leave_alone(reason)
    ask(reason)


def _leave_alone(reason: str) -> None:
    os.write(2, f"stopped by {reason} before the ranks met: nothing was there to save\n".encode())
    os._exit(AGAIN)


def _are_all_ranks_here() -> bool:
    """Whether the launcher says that all ranks are on this machine."""
    size = os.environ.get("WORLD_SIZE")
    return size is not None and size in (os.environ.get("LOCAL_SIZE"), os.environ.get("LOCAL_WORLD_SIZE"))


def _forget_in_child() -> None:
    if _state.listens:  # a forked process would tell our thread of its own signals
        signal.set_wakeup_fd(-1)
        _state.listens = False


os.register_at_fork(after_in_child=_forget_in_child)


def _launchers() -> list[tuple[int, int]]:
    """(process, its parent) from this one up to the topmost launcher; [] where it was started by hand, or by srun."""
    links: list[tuple[int, int]] = []
    process, num_links = os.getpid(), 0
    while (parent := _parent_of(process)) > 1:
        links.append((process, parent))
        num_links = len(links) if _is_launcher(parent) else num_links
        process = parent
    return links[:num_links]


def _came_too_late(links: list[tuple[int, int]]) -> bool:
    """Whether a launcher was gone before this process, or the one between them, looked for it.

    Of DeepSpeed's two that is the command of the user; on a machine of its own it starts launch.py without --node_rank.
    """
    if not links:
        return any(name in os.environ for name in _OF_LAUNCHERS) and _is_adopted(os.getpid())
    top = links[-1][1]
    words = _command_line(top)
    alone = _LAUNCH in words and not any(word.startswith("--node_rank") for word in words)
    return alone and _is_adopted(top)


def _is_adopted(process: int) -> bool:
    """Whether the parent that started `process` is gone: a process has the session of that one, or begins its own."""
    try:
        session, parent = os.getsid(process), _parent_of(process)
        return session != process and parent > 0 and os.getsid(parent) != session
    except OSError:
        return False


def _parent_of(process: int) -> int:
    """0 where the process is gone, or the system does not tell."""
    if process == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _is_launcher(process: int) -> bool:
    """Whether its command line is that of deepspeed (the command, or what it starts on a node) or torchrun."""
    words = _command_line(process)
    return any(word in _MODULES for word in words[:4]) or any(Path(word).name in _COMMANDS for word in words[:2])


def _command_line(process: int) -> list[str]:
    """[] where the process is gone, or the system does not tell."""
    if sys.platform != "linux":
        return []
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
