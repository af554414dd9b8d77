"""Which rank is named: from what each rank wrote of itself."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from pivot.system import watchdog
from pivot.system.hang import Report, first_line, judge, read_report, report_path, speaks

WHO = ["a, process 1", "a, process 2", "b, process 3"]


def report(rank: int, *, waits: bool = True, met: int = 7, phase: str = "in step 3") -> Report:
    return Report(rank, phase, f"pivot/train.py:{rank} (f)", waits, met, 45.4)


def test_a_rank_that_wrote_nothing_is_named_first() -> None:
    told = judge([report(0), None, report(2, waits=False)], WHO, 60.0)
    assert told.startswith("rank 1 (a, process 2) answered nothing, not even with a stack: stopped, or its machine")
    assert told.endswith("; rank 0 waited for it in step 3, at pivot/train.py:0 (f), 60 s (see train.timeout_s)")


def test_then_one_that_does_not_wait() -> None:
    told = judge([report(0), report(1, met=6), report(2, waits=False, phase="in the save behind step 2")], WHO, 60.0)
    assert told == (
        "rank 2 (b, process 3) stayed in the save behind step 2 for 45 s, at pivot/train.py:2 (f); ranks 0, 1 waited "
        "for it in step 3, at pivot/train.py:0 (f), 60 s (see train.timeout_s)"
    )


def test_then_one_that_is_behind_where_all_wait() -> None:
    assert judge([report(0), report(1, met=6), report(2)], WHO, 60.0).startswith("rank 1 (a, process 2) stayed")


def test_else_none() -> None:
    told = judge([report(0), report(1), report(2)], WHO, 60.0)
    assert told.startswith(
        "all 3 ranks waited for each other for 60 s (see train.timeout_s), in step 3 at pivot/train.py:0"
    )


def test_many_ranks_are_counted() -> None:
    told = judge([report(0), *[None] * 511], [f"h{rank}, process 1" for rank in range(512)], 600.0)
    assert told.startswith(
        "ranks 1 (h1, process 1), 2 (h2, process 1), 3 (h3, process 1) and 508 more answered nothing"
    )


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"rank": 1}', "\x00"])
def test_a_report_that_is_not_whole_is_none(tmp_path: Path, content: str) -> None:
    report_path(tmp_path, 1).write_text(content)
    assert read_report(tmp_path, 1) is None and read_report(tmp_path, 2) is None
    report_path(tmp_path, 1).write_text(first_line(report(1)) + "Thread 0x1 (most recent call first):\n")
    assert read_report(tmp_path, 1) == report(1)
    assert asdict(report(1)) == json.loads(first_line(report(1)))


def test_the_first_that_waits_speaks(tmp_path: Path) -> None:
    for told in (report(0, waits=False), report(2), report(3)):
        report_path(tmp_path, told.rank).write_text(first_line(told))
    assert [speaks(tmp_path, rank) for rank in range(5)] == [True, True, True, False, False]


def test_a_main_thread_waits_for_others_where_its_innermost_frame_says_so() -> None:
    frames = dict(sys._current_frames())
    frame = frames[threading.main_thread().ident or 0]
    assert not watchdog.is_waiting(frame, frames) and not watchdog.is_waiting(None, frames)
    for module, waits in {
        "torch.distributed.distributed_c10d": True,
        "deepspeed.runtime.zero.stage3": True,
        "torch.nn.functional": False,
        "torch.autograd.graph": False,
        "pivot.engine.files": False,
    }.items():
        space: dict[str, object] = {"__name__": module, "sys": sys}
        exec("def here(): return sys._getframe()", space)
        assert watchdog.is_waiting(space["here"](), frames) == waits, module  # type: ignore[operator]


def test_one_rank_has_no_watchdog() -> None:
    before = threading.active_count()
    with watchdog.Watchdog(0, ["a, process 1"], 1.0).watching():
        assert threading.active_count() == before
    assert watchdog.take_busy_s() == 0.0
