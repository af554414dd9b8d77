"""Pictures in a folder a class (ImageFolder: DIR/dress/1.jpg, DIR/hat/2.jpg): the class asked for, right and wrong.

The wrong answer is another class, drawn by the picture's path: the same whenever and wherever it is packed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.readers.pictures import MEDIA_PATH
from data_tools.records import Drop, Record

QUESTION = "What does the picture show? Answer with one of: {names}."


def matches(path: Path) -> bool:
    """At least two folders with nothing but pictures in them, and nothing else beside them."""
    if not path.is_dir():
        return False
    classes = _class_folders(path)
    if len(classes) < 2 or any(entry.is_file() for entry in _visible(path)):
        return False
    return all(_holds_pictures(folder) for folder in classes)


def read(path: Path, image_roots: Sequence[Path], image_column: str | None = None) -> Iterator[Record | Drop]:
    folders = _class_folders(path)
    if len(folders) < 2:
        raise ValueError(f"{path} holds {len(folders)} folders; expected one a class, at least two, with its pictures")
    names = [folder.name.replace("_", " ") for folder in folders]
    question = QUESTION.format(names=", ".join(names))
    for folder, name in zip(folders, names, strict=True):
        others = [other for other in names if other != name]
        for picture in sorted(entry.name for entry in _visible(folder)):
            place = f"{folder.name}/{picture}"
            if not MEDIA_PATH.fullmatch(picture):
                yield Drop("not a picture", place, f"{path / place} has the name of no picture")
                continue
            number = int.from_bytes(hashlib.sha256(place.encode("utf-8", "surrogateescape")).digest()[:8], "big")
            yield Record(
                id=place,
                source=path.name,
                prompt=f"<image>\n{question}",
                chosen=name,
                rejected=others[number % len(others)],
                images=(place,),
                folders=(str(path),),
                answer=name,
            )


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _class_folders(path: Path) -> list[Path]:
    return sorted(Path(entry) for entry in _visible(path) if entry.is_dir())


def _holds_pictures(folder: Path) -> bool:
    entries = _visible(folder)
    return bool(entries) and all(entry.is_file() and MEDIA_PATH.fullmatch(entry.name) for entry in entries)
