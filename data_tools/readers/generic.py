"""Any rows, with the names of their columns told by `--map field=column`; `a.b.0` reaches into nested values.

Without a mapping: `prompt` (or question, instruction), `chosen`, `rejected`, and SFT rows with `prompt` and `response`
(or answer, caption). With `--map label=COLUMN` each row is one answer that is desirable (true) or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_tools.readers.media import reach
from data_tools.readers.rows import Place, Row, accepted_of, label_of_answer, text_of
from data_tools.records import Drop, Record

IMAGE = "image"  # the one field that is found in the same way for all formats
FIELDS = ("id", "source", "prompt", "chosen", "rejected", IMAGE, "answer", "label")
_USUAL = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "chosen": ("chosen", "response", "completion", "caption", "answer"),
    "rejected": ("rejected",),
}


@dataclass(frozen=True)
class Generic:
    mapping: Mapping[str, str] = field(default_factory=dict)  # field -> column

    def fits(self, row: Row) -> bool:
        fields = self._fields(row)
        return all(isinstance(fields.get(name), str) for name in ("prompt", "chosen"))

    def read_row(self, row: Row, place: Place) -> Iterator[Record | Drop]:
        fields = self._fields(row)
        yield Record(
            id=place.id_of({"id": fields.get("id", row.get("id"))}),
            source=place.source_of(fields),
            prompt=text_of(fields, "prompt"),
            chosen=text_of(fields, "chosen"),
            rejected=text_of(fields, "rejected") if "rejected" in fields and "label" not in fields else None,
            answer=accepted_of(fields),
            label=label_of_answer(fields) if "label" in fields else None,
        )

    def _fields(self, row: Row) -> dict[str, Any]:
        fields = {name: reach(row, column) for name, column in self.mapping.items() if name != IMAGE}
        for name, columns in _USUAL.items():
            column = next((column for column in columns if row.get(column) is not None), None)
            if name not in fields and column is not None:
                fields[name] = row[column]
        return fields


def parse_mapping(texts: list[str]) -> dict[str, str]:
    """{field: column} of `field=column` texts; `image=` says that there are no images."""
    mapping = {}
    for text in texts:
        name, _, column = text.partition("=")
        if name not in FIELDS or not (column or text == f"{IMAGE}="):
            raise ValueError(f"--map {text}: expected FIELD=COLUMN with FIELD one of {', '.join(FIELDS)}")
        mapping[name] = column
    return mapping
