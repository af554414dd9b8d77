"""RLHF-V: `text` is a JSON string {question, chosen, rejected}; `image` is {bytes, path} or a path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from data_tools.readers import rlaif_v
from data_tools.readers.files import load_json
from data_tools.readers.media import images_of
from data_tools.readers.rows import Place, Row
from data_tools.records import Drop, Malformed, Record


def fits(row: Row) -> bool:
    try:
        inner = _inner(row)
    except Malformed:
        return False
    return rlaif_v.fits(inner)


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    inner = _inner(row)
    for record in rlaif_v.read_row({**row, **inner}, place):
        yield replace(record, images=images_of(inner)) if isinstance(record, Record) else record


def _inner(row: Row) -> Row:
    text = row.get("text")
    try:
        inner = load_json(text) if isinstance(text, str) else text
    except ValueError as error:
        raise Malformed(f"field text is not JSON ({error})") from error
    if not isinstance(inner, dict):
        raise Malformed("expected field text to hold {question, chosen, rejected}")
    return inner
