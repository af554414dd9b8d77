"""Which rank hangs: what each rank tells of itself when nothing moves any more, and what follows from it.

RUN/stacks/rank-00001.txt holds a rank's `Report` in its first line and the stacks of its threads below. A rank that is
stopped, or whose machine is gone, writes none, and that names it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MOST_NAMED = 3  # ranks in a sentence


class Hang(RuntimeError):
    """The ranks wait for one that does not come; the text names it."""


@dataclass(frozen=True)
class Report:
    """One rank, as it stands."""

    rank: int
    phase: str  # "in step 3"
    place: str  # "pivot/train.py:262 (train_step)"
    waits: bool  # for the other ranks, else it is at work by itself
    met: int  # collectives that it came out of: fewer than others have means that it is behind
    still_s: float  # for how long it has stood there


def report_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"


def first_line(report: Report) -> str:
    return json.dumps(asdict(report)) + "\n"


def read_report(folder: Path, rank: int) -> Report | None:
    """What a rank wrote; None where it wrote nothing, or nothing whole."""
    try:
        with report_path(folder, rank).open(encoding="utf-8") as file:
            return Report(**json.loads(file.readline()))
    except (OSError, ValueError, TypeError):
        return None


def speaks(folder: Path, rank: int) -> bool:
    """Whether `rank` is the first of those that wait, and so the one that tells of the hang."""
    earlier = (read_report(folder, other) for other in range(rank))
    return not any(report is not None and report.waits for report in earlier)


def judge(reports: Sequence[Report | None], who: Sequence[str], timeout_s: float) -> str:
    """Which rank the others wait for, in a sentence. `who`: host and process of each rank.

    The first of these that there are: ranks that wrote nothing; ranks that are at work by themselves; those that are
    behind, where all wait.
    """
    found = [report for report in reports if report is not None]
    waiting = [report for report in found if report.waits]
    silent = [rank for rank, report in enumerate(reports) if report is None]
    working = [report for report in found if not report.waits]
    behind = [report for report in waiting if report.met < max(other.met for other in waiting)]
    if silent:
        told = f"{_ranks(silent, who)} answered nothing, not even with a stack: stopped, or its machine or disk is gone"
    elif working or behind:
        hanging = working or behind
        first, ranks = hanging[0], [report.rank for report in hanging]
        told = f"{_ranks(ranks, who)} stayed {first.phase} for {first.still_s:.0f} s, at {first.place}"
        waiting = [report for report in waiting if report not in hanging]
    else:
        first = waiting[0]
        return (
            f"all {len(reports)} ranks waited for each other for {timeout_s:g} s (see train.timeout_s), {first.phase} "
            f"at {first.place}: look for a GPU or a network that does not answer"
        )
    others = [report.rank for report in waiting]
    waited = f"; {_ranks(others)} waited for it {waiting[0].phase}, at {waiting[0].place}" if waiting else ""
    return f"{told}{waited}, {timeout_s:g} s (see train.timeout_s)"


def _ranks(ranks: Sequence[int], who: Sequence[str] = ()) -> str:
    named = [f"{rank} ({who[rank]})" if who else str(rank) for rank in ranks[:MOST_NAMED]]
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{more}"
