"""Law: any signal, in any phase, at ranks or at their launcher, loses no step, and the same command goes on.

`SIGNALS=30 make test ARGS="-m slow tests/ranks/test_signals_from_outside.py --timeout 3600 -n 0 -s"` sends as many and
prints to whom and when. test_signals.py tries every signal in every phase, from inside the ranks' own processes; here
they come to real commands, half of them under `deepspeed`, which as a job's step have no terminal.
"""

from __future__ import annotations

import os
import shutil
import signal
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from pivot.system.preemption import SIGNALS as KINDS
from tests.kit.ranks.struck import MOMENTS, Run, Start, require_equal_ends
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

NUM_SIGNALS = int(os.environ.get("SIGNALS", "6"))
AGAIN = 75
WHILE_IT_TRAINS = ["weights load", "step", "token counting", "save", "scoring", "data wait", "generation", "load"]
WHILE_IT_TRAINS += ["evaluation"]
AT_ITS_END = ["writing the export", "export"]
LAUNCHERS = ("deepspeed", "launch.py")
VICTIMS = ["ranks", "rank 0", "deepspeed", "rank 1", "launch.py"]
CACHED = {"token counting": "lengths", "scoring": "ref"}  # what must be gone for the phase to come


class Sent(NamedTuple):
    """A signal that was sent, and what came of it."""

    phase: str
    signal: str
    victim: str
    launched: bool  # by `deepspeed`
    codes: list[int]  # of the commands that were started
    status: str
    step: int  # that is saved
    lost: int
    seconds: float  # to the end


def plan_signals() -> list[tuple[str, signal.Signals, str, bool]]:
    """(phase, signal, victim, whether `deepspeed` starts it); those at the run's end come last."""
    num_last = max(1, NUM_SIGNALS // 6)
    planned: list[tuple[str, signal.Signals, str, bool]] = []
    for phases, count in ((WHILE_IT_TRAINS, NUM_SIGNALS - num_last), (AT_ITS_END, num_last)):
        for phase in islice(cycle(phases), count):
            turn, place = divmod(len(planned), len(VICTIMS))  # in five turns each victim gets each signal
            victim = VICTIMS[place]
            number = KINDS[(place + turn) % len(KINDS)]
            # Here data never come: a rank that nobody tells waits on, and launch.py tells one when the other has ended.
            if phase == "data wait" and victim.startswith("rank "):
                victim = "ranks"
            if phase == "data wait" and victim == "launch.py" and number in (signal.SIGTERM, signal.SIGINT):
                victim = "deepspeed"
            planned.append((phase, number, victim, victim in LAUNCHERS or place == 1))
    return planned


@pytest.mark.slow
@pytest.mark.timeout(600 + 120 * NUM_SIGNALS)
def test_signalled_runs_end_with_equal_weights(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "llava")
    make_set(tmp_path)
    run, draw = Run(tmp_path, "signalled"), Random(11)
    sent = [send(run, draw, *planned) for planned in plan_signals()]
    Start(run, last=True).finish()
    untouched = Run(tmp_path, "untouched", run.max_steps)
    Start(untouched, last=True).finish()
    show(sent)
    require_equal_ends(run, untouched)
    print(f"{NUM_SIGNALS} signals, {run.max_steps} steps: weights and losses equal bit by bit")


def send(run: Run, draw: Random, phase: str, number: signal.Signals, victim: str, launcher: bool) -> Sent:
    if phase in CACHED:
        shutil.rmtree(run.cache / CACHED[phase])
    last = phase in AT_ITS_END
    if last and run.status().get("status") == "done":
        shutil.rmtree(run.path / "export")  # it is made again
    start = Start(run, MOMENTS[phase], launcher=launcher, last=last)
    try:
        assert start.strike_in_moment(draw, victim, number), "too late"
        logged = run.logged_step()
        seconds = start.wait_for_end()
        codes = start.wait()
    finally:
        start.clear_away()
    start.require_went_on(lost_at_most=0)
    status, saved = run.status(), run.saved_step()
    sent = Sent(
        phase, number.name, victim, launcher, codes, status["status"], saved, run.logged_step() - saved, seconds
    )
    print(*sent, flush=True)
    check_end(start, sent, logged)
    return sent


def check_end(start: Start, sent: Sent, logged: int) -> None:
    """Saved where it was when the signal came, or one step on where that was being made; told by code and status."""
    run, status = start.run, start.run.status()
    launcher_struck = sent.victim in LAUNCHERS
    assert sent.lost == 0 and run.damaged() == []
    if not launcher_struck:  # the ranks look for their launcher once a second
        assert sent.step == logged + (sent.phase == "step"), "a step more, or less"
        assert set(sent.codes) == {0 if sent.phase == "writing the export" else AGAIN}
    assert (status["status"], status["step"]) == (
        "done" if sent.phase == "writing the export" else "preempted",
        sent.step,
    )
    if sent.phase == "writing the export":
        return
    if sent.phase != "token counting":  # the folder is not this start's yet
        where = {"rank 0": " on rank 0", "rank 1": " on rank 1"}.get(sent.victim, "")
        by_launcher = ("stopped by SIGTERM", "stopped by its launcher")
        assert status["reason"].startswith(by_launcher if launcher_struck else f"stopped by {sent.signal}{where}")
    goes_on = f"at step {sent.step}, which is saved; the same command goes on"
    anew = "before there was anything to save; the same command starts anew"
    assert start.says(f"stopped    by .*{goes_on if sent.step else anew}")


def show(sent: list[Sent]) -> None:
    print("\nphase               signal   victim     started by  codes     status     step  lost  seconds")
    for one in sent:
        by, codes = "deepspeed" if one.launched else "two ranks", ", ".join(map(str, one.codes))
        print(
            f"{one.phase:<20}{one.signal:<9}{one.victim:<11}{by:<12}{codes:<10}{one.status:<11}{one.step:<6}{one.lost:<6}"
            f"{one.seconds:.1f}"
        )
