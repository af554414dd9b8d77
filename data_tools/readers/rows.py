"""Rows of JSON, JSON lines, CSV, TSV and Parquet files, and what most formats share in turning one into a Record.

A row format is a module with two functions: `fits(row)` tells it by the names of its fields, `read_row(row, place)`
gives its records. RowReader makes a reader of it, which streams: of a Parquet file one batch is in memory at a time.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_tools.records import Drop, Record, as_images

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
PARQUET_BATCH = 64  # rows; with embedded images some 10 MB
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
Row = dict[str, Any]
Turn = tuple[str, str]  # role, text


class Malformed(Exception):
    """A row that does not keep its format; the text says what was expected."""


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    source: str
    number: str
    folders: tuple[str, ...] = ()

    def id_of(self, row: Any) -> str:
        found = row.get("id") if isinstance(row, dict) else None
        return f"{self.source}/{self.number if found in (None, '') or isinstance(found, list | dict) else found}"


class RowFormat(Protocol):
    def fits(self, row: Row) -> bool: ...
    def read_row(self, row: Row, place: Place) -> Iterator[Record | Drop]: ...


class RowReader:
    """The reader of a row format, for one file or a folder of equal files."""

    def __init__(self, format: RowFormat) -> None:
        self._format = format

    def matches(self, path: Path) -> bool:
        row = peek(path)
        return row is not None and self._format.fits(row)

    def read(self, path: Path, image_roots: Sequence[Path]) -> Iterator[Record | Drop]:
        folder = path if path.is_dir() else path.parent
        folders = tuple(str(folder) for folder in [*image_roots, folder])
        source = path.absolute().name if path.is_dir() else path.stem
        for number, row in enumerate(read_rows(path)):
            yield from read_row(self._format, row, Place(source, f"{number:09d}", folders))


def read_row(format: RowFormat, row: Any, place: Place) -> Iterator[Record | Drop]:
    """The records of one row, or the reason why it has none."""
    try:
        if not isinstance(row, dict):
            raise Malformed("not a JSON object")
        yield from format.read_row(row, place)
    except Malformed as error:
        yield Drop("malformed row", place.id_of(row), str(error))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # What no format foresaw: one row among millions must not end the pack.
        yield Drop("malformed row", place.id_of(row), f"it breaks its format ({type(error).__name__}: {error})")


def peek(path: Path) -> Row | None:
    """The first row, or None where there is none to read."""
    try:
        row = next(read_rows(path), None) if path.is_dir() or path.suffix in SUFFIXES else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def files_of(path: Path) -> list[Path]:
    """The file, or the folder's files of the one kind that it holds, in the order of their names."""
    if not path.is_dir():
        return [path]
    for suffix in reversed(SUFFIXES):  # Parquet first: beside it there may be notes in JSON
        found = sorted(file for file in path.rglob(f"*{suffix}") if file.is_file())
        if found:
            return found
    return []


def read_rows(path: Path) -> Iterator[Any]:
    """Each row as a dict; None for a line that is not JSON. Raises ValueError when a whole file cannot be read."""
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    for file in files_of(path):
        if file.suffix not in readers:
            raise ValueError(f"{file}: expected one of {', '.join(SUFFIXES)}")
        yield from readers[file.suffix](file)


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield parse_line(line)


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


def _json(path: Path) -> Iterator[Any]:
    try:
        rows = load_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, expected a list of rows")
    yield from rows


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


def text_of(row: Row, *names: str) -> str:
    """The first of the fields that is there, as text."""
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    found = {name: type(row.get(name)).__name__ for name in names}
    raise Malformed(f"expected {' or '.join(names)} as text, found {found}")


def optional_text(value: Any) -> str | None:
    return None if value is None else str(value)


def images_of(row: Row, *names: str) -> tuple[Any, ...]:
    """The images in the first of the fields that holds something."""
    value = next((row[name] for name in names if row.get(name)), None)
    images = as_images(value)
    if images is None:
        raise Malformed(f"expected {' or '.join(names)} as a path, {{bytes, path}} or a list, found {str(value)[:80]}")
    return images


def turns_of(messages: Any, field: str, speaker: str = "from", text: str = "value") -> list[Turn]:
    """(role, text) of a conversation; a content list becomes text with `<image>` where its images are."""
    if not isinstance(messages, list):
        raise Malformed(f"expected {field} as a list of messages, found {type(messages).__name__}")
    turns = []
    for message in messages:
        role = SPEAKERS.get(str(message.get(speaker, ""))) if isinstance(message, dict) else None
        if role is None:
            raise Malformed(f"{field} holds {str(message)[:80]}, expected {speaker} to be one of {', '.join(SPEAKERS)}")
        turns.append((role, _content(message.get(text), field)))
    return turns


def _content(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join("<image>" if part.get("type") == "image" else str(part.get("text") or "") for part in content)
    raise Malformed(f"{field}: expected a message's content as text or a list of parts, found {str(content)[:80]}")


def question_of(turns: Sequence[Turn], field: str) -> tuple[tuple[Turn, ...], str]:
    """(history, question): the last message, which must be the user's, and those before."""
    if not turns or turns[-1][0] != "user":
        raise Malformed(f"expected {field} to end with a message of the user, found {[role for role, _ in turns]}")
    return tuple(turns[:-1]), turns[-1][1]


def answer_of(turns: Sequence[Turn], field: str) -> str:
    if len(turns) != 1 or turns[0][0] != "assistant":
        raise Malformed(f"expected {field} to be one message of the assistant, found {[role for role, _ in turns]}")
    return turns[0][1]
