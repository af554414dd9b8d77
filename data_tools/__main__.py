"""python -m data_tools COMMAND: pack a data set into shards, look at one, check one.

Exit code 0: done; 1: the data is not good enough (too many rows dropped, damage found); 2: the command is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_tools.pack import PackOptions, PackResult, Tally, pack
from data_tools.readers import READERS
from data_tools.validate import describe, validate

REPORT_EVERY_S = 10.0


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("pack", help="turn a data set into shards; run again, it resumes")
    command.set_defaults(run=_run_pack)
    command.add_argument("source", type=Path, metavar="SRC", help="MMPR folder or meta.json; LLaVA DPO JSON or JSONL")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--image-root", type=Path, action="append", default=[], help="where image paths count from")
    command.add_argument("--allow-root", type=Path, action="append", default=[], help="links may lead below it")
    command.add_argument("--name", help="of the data set; by default that of SRC")
    command.add_argument("--format", choices=["auto", *READERS], default="auto")
    command.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode")
    command.add_argument("--max-drop", type=float, default=0.01, help="largest share of rows to drop (%(default)s)")
    command = commands.add_parser("info", help="what a packed data set holds")
    command.set_defaults(run=_run_info)
    command.add_argument("folder", type=Path, metavar="DIR")
    command = commands.add_parser("validate", help="read and decode everything once")
    command.set_defaults(run=_run_validate)
    command.add_argument("folder", type=Path, metavar="DIR")
    return parser


def _run_pack(options: argparse.Namespace) -> int:
    reporter = _Reporter()
    result = pack(
        PackOptions(
            source=options.source,
            out=options.out,
            name=options.name,
            format=options.format,
            image_roots=tuple(options.image_root),
            allow_roots=tuple(options.allow_root),
            workers=options.workers,
            max_drop=options.max_drop,
        ),
        reporter,
    )
    _print_result(result)
    if result.complete:
        print(f"{options.out}: {result.num_samples} samples in {len(result.shards)} shards")
        return 0
    print(
        f"error: {result.tally.num_dropped} of {result.tally.rows} rows were dropped ({result.tally.drop_ratio:.1%}), "
        f"more than --max-drop {options.max_drop:g}; no manifest was written. Mend the input and choose another --out, "
        "or run again with a larger --max-drop: it resumes",
        file=sys.stderr,
    )
    return 1


class _Reporter:
    """A line with rate and drops: rewritten in a terminal, a new one now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._started = self._last = time.monotonic()
        self._first_row: int | None = None

    def __call__(self, tally: Tally) -> None:
        now = time.monotonic()
        if self._first_row is None:
            self._first_row = tally.rows - 1
        if now - self._last >= (0.5 if self._terminal else REPORT_EVERY_S):
            self._last = now
            rate = (tally.rows - self._first_row) / (now - self._started)
            text = f"{tally.rows} rows, {rate:.0f} rows/s, {tally.num_dropped} dropped"
            print(text, file=sys.stderr, end="\r" if self._terminal else "\n", flush=True)


def _print_result(result: PackResult) -> None:
    tally = result.tally
    table = Table("rows", "count", "examples")
    table.add_row("read", str(tally.rows), "")
    table.add_row("kept", str(result.num_samples), "")
    for reason, count in sorted(tally.drops.items()):
        examples = "\n".join(f"{example['id']}: {example['detail']}" for example in tally.examples[reason])
        table.add_row(reason, str(count), examples)
    Console(markup=False).print(table)


def _run_info(options: argparse.Namespace) -> int:
    table = Table("field", "value")
    table.columns[1].overflow = "fold"
    for field, value in describe(options.folder).items():
        table.add_row(field, value)
    Console(markup=False).print(table)
    return 0


def _run_validate(options: argparse.Namespace) -> int:
    num_samples, problems = validate(options.folder)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{options.folder}: {num_samples} samples read, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
