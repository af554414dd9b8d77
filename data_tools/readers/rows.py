"""What most formats share in turning a row into a Record.

A row format is a module with two functions: `fits(row)` tells it by the names of its fields, `read_row(row, place)`
gives its records with their texts. The pictures are the same matter in all formats: `read_row` here finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from data_tools.readers.files import peek, read_rows
from data_tools.readers.media import images_of
from data_tools.readers.messages import require_media_of_texts, take_off_prompt
from data_tools.readers.pictures import is_absent
from data_tools.records import Drop, Malformed, Record, shown

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    source: str
    number: str
    folders: tuple[str, ...] = ()

    def id_of(self, row: Any) -> str:
        """By the row's own id where it has one, else by its number. Raises Malformed."""
        return f"{self.source}/{label_of(row, 'id') or self.number}"

    def name_of(self, row: Any) -> str:
        """What a dropped row is called: by its number too where its id is the fault."""
        try:
            return self.id_of(row)
        except Malformed:
            return f"{self.source}/{self.number}"

    def source_of(self, row: Row, field: str = "source") -> str:
        return label_of(row, field) or self.source


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

    def read(self, path: Path, image_roots: Sequence[Path], image_column: str | None = None) -> Iterator[Record | Drop]:
        folder = path if path.is_dir() else path.parent
        folders = tuple(str(folder) for folder in [*image_roots, folder])
        source = path.absolute().name if path.is_dir() else path.stem
        for number, row in enumerate(read_rows(path)):
            yield from read_row(self._format, row, Place(source, f"{number:09d}", folders), image_column)


def read_row(format: RowFormat, row: Any, place: Place, image_column: str | None = None) -> Iterator[Record | Drop]:
    """The records of one row with its pictures, or the reason why it has none.

    A record's own pictures are those that its messages carry.
    """
    try:
        if not isinstance(row, dict):
            raise Malformed("not a JSON object")
        for record in format.read_row(row, place):
            if isinstance(record, Record):
                images = images_of(row, image_column, carried=record.images)
                record = take_off_prompt(replace(record, images=images, folders=place.folders))
                if image_column != "":
                    require_media_of_texts(record)
            yield record
    except Malformed as error:
        yield Drop(error.reason, place.name_of(row), str(error))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # What no format foresaw: one row among millions must not end the pack.
        detail = f"it breaks its format ({type(error).__name__}: {shown(str(error), 200)})"
        yield Drop("malformed row", place.name_of(row), detail)


def text_of(row: Row, *names: str) -> str:
    """The first of the fields that is there, as text."""
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    kinds = {name: type(row.get(name)).__name__ for name in names}
    raise Malformed(f"expected {' or '.join(names)} as text, found {kinds}")


def label_of(row: Any, field: str) -> str | None:
    """The text of a field, or the digits of its whole number; None where nothing is there. Raises Malformed.

    Another value has no spelling of its own: what Python makes of it would name a thing that nobody meant.
    """
    value = row.get(field) if isinstance(row, dict) else None
    if is_absent(value):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Malformed(f"field {field} holds {shown(value)}, expected text or a whole number")
    return str(value)


LABELS = {"true": True, "false": False, "1": True, "0": False}  # as bool, as number, or as a CSV writes them


def is_label(value: Any) -> bool:
    """Whether a value says yes or no."""
    return isinstance(value, bool | int | str) and str(value).lower() in LABELS


def label_of_answer(row: Row, field: str = "label") -> bool:
    """Whether the row's one answer is desirable. Raises Malformed."""
    value = row.get(field)
    if not is_label(value):
        raise Malformed(f"field {field} holds {shown(value)}, expected true (a desirable answer) or false")
    return LABELS[str(value).lower()]


def accepted_of(row: Row, field: str = "answer") -> str | tuple[str, ...] | None:
    """The right answer to a question, or several in a list that are equally right; None where there is none.

    All that is no text is refused: a number could be meant as 3, 3.0 or 3.00, and every generated answer would be
    compared with letters that nobody wrote. Raises Malformed.
    """
    value = row.get(field)
    if isinstance(value, list):
        return tuple(_accepted(one, field) for one in value if not is_absent(one)) or None
    return None if is_absent(value) else _accepted(value, field)


def _accepted(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise Malformed(
            f"field {field} holds {shown(value)}, expected text or a list of equally right texts; write the letters "
            "that are right as text"
        )
    return value
