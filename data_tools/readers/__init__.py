"""One module per input format. A reader has two functions and nothing else that others use:

    matches(path) -> bool                                                does `path` look like this format?
    read(path, image_roots, image_column) -> Iterator[Record | Drop]     its rows, in the input's order, one by one

Formats whose rows can stand in JSON, CSV, Parquet or a tar alike are told by their fields and share rows.RowReader.
A new format is a new module and a line below. The first that matches is taken, so the pickier come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from data_tools.readers import (
    classes,
    llava,
    llava_dpo,
    mmpr,
    ms_swift,
    onevision,
    povid,
    rlaif_v,
    rlhf_v,
    sharegpt,
    trl,
    vlfeedback,
)
from data_tools.readers.files import peek
from data_tools.readers.generic import IMAGE, Generic
from data_tools.readers.rows import RowFormat, RowReader
from data_tools.readers.tars import TarReader
from data_tools.records import Drop, Record


class Reader(Protocol):
    def matches(self, path: Path) -> bool: ...
    def read(
        self, path: Path, image_roots: Sequence[Path], image_column: str | None = None
    ) -> Iterator[Record | Drop]: ...


ROW_FORMATS: dict[str, RowFormat] = {
    "trl": trl,
    "vlfeedback": vlfeedback,
    "povid": povid,
    "sharegpt": sharegpt,
    "llava": llava,
    "ms_swift": ms_swift,
    "rlhf_v": rlhf_v,
    "rlaif_v": rlaif_v,
    "llava_dpo": llava_dpo,
    "generic": Generic(),
}


def find_row_format(row: dict[str, Any]) -> RowFormat | None:
    return next((format for format in ROW_FORMATS.values() if format.fits(row)), None)


READERS: dict[str, Reader] = {
    "mmpr": mmpr,
    "llava_onevision": onevision,
    "classes": classes,
    "webdataset": TarReader(find_row_format),
    **{name: RowReader(format) for name, format in ROW_FORMATS.items()},
}


def find_reader(path: Path, format: str = "auto", mapping: Mapping[str, str] | None = None) -> tuple[str, Reader]:
    """(name, reader) of `format`, or for `auto` of the first that matches.

    A mapping of more than the images means the generic one. Raises ValueError when none does.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a folder or file to pack")
    others = [name for name in mapping or {} if name != IMAGE]
    if mapping and (others or format == "generic"):
        if format not in ("auto", "generic"):
            raise ValueError(
                f"--map {others[0]}=... names a column of the generic format, and --format is {format}; leave one of "
                "them out"
            )
        return "generic", RowReader(Generic(mapping))
    if format != "auto":
        return format, READERS[format]
    for name, reader in READERS.items():
        if reader.matches(path):
            return name, reader
    row = peek(path)
    fields = f"; its rows have the fields {', '.join(map(str, row))[:200]}" if row else ""
    raise ValueError(
        f"{path} looks like none of the known formats ({', '.join(READERS)}){fields}; force one with --format, or name "
        "the columns with --map prompt=COLUMN --map chosen=COLUMN --map rejected=COLUMN --map image=COLUMN"
    )
