"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


def write_atomically(path: Path, content: str | bytes) -> None:
    """Readers see the old content or the new one, also after a power cut. The folder is made.

    A failure leaves nothing behind, least of all on a disk that it filled.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


UNFINISHED = ".part"  # in a folder that is being written


@contextlib.contextmanager
def filling(folder: Path, last: Collection[str]) -> Iterator[Path]:
    """A place for the files that are to lie in `folder`, which is made; at the end, flushed, they move there.

    `last` names the files by which readers know `folder`. Those of before go first and the new ones come behind all
    others, so that nobody takes a half-written folder for a whole one. Other files that lie there stay. What a killed
    process leaves is in `folder`/.part, and the next one clears it away; a failure leaves `folder` as it was.
    """
    part = folder / UNFINISHED
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        names = sorted(path.relative_to(part) for path in part.rglob("*") if path.is_file())
        for name in names:
            _sync(part / name)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    known_by = [name for name in names if name.name in last]
    for name in {*known_by, *map(Path, last)}:
        (folder / name).unlink(missing_ok=True)
    _move([name for name in names if name not in known_by], part, folder)
    _move(sorted(known_by, key=lambda name: -len(name.parts)), part, folder)  # the folder's own behind its folders'
    shutil.rmtree(part)


def _move(names: list[Path], part: Path, folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part / name, folder / name)
    for changed in {(folder / name).parent for name in names}:
        sync_folder(changed)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; {} where there is no file, or something else in it."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a file, with its line break, and the JSON object in it, or None; nothing where there is no file.

    One rule for all who read what a run appends to: a line counts when it is a JSON object, and any other is None and
    never an error. Kills and full disks cut lines short; editors and other programs leave lines of their own. NaN is no
    JSON: a run writes null. A last line without its line break may be cut; who writes behind it looks at the bytes.
    """
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            value = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            value = None
        yield line, value if isinstance(value, dict) else None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def write_array(path: Path, array: np.ndarray) -> None:
    """As .npy, without pickle."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_atomically(path, content.getvalue())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
