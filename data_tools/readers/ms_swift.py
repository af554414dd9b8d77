"""ms-swift: `messages` {role, content} that end with the chosen answer, `rejected_response` or `rejected_messages`,
`images`, `rejected_images`. Without a rejected answer the row is for SFT."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.readers.messages import Turn, answer_of, images_in, question_of, turns_of
from data_tools.readers.rows import Place, Row
from data_tools.records import Drop, Record


def fits(row: Row) -> bool:
    return isinstance(row.get("messages"), list)


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    turns = turns_of(row.get("messages"), "messages", "role", "content")
    history, question = question_of(turns[:-1], "messages")
    yield Record(
        id=place.id_of(row),
        source=place.source,
        prompt=question,
        chosen=answer_of(turns[-1:], "messages"),
        rejected=_rejected(row, [*history, ("user", question)]),
        images=images_in(row["messages"], "content"),
        history=history,
    )


def _rejected(row: Row, prompt: list[Turn]) -> str | None:
    if isinstance(row.get("rejected_response"), str):
        return row["rejected_response"]
    if row.get("rejected_messages") is None:
        return None
    turns = turns_of(row["rejected_messages"], "rejected_messages", "role", "content")
    return answer_of(turns, "rejected_messages", prompt)
