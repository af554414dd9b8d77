"""Ends a rank that waits for another longer than train.timeout_s, with the stacks of all and the name of that other.

A thread looks at the main thread's stack ten times a second: it waits for the others where its innermost frame is
one of WAITS, else it works by itself. Ranks that work are never ended here, however long they take. Nothing is written
while the ranks come on: each looks now and then whether RUN/stacks/ is there, which a rank that has waited for nearly
the time-out makes; then all write their stacks there, and when the time is up the first of those that wait reads them,
says who hangs, and ends. It comes ahead of gloo's and NCCL's own time-out (GRACE_S), whose words do not tell.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from pivot.system.hang import Hang, Report, first_line, judge, read_report, report_path, speaks
from pivot.system.workers import running_out

SAMPLE_S = 0.1  # between two looks at the main thread
GRACE_S = 10.0  # the process group's own time-out comes later by this
END_WITHIN_S = 8.0  # from train.timeout_s on: also where the file system does not answer
OTHERS_S = 3.0  # in which the rank that speaks has written
# Where a host waits for other ranks, by the module of its innermost Python frame: what is below is C++. A GPU that
# waits for another GPU shows as a host that waits for its GPU.
WAITS = ("torch.distributed", "torch.cuda", "deepspeed", "pivot.system.distributed", "pivot.metrics")
WAITS_EXACTLY = ("pivot.engine.engine",)
_OURS = ("torch.distributed", "pivot.system.distributed")  # `met` counts them
_NO_PLACE = ("pivot.system.distributed", "pivot.system.preemption", "pivot.system.watchdog")


class _Now:
    """Of this process: how far its main thread has come."""

    phase = "at the start"
    met = 0  # collectives of ours
    moves = 0
    alone = False  # works while the others wait, though it meets them now and then
    busy_s = 0.0


_now = _Now()


def enter(phase: str) -> None:
    """Say what this rank does from here on, as it shall stand in a sentence: "in step 3"."""
    _now.phase = phase
    move()


def met() -> None:
    """This rank came out of a collective that all ranks made."""
    _now.met += 1
    move()


def move() -> None:
    """This rank came on."""
    _now.moves += 1


def num_moves() -> int:
    return _now.moves


@contextlib.contextmanager
def working_alone(alone: bool) -> Iterator[None]:
    """Inside, the other ranks wait for what this one does in another thread."""
    _now.alone = alone
    try:
        yield
    finally:
        _now.alone = False


def take_busy_s() -> float:
    """Seconds since the last call in which the main thread did not wait for other ranks; 0 without a watchdog."""
    seconds, _now.busy_s = _now.busy_s, 0.0
    return seconds


class Watchdog:
    """Watches this rank from a thread. `who`: host and process of every rank."""

    def __init__(self, rank: int, who: Sequence[str], timeout_s: float) -> None:
        self._rank, self._who, self._timeout_s = rank, who, timeout_s
        self._margin_s = min(60.0, timeout_s / 4)  # before the time-out: for all to write their stacks
        self._main, self._over = threading.main_thread().ident, threading.Event()
        self._folder: Path | None = None
        self._tell: Callable[[Hang], None] = lambda hang: None
        self._has_ended: Callable[[], bool] = lambda: False
        self._written = False
        self._files = threading.Thread()

    def write_to(self, folder: Path, tell: Callable[[Hang], None], has_ended: Callable[[], bool]) -> None:
        """From here on stacks go below the run's `folder`, not to the terminal; `tell` writes the run's end, and
        `has_ended` says whether another rank has written it."""
        self._tell, self._has_ended = tell, has_ended
        self._folder = folder / "stacks"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A world of one has nobody to wait for."""
        if len(self._who) > 1:
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._over.set()
            faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        before = since = looked = time.monotonic()
        stood: object = None
        while not self._over.wait(SAMPLE_S):
            now, frames = time.monotonic(), sys._current_frames()
            frame = frames.get(self._main or 0)
            waits = not _now.alone and is_waiting(frame, frames)
            if not waits:
                _now.busy_s += now - before
            before = now
            # At work it stands where it makes no move; in a wait, also at the same line of every function.
            stands = (waits, _now.met, _now.moves, _lines(frame) if waits else None)
            if stands != stood:
                since, stood = now, stands
                if self._written:
                    self._beside(self._take_back)
            still_s = now - since
            if now - looked > self._margin_s / 3:
                looked = now
                # Of a main thread that never lets go of Python's lock, after which nothing here can look at it.
                faulthandler.dump_traceback_later(self._timeout_s, file=2)
                self._beside(self._look, self._report(frame, waits, still_s))
            if still_s > self._timeout_s - self._margin_s and not self._written:
                self._beside(self._write, self._report(frame, waits, still_s))
            if waits and still_s > self._timeout_s and not self._over.is_set():
                self._end(self._report(frame, waits, still_s))
            del frame, frames  # they hold the tensors of their functions

    def _report(self, frame: FrameType | None, waits: bool, still_s: float) -> Report:
        return Report(self._rank, _now.phase, _place(frame), waits, _now.met, round(still_s, 1))

    def _beside(self, task: Callable[..., None], *arguments: Report) -> None:
        """Run it in a thread of its own, one at a time: the file system may be what hangs."""
        if not self._files.is_alive():
            self._files = threading.Thread(target=task, args=arguments, name="stacks", daemon=True)
            self._files.start()

    def _look(self, report: Report) -> None:
        """Write the stacks where another rank asks for them, and leave where the others have left."""
        if self._folder is None:
            return
        if not self._written and self._folder.exists():
            self._write(report)
        elif self._written and self._has_ended():
            os.write(2, f"[rank {self._rank}] the others waited for this rank and have ended; it ends, too\n".encode())
            os._exit(1)

    def _write(self, report: Report) -> None:
        self._written = True
        if self._folder is None:
            faulthandler.dump_traceback(2, all_threads=True)
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            path = report_path(self._folder, self._rank)
            part = path.with_suffix(".part")
            with part.open("w", encoding="utf-8") as file:
                file.write(first_line(report))
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            part.replace(path)

    def _take_back(self) -> None:
        """It came on after all."""
        self._written = False
        if self._folder is not None:
            with contextlib.suppress(OSError):
                report_path(self._folder, self._rank).unlink(missing_ok=True)
                self._folder.rmdir()  # by the last one

    def _end(self, report: Report) -> None:
        folder = self._folder
        with running_out(END_WITHIN_S, self._leave, "the file system does not answer, so nobody else was told"):
            if folder is None:
                self._leave(f"waited {self._timeout_s:g} s (see train.timeout_s) for another rank, {report.phase}")
            elif not speaks(folder, self._rank):
                began = time.monotonic()
                while not self._has_ended() and time.monotonic() < began + OTHERS_S:
                    time.sleep(SAMPLE_S)
            if folder is not None and not self._has_ended():
                reports = [read_report(folder, rank) for rank in range(len(self._who))]
                reports[self._rank] = report
                hang = Hang(f"{judge(reports, self._who, self._timeout_s)}; stacks: {folder}")
                self._tell(hang)
                self._leave(str(hang))
            self._leave(
                f"waited {self._timeout_s:g} s (see train.timeout_s) for another rank; RUN/status says for which"
            )

    def _leave(self, why: str) -> None:
        os.write(2, f"[rank {self._rank}] error: {why}\n".encode())
        os._exit(1)


def is_waiting(frame: FrameType | None, frames: dict[int, FrameType]) -> bool:
    """Whether the main thread, at `frame`, waits for other ranks. In a backward pass its hooks may run in a thread of
    autograd's, one of `frames`."""
    if frame is None:
        return False
    if _module(frame).startswith("torch.autograd"):
        return any(_module(other).startswith(("torch.distributed", "deepspeed")) for other in frames.values())
    return _module(frame).startswith(WAITS) or _module(frame) in WAITS_EXACTLY


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _chain(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _lines(frame: FrameType | None) -> tuple[tuple[int, int], ...]:
    chain = (each for each in _chain(frame) if not _module(each).startswith(_OURS))
    return tuple((id(each.f_code), each.f_lineno) for each in chain)


def _place(frame: FrameType | None) -> str:
    """The innermost line of pivot's: "pivot/data/loader.py:207 (_next)"; without one, the innermost line."""
    chain = list(_chain(frame))
    own = (each for each in chain if _module(each).startswith("pivot.") and _module(each) not in _NO_PLACE)
    found = next(own, chain[0] if chain else None)
    if found is None:
        return "no Python"
    return f"{_module(found).replace('.', '/')}.py:{found.f_lineno} ({found.f_code.co_name})"
