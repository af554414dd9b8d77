"""Whether a generated answer is right: text compared as text, normalised as VQA does. Nothing is ever evaluated.

The rules follow visualqa.org/evaluation.html: lower case, no punctuation, no articles, number words as digits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

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
    text = _PUNCTUATION.sub(lambda found: found[1] or " ", text)
    return " ".join(_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)


def is_right(generated: str, accepted: Sequence[str]) -> bool:
    """`generated` says the same as one of the `accepted` answers."""
    return normalise_answer(generated) in {normalise_answer(answer) for answer in accepted}


def accepted_answers(sample: dict[str, Any]) -> tuple[str, ...]:
    """A sample's `answer`, a string or a list of equally right ones; () when it carries none."""
    found = sample.get("answer")
    answers = [found] if isinstance(found, str) else found or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"sample {sample.get('id')}: answer is {found!r}, expected a string or a list of strings")
    return tuple(answer for answer in answers if normalise_answer(answer))
