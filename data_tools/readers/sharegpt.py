"""ShareGPT preference rows (LLaMA-Factory): `conversations`, then `chosen` and `rejected` as {from, value}."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.readers.rows import Place, Row, answer_of, images_of, question_of, turns_of
from data_tools.records import Drop, Record


def fits(row: Row) -> bool:
    return isinstance(row.get("conversations"), list) and isinstance(row.get("chosen"), dict)


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    history, question = question_of(turns_of(row.get("conversations"), "conversations"), "conversations")
    if isinstance(row.get("system"), str) and row["system"]:
        history = (("system", row["system"]), *history)
    yield Record(
        id=place.id_of(row),
        source=place.source,
        prompt=question,
        chosen=answer_of(turns_of([row.get("chosen")], "chosen"), "chosen"),
        rejected=answer_of(turns_of([row.get("rejected")], "rejected"), "rejected"),
        images=images_of(row, "images", "image"),
        folders=place.folders,
        history=history,
    )
