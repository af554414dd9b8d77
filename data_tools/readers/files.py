"""Rows of JSON, JSON lines, CSV, TSV and Parquet files, one by one: of a Parquet file one batch is in memory at a time.

A file of JSON may hold one array or a row a line, whichever its name says; how its text begins decides.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
PARQUET_BATCH = 64  # rows; with embedded images some 10 MB
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def files_of(path: Path) -> list[Path]:
    """The file, or the folder's files of the one kind that it holds, in the order of their names."""
    if not path.is_dir():
        return [path]
    for suffix in reversed(SUFFIXES):  # Parquet first: beside it there may be notes in JSON
        files = sorted(file for file in path.rglob(f"*{suffix}") if file.is_file())
        if files:
            return files
    return []


def read_rows(path: Path) -> Iterator[Any]:
    """Each row as a dict; None for a line that is not JSON. Raises ValueError when a whole file cannot be read."""
    readers = {".json": read_json, ".jsonl": read_json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    for file in files_of(path):
        if file.suffix not in readers:
            raise ValueError(f"{file}: expected one of {', '.join(SUFFIXES)}")
        yield from readers[file.suffix](file)


def require_inside(file: Path, roots: Sequence[Path], named_in: Path) -> Path:
    """`file`, which the file `named_in` of somebody else's set names. ValueError where it lies below none of `roots`:
    what is written there must not choose which other files of this machine are packed."""
    place = Path(os.path.abspath(file))  # links inside the set are followed: a hub's cache is made of them
    if any(place.is_relative_to(os.path.abspath(root)) for root in roots):
        return file
    raise ValueError(
        f"{named_in} names {place}, which lies outside of its folder; if that is meant, admit it with --image-root "
        f"{place.parent}"
    )


def peek(path: Path) -> dict[str, Any] | None:
    """The first row, or None where there is none to read."""
    try:
        row = next(read_rows(path), None) if path.is_dir() or path.suffix in SUFFIXES else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_json(path: Path) -> Iterator[Any]:
    """The rows of an array or of lines; None for a line that is not JSON."""
    if _has_lines(path):
        with path.open("rb") as lines:
            yield from (parse_line(line) for line in lines if line.strip())
        return
    try:
        rows = load_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, expected a list of rows, or a row a line")
    yield from rows


def _has_lines(path: Path) -> bool:
    """Whether each line is a row of its own. The name decides only where a first line could begin either form."""
    with path.open("rb") as file:
        first, second = (*islice((line for line in file if line.strip()), 2), b"", b"")[:2]
    if first.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"[":
        return bool(second) and path.suffix == ".jsonl" and parse_line(first) is not None
    return path.suffix == ".jsonl" or isinstance(parse_line(first), dict)


def parse_line(line: bytes) -> Any:
    try:
        return load_json(line)
    except ValueError:
        return None


def load_json(text: str | bytes) -> Any:
    """Raises ValueError, also for what is nested deeper than Python's parser goes."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit(100_000_000)
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", restkey="")
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not {path.suffix[1:].upper()} in UTF-8 ({error})") from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error}); fetch it again") from error
