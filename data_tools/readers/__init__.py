"""One module per input format, each with two functions and nothing else that others use:

    matches(path) -> bool                                     does `path` look like this format?
    read(path, image_roots) -> Iterator[Record | Drop]        its rows, in the input's order, one by one

A new format is a new module and a line in READERS. The first that matches is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

from data_tools.readers import llava_dpo, mmpr
from data_tools.records import Drop, Record


class Reader(Protocol):
    def matches(self, path: Path) -> bool: ...
    def read(self, path: Path, image_roots: Sequence[Path]) -> Iterator[Record | Drop]: ...


READERS: dict[str, Reader] = {"mmpr": cast(Reader, mmpr), "llava_dpo": cast(Reader, llava_dpo)}


def find_reader(path: Path, format: str) -> tuple[str, Reader]:
    """(name, reader) of `format`, or for `auto` of the first that matches. Raises ValueError when none does."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a folder or file to pack")
    if format != "auto":
        return format, READERS[format]
    for name, reader in READERS.items():
        if reader.matches(path):
            return name, reader
    raise ValueError(f"{path} looks like none of the known formats ({', '.join(READERS)}); force one with --format")
