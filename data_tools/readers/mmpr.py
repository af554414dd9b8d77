"""MMPR v1, v1.1, v1.2: a folder with meta.json, which lists sets of JSONL rows and the folder of each set's images.

    {NAME: {"root": FOLDER, "annotation": FILE.jsonl, "data_augment": false, "repeat_time": 1, "length": 9}}

Rows hold `question`, `chosen`, `rejected` and `image` (a path, a list, or nothing), at times `answer_gt`. The paths in
meta.json count from its own folder, or from the one above (as released: MMPR-v1.2/images/...).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.records import Drop, Record, as_images

MAX_META_BYTES = 10_000_000  # of a file by another name: one that large is a list of rows
_FIELDS = ("question", "chosen", "rejected")


def matches(path: Path) -> bool:
    meta = _meta_path(path)
    if meta.name == "meta.json":
        return meta.is_file()
    if not meta.is_file() or meta.suffix != ".json" or meta.stat().st_size > MAX_META_BYTES:
        return False
    try:
        return bool(_read_meta(meta))
    except (ValueError, AttributeError):
        return False


def read(path: Path, image_roots: Sequence[Path]) -> Iterator[Record | Drop]:
    meta = _meta_path(path)
    bases = [*image_roots, meta.parent, meta.parent.absolute().parent]
    for name, entry in _read_meta(meta).items():
        folders = tuple(str(base / (entry.get("root") or "")) for base in bases)
        repeat_time = float(entry.get("repeat_time", 1))
        with _find(bases, entry["annotation"], name).open("rb") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    yield _read_row(line, name, f"{name}/{number:06d}", folders, repeat_time)


def _meta_path(path: Path) -> Path:
    return path / "meta.json" if path.is_dir() else path


def _read_meta(meta: Path) -> dict[str, dict[str, Any]]:
    try:
        sets = json.loads(meta.read_bytes())
    except ValueError as error:
        raise ValueError(f"{meta} is not JSON ({error})") from error
    for name, entry in sets.items() if isinstance(sets, dict) and sets else [("", None)]:
        if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
            raise ValueError(f"{meta}: entry {name!r} has no annotation file; expected {{NAME: {{root, annotation}}}}")
    return sets


def _find(bases: Sequence[Path], annotation: str, name: str) -> Path:
    for base in bases:
        if (base / annotation).is_file():
            return base / annotation
    raise ValueError(
        f"meta.json: the annotation {annotation} of {name} is not there (looked in {', '.join(map(str, bases))}); "
        "give the folder that it counts from as --image-root"
    )


def _read_row(line: bytes, source: str, id: str, folders: tuple[str, ...], repeat_time: float) -> Record | Drop:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Drop("malformed row", id, f"not JSON ({error})")
    if not isinstance(row, dict):
        return Drop("malformed row", id, "not an object")
    images = as_images(row.get("image"))
    if images is None or not all(isinstance(row.get(field), str) for field in _FIELDS):
        return Drop("malformed row", id, "expected question, chosen, rejected as text and image as path or list")
    question, chosen, rejected = (row[field] for field in _FIELDS)
    answer = row.get("answer_gt")
    return Record(
        id=id,
        source=source,
        prompt=question,
        chosen=chosen,
        rejected=rejected,
        images=images,
        folders=folders,
        answer=None if answer is None else str(answer),
        repeat_time=repeat_time,
    )
