"""LLaVA-NeXT and PIVOT DPO: rows with `prompt`, `chosen`, `rejected` as text and `image` (or `images`).

An image is a path, a list, or missing. `<image>` may be missing from the prompt. Also TRL's rows with plain strings.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.readers.rows import Place, Row, accepted_of, text_of
from data_tools.records import Drop, Record


def fits(row: Row) -> bool:
    return all(isinstance(row.get(field), str) for field in ("prompt", "chosen", "rejected"))


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    yield Record(
        id=place.id_of(row),
        source=place.source,
        prompt=text_of(row, "prompt"),
        chosen=text_of(row, "chosen"),
        rejected=text_of(row, "rejected"),
        answer=accepted_of(row),
    )
