"""Conditions on samples, as `--where FIELD OP VALUE` says them: `source=docvqa`, `words_chosen>60`, `chosen~(?i)sorry`.

Fields: id, source, prompt, chosen, rejected, answer as text; images, width, height, row, and words_F and letters_F for
F of prompt, chosen, rejected as numbers. Text takes = != and ~ (a regular expression found in it).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pivot.data.samples import Sample, all_completions, answers_of, message_text

ANSWERS = ("chosen", "rejected")  # of a sample with a label one of the two
TEXTS = ("id", "source", "prompt", "chosen", "rejected", "answer")
COUNTS = tuple(f"{unit}_{field}" for unit in ("words", "letters") for field in ("prompt", "chosen", "rejected"))
NUMBERS = ("row", "images", "width", "height", *COUNTS)
EXAMPLES = "words_chosen>60, source=docvqa, chosen~sorry"
HELP = f"only samples for which it holds; repeatable: {EXAMPLES}; fields: {', '.join(TEXTS + NUMBERS)}"
_PATTERN = re.compile(r"\s*([a-z_]+)\s*(!=|>=|<=|=|>|<|~)\s*(.*)", re.DOTALL)
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}


@dataclass(frozen=True)
class Condition:
    field: str
    sign: str
    value: Any  # float, str, or a compiled pattern

    def holds(self, row: int, sample: Sample) -> bool:
        if self.field == "answer":
            return self._holds_for_answer(answers_of(sample) or ("",))
        return self._compare(facts_of(self.field, row, sample))

    def _holds_for_answer(self, answers: tuple[str, ...]) -> bool:
        """One of the right answers meets it; `!=` means that none is equal."""
        return (all if self.sign == "!=" else any)(map(self._compare, answers))

    def _compare(self, fact: Any) -> bool:
        if self.sign == "~":
            return bool(self.value.search(fact))
        return bool(_OPERATORS[self.sign](fact, self.value))


def parse_where(text: str) -> Condition:
    """Raises ValueError when `text` is no condition on a field that samples have."""
    match = _PATTERN.fullmatch(text)
    if not match or match[1] not in TEXTS + NUMBERS:
        raise ValueError(f"--where {text!r}: expected FIELD OP VALUE with FIELD one of {', '.join(TEXTS + NUMBERS)}")
    field, sign, value = match.groups()
    if field in NUMBERS:
        try:
            if sign in _OPERATORS:
                return Condition(field, sign, float(value))
        except ValueError:
            pass
        raise ValueError(f"--where {text!r}: {field} is a number, which takes {' '.join(_OPERATORS)} and a number")
    if sign == "~":
        try:
            return Condition(field, sign, re.compile(value))
        except re.error as error:
            raise ValueError(f"--where {text!r}: {value!r} is no regular expression ({error})") from error
    if sign not in ("=", "!="):
        raise ValueError(f"--where {text!r}: {field} is text, which takes =, != and ~")
    return Condition(field, sign, value)


def facts_of(field: str, row: int, sample: Sample) -> Any:
    """The value of a field; text is '' and a number 0 where the sample has none."""
    if field == "row":
        return row
    if field == "images":
        return len(sample["images"])
    if field in ("width", "height"):
        return max((image[field[0]] for image in sample["images"]), default=0)
    unit, _, name = field.partition("_")
    if name:
        text = text_of(sample, name)
        return len(text.split()) if unit == "words" else len(text)
    return text_of(sample, field)


def text_of(sample: Sample, field: str) -> str:
    if field == "answer":
        return " or ".join(answers_of(sample))
    value = all_completions(sample).get(field) if field in ANSWERS else sample.get(field)
    return message_text(value).lstrip("\n") if isinstance(value, list) else value or ""
