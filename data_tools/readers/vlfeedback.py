"""VLFeedback: `prompt`, `img_path` and several `completions`, each rated; pairs by Silkie's rule.

A completion is {model, response, annotations: {ASPECT: {Rating, Rationale}}}; its score is the mean of its ratings.
Every two completions of different score make a pair; one with a rating that is no number makes none. The `datasets`
library turns the list of completions into a dict of lists, which is read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import isfinite
from typing import Any

from data_tools.readers.rows import Place, Row, text_of
from data_tools.records import Drop, Malformed, Record


def fits(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and isinstance(row.get("completions"), list | dict)


def read_row(row: Row, place: Place) -> Iterator[Record | Drop]:
    id, num_pairs = place.id_of(row), 0
    scored = [(score, text) for text, score in _scored(row.get("completions")) if score is not None]
    for (one, left), (other, right) in combinations(scored, 2):
        if one == other:
            continue
        best, worst = (left, right) if one > other else (right, left)
        yield Record(
            id=f"{id}#{num_pairs}",
            source=place.source,
            prompt=text_of(row, "prompt"),
            chosen=best,
            rejected=worst,
            margin=abs(one - other),
        )
        num_pairs += 1
    if not num_pairs:
        yield Drop("no pair", id, f"{len(scored)} completions with numbers as ratings, none better than another")


def _scored(completions: Any) -> Iterator[tuple[str, float | None]]:
    if isinstance(completions, dict):
        completions = _as_list(completions)
    if not isinstance(completions, list):
        raise Malformed(f"expected completions as a list, found {type(completions).__name__}")
    for completion in completions:
        if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
            raise Malformed("expected each of completions to have a response")
        yield completion["response"], _score(completion.get("annotations"))


def _as_list(columns: dict[str, Any]) -> list[Any]:
    """[{a: x}, ...] of {a: [x, ...]}, down to the ratings."""
    lists = {name: _as_list(value) if isinstance(value, dict) else value for name, value in columns.items()}
    lengths = {len(value) if isinstance(value, list) else None for value in lists.values()}
    if len(lengths) != 1 or None in lengths:
        raise Malformed("completions: expected lists of one length under each of its names")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _score(annotations: Any) -> float | None:
    if not isinstance(annotations, dict) or not annotations:
        return None
    try:
        ratings = [float(aspect["Rating"]) for aspect in annotations.values()]
    except (KeyError, OverflowError, TypeError, ValueError):
        return None
    mean = sum(ratings) / len(ratings)
    return mean if isfinite(mean) else None  # "nan" is a number to Python, and none to JSON
