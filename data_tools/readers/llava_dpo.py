"""LLaVA-NeXT and PIVOT DPO JSON: a list (or JSON lines) of rows with `prompt`, `chosen`, `rejected` and `image`.

`image` is a path, a list, or missing; it counts from an image root or from the file's folder. `<image>` may be missing
from the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.records import Drop, Record, as_images

_FIELDS = ("prompt", "chosen", "rejected")


def matches(path: Path) -> bool:
    if not path.is_file() or path.suffix not in (".json", ".jsonl"):
        return False
    try:
        _, row = next(_rows(path), (0, None))
    except ValueError:
        return False
    return isinstance(row, dict) and all(field in row for field in _FIELDS)


def read(path: Path, image_roots: Sequence[Path]) -> Iterator[Record | Drop]:
    folders = tuple(str(folder) for folder in [*image_roots, path.parent])
    for number, row in _rows(path):
        yield _read_row(row, path.stem, f"{number:09d}", folders)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, row); a line that is not JSON is a None."""
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    yield number, _parse(line)
        return
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, expected a list of rows")
    yield from enumerate(rows)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _read_row(row: Any, source: str, number: str, folders: tuple[str, ...]) -> Record | Drop:
    if not isinstance(row, dict):
        return Drop("malformed row", number, "not a JSON object")
    id = str(row.get("id", number))
    images = as_images(row.get("image"))
    if images is None or not all(isinstance(row.get(field), str) for field in _FIELDS):
        return Drop("malformed row", id, "expected prompt, chosen, rejected as text and image as path or list")
    if row.get("image_rejected"):
        return Drop("rejected image not supported", id, "field image_rejected: both answers must see the same image")
    prompt, chosen, rejected = (row[field] for field in _FIELDS)
    answer = row.get("answer")
    return Record(
        id=f"{source}/{id}",
        source=source,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        images=images,
        folders=folders,
        answer=None if answer is None else str(answer),
    )
