"""TRL's vision format: `prompt`, `chosen`, `rejected` as lists of {role, content}, `images` as a list.

Content is text or parts. Without `prompt` the messages that chosen and rejected share at their start are the prompt.
Our own samples have this form too, so that packed shards can be packed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_tools.readers.rows import (
    Malformed,
    Place,
    Row,
    Turn,
    answer_of,
    images_of,
    optional_text,
    question_of,
    turns_of,
)
from data_tools.records import Drop, Record


def fits(row: Row) -> bool:
    return _is_messages(row.get("chosen"))


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    chosen = _turns(row.get("chosen"), "chosen", "assistant")
    rejected = None if row.get("rejected") is None else _turns(row["rejected"], "rejected", "assistant")
    if row.get("prompt") is not None:
        prompt = _turns(row["prompt"], "prompt", "user")
    elif rejected is not None:
        shared = min(len(chosen), len(rejected)) - 1
        if chosen[:shared] != rejected[:shared]:
            raise Malformed("no prompt, and chosen and rejected differ before their last message")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        prompt, chosen = chosen[:-1], chosen[-1:]
    history, question = question_of(prompt, "prompt")
    yield Record(
        id=place.id_of(row),
        source=str(row.get("source") or place.source),
        prompt=question,
        chosen=answer_of(chosen, "chosen"),
        rejected=None if rejected is None else answer_of(rejected, "rejected"),
        images=images_of(row, "images", "image"),
        folders=place.folders,
        answer=optional_text(row.get("answer")),
        history=history,
    )


def _turns(value: Any, field: str, role: str) -> list[Turn]:
    return [(role, value)] if isinstance(value, str) else turns_of(value, field, "role", "content")


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
