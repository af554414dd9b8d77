"""TRL's vision formats: `prompt`, `chosen`, `rejected` as lists of {role, content}, `images` as a list.

Content is text or parts. Without `prompt` the messages that chosen and rejected share at their start are the prompt;
with it, chosen and rejected may be whole conversations that begin with its messages.
Without pairs there are `prompt`, `completion`, as messages or as text, and `label`: true where it is desirable.
Our own samples have these forms too, so that packed shards can be packed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_tools.readers.messages import Turn, answer_of, images_in, question_of, same_turns, turns_of
from data_tools.readers.rows import Place, Row, accepted_of, is_label, label_of_answer
from data_tools.records import Drop, Malformed, Record


def fits(row: Row) -> bool:
    return _is_messages(row.get("chosen")) or _is_unpaired(row)


def _is_unpaired(row: Row) -> bool:
    """Other formats, too, have a completion and a label of some kind; here it says yes or no."""
    return row.get("completion") is not None and row.get("prompt") is not None and is_label(row.get("label"))


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    if row.get("chosen") is None and row.get("completion") is not None:
        yield _read_unpaired(row, place)
        return
    chosen = _turns(row.get("chosen"), "chosen", "assistant")
    rejected = None if row.get("rejected") is None else _turns(row["rejected"], "rejected", "assistant")
    if row.get("prompt") is not None:
        prompt = _turns(row["prompt"], "prompt", "user")
        carried = images_in(_messages(row["prompt"]), "content") or images_in(_messages(row["chosen"]), "content")
    elif rejected is not None:
        shared = min(len(chosen), len(rejected)) - 1
        if not same_turns(chosen[:shared], rejected[:shared]):
            raise Malformed("no prompt, and chosen and rejected differ before their last message")
        prompt, carried = chosen[:shared], images_in(row["chosen"], "content")
        chosen, rejected = chosen[shared:], rejected[shared:]
    else:
        prompt, chosen, carried = chosen[:-1], chosen[-1:], images_in(row["chosen"], "content")
    history, question = question_of(prompt, "prompt")
    yield Record(
        id=place.id_of(row),
        source=place.source_of(row),
        prompt=question,
        chosen=answer_of(chosen, "chosen", prompt),
        rejected=None if rejected is None else answer_of(rejected, "rejected", prompt),
        images=carried,
        answer=accepted_of(row),
        history=history,
    )


def _read_unpaired(row: Row, place: Place) -> Record:
    prompt, completion = _turns(row["prompt"], "prompt", "user"), _turns(row["completion"], "completion", "assistant")
    history, question = question_of(prompt, "prompt")
    return Record(
        id=place.id_of(row),
        source=place.source_of(row),
        prompt=question,
        chosen=answer_of(completion, "completion", prompt),
        rejected=None,
        images=images_in(_messages(row["prompt"]), "content"),
        answer=accepted_of(row),
        history=history,
        label=label_of_answer(row),
    )


def _turns(value: Any, field: str, role: str) -> list[Turn]:
    return [(role, value)] if isinstance(value, str) else turns_of(value, field, "role", "content")


def _messages(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
