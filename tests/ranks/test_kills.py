"""Law: a run that is killed at any moment goes on from a whole checkpoint and ends with an untouched one's weights.

`KILLS=100 make test ARGS="-m slow tests/ranks/test_kills.py --timeout 3600 -n 0 -s"` kills as often as that and prints
where; `OVERRIDES="key=value ..."` are settings of both runs. Victims are one rank, both, the `deepspeed` command, its
launch.py, or all of them. Ranks without a launcher that have not met yet are killed together: the one that is left
would wait for `train.timeout_s`.
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

from tests.kit.ranks.struck import LOST_AT_MOST, MOMENTS, Run, Start, require_equal_ends
from tests.kit.sets import make_set
from tests.kit.tiny import tiny_llava

KILLS = int(os.environ.get("KILLS", "8"))
WHILE_IT_TRAINS = ["steps", "latest", "start", "load", "saving", "any time", "evaluating", "rename", "scoring", "prune"]
AT_ITS_END = ["exporting", "writing the export"]
VICTIMS = ["ranks", "rank 0", "rank 1"]
VICTIMS_WITH_LAUNCHER = ["launch.py", "deepspeed", "rank 1", "launch.py", "all", "deepspeed", "rank 0"]


class Kill(NamedTuple):
    """What was done, and what came of it."""

    phase: str
    victim: str
    in_time: bool  # the phase was not over yet
    lost: int  # steps that were made and not saved
    seconds: float  # until no process was left


def plan_kills() -> list[tuple[str, str, bool]]:
    """(phase, victim, whether `deepspeed` starts it) of each kill; those at the run's end come last."""
    num_last, victims = max(1, KILLS // 8), {False: cycle(VICTIMS), True: cycle(VICTIMS_WITH_LAUNCHER)}
    kills = []
    for phases, count in ((WHILE_IT_TRAINS, KILLS - num_last), (AT_ITS_END, num_last)):
        for turn, phase in enumerate(islice(cycle(phases), count)):
            launcher = (turn + turn // len(phases)) % 2 == 1  # in every second round of the phases
            together = phase in ("start", "any time") and not launcher  # they may not have met yet
            victim = "ranks" if together else next(victims[launcher])
            kills.append((phase, victim, launcher))
    return kills


@pytest.mark.slow
@pytest.mark.timeout(600 + 120 * KILLS)
def test_killed_runs_end_with_equal_weights(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "llava")
    make_set(tmp_path)
    run, draw = Run(tmp_path, "killed"), Random(7)
    kills = [kill(run, draw, *planned) for planned in plan_kills()]
    Start(run, last=True).finish()
    untouched = Run(tmp_path, "untouched", run.max_steps)
    Start(untouched, last=True).finish()
    show(kills)
    require_equal_ends(run, untouched)
    print(f"{KILLS} kills, {run.max_steps} steps: weights and losses equal bit by bit")


def kill(run: Run, draw: Random, phase: str, victim: str, launcher: bool) -> Kill:
    last = phase in AT_ITS_END
    if phase == "scoring":
        shutil.rmtree(run.cache / "ref")
    if last and run.status().get("status") == "done":
        shutil.rmtree(run.path / "export")  # it was finished in spite of a kill, and is made again
    start = Start(run, MOMENTS[phase], launcher=launcher, last=last)
    try:
        in_time = start.strike_in_moment(draw, victim, signal.SIGKILL)
        seconds = start.wait_for_end()
    finally:
        start.clear_away()
    start.require_went_on(LOST_AT_MOST)
    check_end(start, victim)
    done = Kill(phase, victim, in_time, run.logged_step() - run.saved_step(), seconds)
    print(f"saved {run.saved_step()}", *done, flush=True)
    return done


def check_end(start: Start, victim: str) -> None:
    """What it leaves: whole checkpoints, none fewer, and a status that says what happened."""
    run, status = start.run, start.run.status()
    assert run.damaged() == []
    assert run.saved_step() >= start.saved and run.logged_step() - run.saved_step() <= LOST_AT_MOST
    if not start.says("start ") or status["status"] == "done":  # it was not the run's yet, or all was done
        return
    expected = {"ranks": "running", "all": "running", "deepspeed": "preempted", "launch.py": "preempted"}
    assert status["status"] == expected.get(victim, "failed"), (status, start.output())
    if status["status"] == "preempted":
        assert status["step"] == run.saved_step() and "its launcher, process" in status["reason"]
    if status["status"] == "failed":
        assert status["reason"].startswith("another rank died and left no reason"), status


def show(kills: list[Kill]) -> None:
    """How often whom in which phase, and the worst of each phase."""
    victims = sorted({kill.victim for kill in kills})
    print("\n" + "phase".ljust(20), *(f"{victim:>9}" for victim in victims), "  in time  lost steps  nobody left after")
    for phase in [*WHILE_IT_TRAINS, *AT_ITS_END]:
        found = [kill for kill in kills if kill.phase == phase]
        counts = [sum(kill.victim == victim for kill in found) for victim in victims]
        if found:
            print(
                phase.ljust(20),
                *(f"{count or '':>9}" for count in counts),
                f"{sum(kill.in_time for kill in found):>5}/{len(found):<3}",
                f"{max(kill.lost for kill in found):>11}",
                f"{max(kill.seconds for kill in found):>15.1f} s",
            )
