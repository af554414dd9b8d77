"""ShareGPT preference rows (LLaMA-Factory): `conversations`, then `chosen` and `rejected` as {from, value}.

The answers may also be lists of messages, with those of the conversation at their start.
"""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.readers.messages import Turn, answer_of, images_in, question_of, turns_of
from data_tools.readers.rows import Place, Row
from data_tools.records import Drop, Record


def fits(row: Row) -> bool:
    return isinstance(row.get("conversations"), list) and isinstance(row.get("chosen"), dict | list)


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    prompt = turns_of(row.get("conversations"), "conversations")
    history, question = question_of(prompt, "conversations")
    if isinstance(row.get("system"), str) and row["system"]:
        history = (("system", row["system"]), *history)
    yield Record(
        id=place.id_of(row),
        source=place.source,
        prompt=question,
        chosen=_answer(row, "chosen", prompt),
        rejected=_answer(row, "rejected", prompt),
        images=images_in(row["conversations"]),
        history=history,
    )


def _answer(row: Row, field: str, prompt: list[Turn]) -> str:
    value = row.get(field)
    return answer_of(turns_of(value if isinstance(value, list) else [value], field), field, prompt)
