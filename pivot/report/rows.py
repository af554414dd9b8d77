"""The rows of log.jsonl and samples.jsonl: those that a run writes; any other line is counted and passed over.

Tools, editors and crashes leave lines of their own in these files, and a page about a run must come out all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pivot.system.files import read_json_lines

LogRow = dict[str, Any]

LARGEST = 1e100  # no number of a run comes near it, and charts can still reckon with it
LAST_STEP = 10**12


def read_rows(path: Path, is_row: Callable[[LogRow], bool]) -> tuple[list[LogRow], int]:
    """The rows of a file, and how many other lines it has; nothing where there is no file."""
    rows, passed_over = [], 0
    for line, row in read_json_lines(path):
        if row is not None and is_row(row):
            rows.append(row)
        else:
            passed_over += bool(line.strip())
    return rows, passed_over


def is_log_row(row: LogRow) -> bool:
    """A step ({"step": 1, "loss": ...}), or an event of CHECKS with the values that the page reads."""
    if "event" not in row:
        return _is_step(row.get("step")) and all(map(_is_number, row.values()))
    check = CHECKS.get(str(row["event"]))
    return check is not None and _is_step(row.get("step", 0)) and check({k: v for k, v in row.items() if k != "event"})


def is_sample(row: LogRow) -> bool:
    """An answer as evaluate/outcomes.py keeps it."""
    texts = all(isinstance(row.get(name), str) for name in ("id", "question", "answer", "generated"))
    known = row.get("right") is None or isinstance(row["right"], bool)
    return texts and known and _is_step(row.get("step")) and _is_step(row.get("row"))


def _is_start(row: LogRow) -> bool:
    numbers = [row.get(name, {}) for name in ("num_parameters", "exclusions")]
    versions = row.get("versions", {})
    plain = [value for value in row.values() if not isinstance(value, dict)]
    return (
        all(map(_is_numbers, numbers))
        and isinstance(versions, dict)
        and _is_number(row.get("num_pairs", 0))
        and all(isinstance(value, str | bool) or _is_number(value) for value in [*plain, *versions.values()])
    )


def _is_save(row: LogRow) -> bool:
    plain = {name: value for name, value in row.items() if name != "copied"}
    return "step" in row and _is_numbers(plain) and all(map(_is_known, (row.get("wait_s"), row.get("write_s"))))


def _is_evaluation(row: LogRow) -> bool:
    intervals, others = row.get("intervals", {}), {k: v for k, v in row.items() if k not in ("intervals", "skipped")}
    return (
        "step" in row
        and _is_numbers(others)
        and isinstance(intervals, dict)
        and all(isinstance(ends, list) and len(ends) == 3 and all(map(_is_known, ends)) for ends in intervals.values())
    )


def _is_end(row: LogRow) -> bool:
    compared = row.get("compare", {})
    if not isinstance(compared, dict) or not isinstance(compared.get("name", ""), str):
        return False
    ratios = {name: value for name, value in compared.items() if name != "name"}
    needed = all(_is_known(row.get(name)) for name in ("pairs", "tokens", "flops"))
    return needed and _is_numbers(ratios) and _is_numbers({k: v for k, v in row.items() if k != "compare"})


def _is_skipped(row: LogRow) -> bool:
    return "step" in row and row.get("reason") in ("loss", "gradient") and _is_step(row.get("num_samples"))


def _is_spike(row: LogRow) -> bool:
    return "step" in row and all(_is_known(row.get(name)) for name in ("loss", "median", "limit"))


def _is_straggler(row: LogRow) -> bool:
    return isinstance(row.get("host"), str) and all(_is_known(row.get(name)) for name in ("rank", "busy_s"))


CHECKS = {
    "start": _is_start,
    "save": _is_save,
    "eval": _is_evaluation,
    "end": _is_end,
    "skipped": _is_skipped,
    "spike": _is_spike,
    "straggler": _is_straggler,
}


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_number(value: Any) -> bool:
    return value is None or _is_known(value)


def _is_known(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) <= LARGEST if isinstance(value, float) else abs(value) <= int(LARGEST)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LAST_STEP
