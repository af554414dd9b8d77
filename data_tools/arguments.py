"""Types of command-line options: argparse names the option, these say what was expected and what was found."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of a whole number from `least` to `most`."""
    expected = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise ArgumentTypeError(f"expected a whole number {expected}, found {text!r}")
        return value

    return parse


count = whole_number(1)
seed = whole_number(0, 2**64 - 1)  # it is mixed as 64 bits


def share(text: str) -> tuple[int, int]:
    """(I, N) of `I/N`: share I of N, counted from 1."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ArgumentTypeError(f"expected I/N with I from 1 to N, found {text!r}")
    return int(number), int(total)
