"""Whether a generated answer is right: text compared as text, normalised as VQA does. Nothing is ever evaluated.

The rules follow visualqa.org/evaluation.html: lower case, no punctuation, no articles, number words as digits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pivot.data.samples import answers_of

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_APOSTROPHES = re.compile(r"['’]")
# Points and colons between digits are part of a number or a time.
_PUNCTUATION = re.compile(r"(?<=\d)([.:])(?=\d)|[^\w\s]|_")


def normalise_answer(text: str) -> str:
    """`The  two red Circles.` -> `2 red circles`."""
    text = _APOSTROPHES.sub("", _THOUSANDS.sub("", text.lower()))
    text = _PUNCTUATION.sub(lambda match: match[1] or " ", text)
    return " ".join(_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)


def is_right(generated: str, accepted: Sequence[str]) -> bool:
    """`generated` says the same as one of the `accepted` answers."""
    return normalise_answer(generated) in {normalise_answer(answer) for answer in accepted}


def accepted_answers(sample: dict[str, Any]) -> tuple[str, ...]:
    """The sample's right answers that say anything once they are normalised; () when it carries none."""
    return tuple(answer for answer in answers_of(sample) if normalise_answer(answer))
