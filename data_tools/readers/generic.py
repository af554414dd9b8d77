"""Any rows, with the names of their columns told by `--map field=column`; `a.b.0` reaches into nested values.

Without a mapping: `prompt` (or question, instruction), `chosen`, `rejected`, `image` (or images), and SFT rows with
`prompt` and `response` (or answer, caption).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_tools.readers.rows import Malformed, Place, Row, images_of, optional_text, text_of
from data_tools.records import Drop, Record

FIELDS = ("id", "source", "prompt", "chosen", "rejected", "image", "answer")
_USUAL = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "chosen": ("chosen", "response", "completion", "caption", "answer"),
    "rejected": ("rejected",),
    "image": ("image", "images", "image_path", "img_path"),
}


@dataclass(frozen=True)
class Generic:
    mapping: Mapping[str, str] = field(default_factory=dict)  # field -> column

    def fits(self, row: Row) -> bool:
        found = self._fields(row)
        return all(isinstance(found.get(name), str) for name in ("prompt", "chosen"))

    def read_row(self, row: Row, place: Place) -> Iterator[Record | Drop]:
        found = self._fields(row)
        yield Record(
            id=place.id_of({"id": found.get("id", row.get("id"))}),
            source=str(found.get("source") or place.source),
            prompt=text_of(found, "prompt"),
            chosen=text_of(found, "chosen"),
            rejected=text_of(found, "rejected") if "rejected" in found else None,
            images=images_of(found, "image"),
            folders=place.folders,
            answer=optional_text(found.get("answer")),
        )

    def _fields(self, row: Row) -> dict[str, Any]:
        found = {name: _reach(row, column) for name, column in self.mapping.items()}
        for name, columns in _USUAL.items():
            column = next((column for column in columns if row.get(column) is not None), None)
            if name not in found and column is not None:
                found[name] = row[column]
        return found


def parse_mapping(texts: list[str]) -> dict[str, str]:
    """{field: column} of `field=column` texts."""
    mapping = {}
    for text in texts:
        name, _, column = text.partition("=")
        if name not in FIELDS or not column:
            raise ValueError(f"--map {text}: expected FIELD=COLUMN with FIELD one of {', '.join(FIELDS)}")
        mapping[name] = column
    return mapping


def _reach(row: Row, column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for step in column.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.lstrip("-").isdigit() and -len(value) <= int(step) < len(value):
            value = value[int(step)]
        else:
            raise Malformed(f"there is no column {column}; the row has {', '.join(map(str, row))[:200]}")
    return value
