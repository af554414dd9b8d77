"""What counts as the same answer."""

from __future__ import annotations

import pytest

from pivot.evaluate.answers import accepted_answers, is_right, normalise_answer


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  two red Circles.", "2 red circles"),
        ("an apple", "apple"),
        ("Yes!", "yes"),
        ("1,000 people", "1000 people"),
        ("3.5 m", "3.5 m"),
        ("10:30", "10:30"),
        ("It's blue-green.", "its blue green"),
        ("none", "0"),
        ("top_left", "top left"),
        ("Überall", "überall"),
        ("...", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected
    assert normalise_answer(expected) == expected


def test_is_right() -> None:
    assert is_right("A red cup.", ["blue", "red cup"])
    assert not is_right("red", ["red cup"])
    assert not is_right("not red", ["red"])
    assert not is_right("", ["red"])


def test_predictions_are_text_and_nothing_else() -> None:
    """Neither a formula nor a call is worth more than its letters."""
    assert not is_right("__import__('os').system('true') or 4", ["4"])
    assert not is_right("2+2", ["4"])
    assert not is_right("['4']*1", ["4"])


def test_accepted_answers() -> None:
    assert accepted_answers({"answer": "red"}) == ("red",)
    assert accepted_answers({"answer": ["red", "crimson", "..."]}) == ("red", "crimson")
    assert accepted_answers({"answer": None}) == accepted_answers({}) == accepted_answers({"answer": ""}) == ()
    with pytest.raises(ValueError, match="expected a string or a list of strings"):
        accepted_answers({"id": "x", "answer": 4})
