"""MMPR v1, v1.1, v1.2: a folder with meta.json, which lists sets of JSONL rows and the folder of each set's images.

    {NAME: {"root": FOLDER, "annotation": FILE.jsonl, "data_augment": false, "repeat_time": 1, "length": 9}}

Rows hold `question`, `chosen`, `rejected` and `image` (a path, a list, or nothing), at times `answer_gt`. The paths in
meta.json count from its own folder, or from the one above (as released: MMPR-v1.2/images/...).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.readers import rlaif_v
from data_tools.readers.files import load_json, read_json, require_inside
from data_tools.readers.rows import Place, read_row
from data_tools.records import Drop, Record, shown

MAX_META_BYTES = 10_000_000  # of a file by another name: one that large is a list of rows


def matches(path: Path) -> bool:
    meta = _meta_path(path)
    if meta.name == "meta.json":
        return meta.is_file()
    if not meta.is_file() or meta.suffix != ".json" or meta.stat().st_size > MAX_META_BYTES:
        return False
    try:
        return bool(_read_meta(meta))
    except ValueError:
        return False


def read(path: Path, image_roots: Sequence[Path], image_column: str | None = None) -> Iterator[Record | Drop]:
    meta = _meta_path(path)
    own = [*image_roots, meta.parent]
    bases = [*own, meta.parent.absolute().parent]
    # All entries are looked at before the first row: the 148th is not to end a pack of hours.
    sets = [
        (
            name,
            require_inside(_find(bases, entry["annotation"], name), own, meta),
            *_root_and_repeat_time(meta, name, entry),
        )
        for name, entry in _read_meta(meta).items()
    ]
    for name, annotation, root, repeat_time in sets:
        folders = tuple(str(base / root) for base in bases)
        for number, row in enumerate(read_json(annotation)):
            yield from _read_row(row, Place(name, f"{number:06d}", folders), repeat_time, image_column)


def _meta_path(path: Path) -> Path:
    return path / "meta.json" if path.is_dir() else path


def _read_meta(meta: Path) -> dict[str, dict[str, Any]]:
    try:
        sets = load_json(meta.read_bytes())
    except ValueError as error:
        raise ValueError(f"{meta} is not JSON ({error})") from error
    for name, entry in sets.items() if isinstance(sets, dict) and sets else [("", None)]:
        if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
            raise ValueError(f"{meta}: entry {name!r} has no annotation file; expected {{NAME: {{root, annotation}}}}")
    return sets


def _root_and_repeat_time(meta: Path, name: str, entry: dict[str, Any]) -> tuple[str, float]:
    root, repeat_time = entry.get("root") or "", entry.get("repeat_time", 1)
    if not isinstance(root, str):
        raise ValueError(f"{meta}: root of {name!r} is {shown(repr(root))}, expected the folder of its images as text")
    is_number = isinstance(repeat_time, int | float) and not isinstance(repeat_time, bool)
    if not is_number or not 0 <= repeat_time <= sys.float_info.max:
        value = shown(repr(repeat_time), 500)
        raise ValueError(f"{meta}: repeat_time of {name!r} is {value}, expected a number, 0 or more")
    return root, float(repeat_time)


def _find(bases: Sequence[Path], annotation: str, name: str) -> Path:
    for base in bases:
        if (base / annotation).is_file():
            return base / annotation
    raise ValueError(
        f"meta.json: the annotation {annotation} of {name} is not there (looked in {', '.join(map(str, bases))}); "
        "give the folder that it counts from as --image-root"
    )


def _read_row(row: Any, place: Place, repeat_time: float, image_column: str | None) -> Iterator[Record | Drop]:
    """The pair of a row; its id is its number, since not every set gives ids, and its source that of meta.json."""
    id = place.id_of(None)
    if isinstance(row, dict):
        row = {**row, "id": None, "ds_name": None}
    for record in read_row(rlaif_v, row, place, image_column):
        if isinstance(record, Record):
            yield replace(record, id=id, source=place.source, repeat_time=repeat_time)
        else:
            yield replace(record, id=id)
