"""LLaVA conversations (LLaVA-Pretrain, LLaVA-NeXT, Cambrian, LLaVA-OneVision): `id`, `image`, `conversations`.

These are for SFT. A record ends with the last answer; `pack --turns each` makes one of every answer. Ids may contain
`/`; `<image>` may be missing or repeated; there are rows without an image.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.readers.messages import answer_of, images_in, question_of, turns_of
from data_tools.readers.rows import Place, Row
from data_tools.records import Drop, Record


def fits(row: Row) -> bool:
    return isinstance(row.get("conversations"), list)


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    turns = turns_of(row.get("conversations"), "conversations")
    while turns and turns[-1][0] != "assistant":  # a question that nobody answered
        turns.pop()
    history, question = question_of(turns[:-1], "conversations")
    yield Record(
        id=place.id_of(row),
        source=place.source_of(row, "data_source"),
        prompt=question,
        chosen=answer_of(turns[-1:], "conversations"),
        rejected=None,
        images=images_in(row["conversations"]),
        history=history,
    )
