"""RLAIF-V: `question`, `chosen`, `rejected` as text, `image` as {bytes, path} (Parquet) or a path; also MMPR's rows.

`ds_name` becomes the source, `image_path` names the image where the struct does not.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.readers.rows import Place, Row, images_of, optional_text, text_of
from data_tools.records import Drop, Record


def fits(row: Row) -> bool:
    return all(isinstance(row.get(field), str) for field in ("question", "chosen", "rejected"))


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    source = str(row.get("ds_name") or place.source)
    yield Record(
        id=f"{source}/{place.number}" if row.get("id") is None else place.id_of(row),
        source=source,
        prompt=text_of(row, "question"),
        chosen=text_of(row, "chosen"),
        rejected=text_of(row, "rejected"),
        images=images_of(row, "image", "images", "image_path"),
        folders=place.folders,
        answer=optional_text(row.get("answer_gt")),
    )
