"""What a command says: tables and sentences for people, one JSON document for programs, progress beside either."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.table import Table

from pivot.system.plain import plain, plain_json

REPORT_EVERY_S = 10.0  # where no terminal can rewrite a line
REWRITE_EVERY_S = 0.5


class Output:
    """Results go to stdout, progress and warnings to stderr. With `as_json` stdout holds one document and no more.

    `loudness`: 0 says errors alone, 1 the result and the progress, 2 also details.
    """

    def __init__(self, *, as_json: bool = False, loudness: int = 1) -> None:
        self.as_json, self.loudness = as_json, loudness

    def say(self, text: str) -> None:
        if self.loudness and not self.as_json:
            print(plain(text), flush=True)

    def detail(self, text: str) -> None:
        if self.loudness > 1:
            print(plain(text), file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        print(f"error: {plain(text)}", file=sys.stderr, flush=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        if not self.loudness or self.as_json:
            return
        table = Table(*columns)
        table.columns[-1].overflow = "fold"
        for row in rows:
            table.add_row(*(plain(str(cell)) for cell in row))
        RichConsole(markup=False).print(table)

    def result(self, document: Any) -> None:
        """The whole result, for `--json`; people have seen it in words."""
        if self.as_json:
            print(plain_json(json.dumps(document, ensure_ascii=False, default=str)))

    def progress(self, unit: str) -> Progress:
        return Progress(unit, shows=self.loudness > 0)


class Progress:
    """A line with rate, time to go and a remark: rewritten in a terminal, a new one now and then elsewhere."""

    def __init__(self, unit: str, *, shows: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._unit, self._shows, self._clock = unit, shows, clock
        self._terminal = sys.stderr.isatty()
        self._started = self._last = clock()
        self._first: int | None = None

    def __call__(self, done: int, total: int | None = None, remark: str = "") -> None:
        """`done` of `total` (None: not known). What the first call brings was done before and is not in the rate."""
        now = self._clock()
        if self._first is None:
            self._first = done - 1
        every = REWRITE_EVERY_S if self._terminal else REPORT_EVERY_S
        if self._shows and now - self._last >= every:
            self._last = now
            text = plain(progress_text(done, total, (done - self._first) / (now - self._started), self._unit, remark))
            print(f"\r\x1b[K{text}" if self._terminal else text, file=sys.stderr, end="", flush=True)
            if not self._terminal:
                print(file=sys.stderr)

    def close(self) -> None:
        if self._shows and self._terminal and self._first is not None:
            print("\r\x1b[K", file=sys.stderr, end="", flush=True)


def progress_text(done: int, total: int | None, rate: float, unit: str, remark: str = "") -> str:
    """`1,200 of 5,000 rows, 400 rows/s, 0:09 to go, 3 dropped`."""
    parts = [f"{done:,} of {total:,} {unit}" if total else f"{done:,} {unit}", f"{rate:,.0f} {unit}/s"]
    if total and rate > 0:
        parts.append(f"{clock_text((total - done) / rate)} to go")
    return ", ".join([*parts, *([remark] if remark else [])])


def clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count_text(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def bytes_text(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.1f} {units[0]}"
