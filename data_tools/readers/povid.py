"""POVID: `id`, `image`, `conversations` [human, gpt] (preferred) and `rejected_conversations` [human, gpt]."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.readers.messages import answer_of, images_in, question_of, same_turns, turns_of
from data_tools.readers.rows import Place, Row
from data_tools.records import Drop, Malformed, Record


def fits(row: Row) -> bool:
    return isinstance(row.get("conversations"), list) and isinstance(row.get("rejected_conversations"), list)


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    chosen = turns_of(row.get("conversations"), "conversations")
    rejected = turns_of(row.get("rejected_conversations"), "rejected_conversations")
    if not same_turns(chosen[:-1], rejected[:-1]):
        raise Malformed("conversations and rejected_conversations ask different questions")
    history, question = question_of(chosen[:-1], "conversations")
    yield Record(
        id=place.id_of(row),
        source=place.source,
        prompt=question,
        chosen=answer_of(chosen[-1:], "conversations"),
        rejected=answer_of(rejected[-1:], "rejected_conversations"),
        images=images_in(row["conversations"]),
        history=history,
    )
