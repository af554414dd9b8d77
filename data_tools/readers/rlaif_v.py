"""RLAIF-V: `question`, `chosen`, `rejected` as text, `image` as {bytes, path} (Parquet) or a path; also MMPR's rows.

`ds_name` becomes the source.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.readers.rows import Place, Row, accepted_of, label_of, text_of
from data_tools.records import Drop, Record


def fits(row: Row) -> bool:
    return all(isinstance(row.get(field), str) for field in ("question", "chosen", "rejected"))


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    source = place.source_of(row, "ds_name")
    yield Record(
        id=f"{source}/{place.number}" if label_of(row, "id") is None else place.id_of(row),
        source=source,
        prompt=text_of(row, "question"),
        chosen=text_of(row, "chosen"),
        rejected=text_of(row, "rejected"),
        answer=accepted_of(row, "answer_gt"),
    )
