"""WebDataset tars of others: members by name, `KEY.json` with a row of any known format and `KEY.jpg`, `.gif`, ...

Members are read as bytes and the row as JSON; nothing is decoded by its extension, so a pickle is never opened. What is
a picture is told by how a member begins, not by its name. A key that holds two JSON members (dotted or repeated names)
is ambiguous and dropped, and so is one with a film or another member that looks like media and cannot be read. A tar
that was cut is an error, since most readers take it for a shorter one, and so is one whose keys are not together.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from data_tools.readers.files import parse_line
from data_tools.readers.media import UNREAD, images_of, natural_key, part_images
from data_tools.readers.pictures import MEDIA_PATH, begins_like_media, is_picture
from data_tools.readers.rows import Place, RowFormat, read_row
from data_tools.records import Drop, ImageBytes, Malformed, Record, shown

BLOCK = 512
MAX_MEMBER_BYTES = 100_000_000
MAX_READ_BYTES = MAX_MEMBER_BYTES  # at once, of a header too
HEAD_BYTES = 64  # enough to tell what a file is


@dataclass
class _Members:
    """What is there under one key."""

    key: str
    rows: list[bytes] = field(default_factory=list)  # JSON
    pictures: dict[str, bytes] = field(default_factory=dict)  # extension -> file
    ambiguous: bool = False  # a row or a picture that is there twice, or under a longer key, or cannot be read
    unread: str = ""  # the extension of a member that looks like media and cannot be read


class TarReader:
    def __init__(self, find_format: Callable[[dict[str, Any]], RowFormat | None]) -> None:
        self._find_format = find_format

    def matches(self, path: Path) -> bool:
        return bool(_tars(path))

    def read(self, path: Path, image_roots: Sequence[Path], image_column: str | None = None) -> Iterator[Record | Drop]:
        if (path / "manifest.json").is_file():
            raise ValueError(f"{path} is packed already; python -m data_tools reshard writes it in other shards")
        number = 0
        for tar in _tars(path):
            for members in _samples(tar):
                place = Place(path.stem, f"{number:09d}", ())
                try:
                    yield from self._read_sample(members, place, image_column)
                except Malformed as error:
                    yield Drop(error.reason, members.key, str(error))
                number += 1

    def _read_sample(self, members: _Members, place: Place, image_column: str | None) -> Iterator[Record | Drop]:
        key = members.key
        if len(members.rows) != 1 or members.ambiguous:
            names = ", ".join([".json"] * len(members.rows) + sorted(members.pictures))
            detail = f"its members are {names or 'not rows'}; expected one .json and pictures, under a key without dots"
            raise Malformed(detail, "ambiguous key")
        row = parse_line(members.rows[0])
        if not isinstance(row, dict):
            raise Malformed(f"{key}.json is not a JSON object")
        format = self._find_format(row)
        if format is None:
            raise Malformed(f"{key}.json has fields of no known format: {', '.join(row)[:100]}")
        row = {"id": key, **row}
        extensions = _chosen(members, row, image_column)
        if not extensions:  # the row itself may hold its pictures; no path in it leads anywhere
            yield from read_row(format, row, place, image_column)
            return
        images = [ImageBytes(members.pictures[name], f"{key}{name}") for name in extensions]
        _, others = part_images(row)
        yield from read_row(format, {**others, "image": images}, place, None if image_column is None else "image")


def _chosen(members: _Members, row: dict[str, Any], image_column: str | None) -> list[str]:
    """The extensions of the pictures to take, in order; [] where the row is to say it. Raises Malformed."""
    if image_column is not None:
        return [f".{image_column}"] if f".{image_column}" in members.pictures else []
    listed = _listed(row)
    if listed:  # as our own samples do; what else is there, such as a mask, is no picture of the conversation
        missing = [name for name in listed if name not in members.pictures]
        if missing:
            raise Malformed(f"{members.key}.json names {missing[0][1:]}, which is no member", "missing image")
        return listed
    if members.unread:
        raise Malformed(
            f"member {members.key}{members.unread} looks like media and cannot be read (no picture, a link, or "
            f"more than {MAX_MEMBER_BYTES:,} bytes); --map image=EXTENSION takes the member of that ending alone, "
            "--map image= none",
            UNREAD,
        )
    extensions = sorted(members.pictures, key=natural_key)
    named = images_of(part_images(row)[0])
    if extensions and named and len(named) != len(extensions):
        raise Malformed(
            f"{members.key}.json names {len(named)} images, and the members {', '.join(extensions)} are there; --map "
            "image=EXTENSION takes the member of that ending alone",
            UNREAD,
        )
    order = [f".{name.rpartition('/')[2].partition('.')[2]}".lower() for name in named if isinstance(name, str)]
    return order if sorted(order) == sorted(extensions) else extensions


def _listed(row: dict[str, Any]) -> list[str]:
    """The extensions that our own samples list in order; others do not say."""
    images = row.get("images")
    entries = images if isinstance(images, list) else []
    return [
        f".{shown(entry['member'])}".lower() for entry in entries if isinstance(entry, dict) and entry.get("member")
    ]


def _tars(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.tar")) or sorted(path.glob("shards/*.tar"))
    return [path] if path.suffix == ".tar" and path.is_file() else []


class _Bounded(io.BufferedReader):
    """A file from which tarfile reads no header of gigabytes, which it would hold at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_READ_BYTES:
            raise ValueError(f"{size} bytes to be read at once, expected at most {MAX_READ_BYTES}")
        return super().read(size)


def _samples(path: Path) -> Iterator[_Members]:
    with _Bounded(io.FileIO(path)) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                entries = _sound_entries(path, file, tar)
                for key, together in groupby(entries, key=lambda entry: _split(entry.name)[0]):
                    members = _Members(key)
                    for entry in together:
                        _add(members, _split(entry.name)[1], entry, tar)
                    if members.rows or members.pictures or members.unread or members.ambiguous:
                        yield members
        except tarfile.TarError as error:
            raise ValueError(f"{path} is damaged ({error}); fetch the file again") from error


def _add(members: _Members, extension: str, entry: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    """Read a member that is the row or a picture; remember one that looks like media and is neither."""
    is_row, has_name_of_media = extension.endswith(".json"), MEDIA_PATH.fullmatch(entry.name) is not None
    content = tar.extractfile(entry) if entry.isfile() and entry.size <= MAX_MEMBER_BYTES else None
    if content is None:
        members.ambiguous |= is_row
        members.unread = extension if has_name_of_media else members.unread
    elif is_row:
        members.ambiguous |= extension != ".json"
        members.rows.append(content.read())
    else:
        head = content.read(HEAD_BYTES)
        if is_picture(head) or (has_name_of_media and not begins_like_media(head)):
            members.ambiguous |= extension in members.pictures
            members.pictures[extension] = head + content.read()
        elif begins_like_media(head):
            members.unread = extension


def _sound_entries(path: Path, file: IO[bytes], tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """The files in the tar, told by its headers alone. Raises ValueError where it is cut or its keys are not together.

    Those whose names begin with a dot are left out: the Mac writes one beside each file.
    """
    size = path.stat().st_size
    entries = [
        entry
        for entry in _bounded_entries(path, tar, size)
        if not entry.isdir() and not entry.name.rpartition("/")[2].startswith(".")
    ]
    end = tar.offset
    file.seek(min(end, size))
    rest = file.read(2 * BLOCK)
    if size < end or len(rest) < BLOCK or rest.strip(b"\0"):
        raise ValueError(f"{path} has no end-of-archive mark at byte {end}: it is cut or damaged; fetch it again")
    seen: set[str] = set()
    for key, _ in groupby(_split(entry.name)[0] for entry in entries):
        if key in seen:
            raise ValueError(
                f"{path}: its members are not sorted, those of key {shown(key)} are not together; unpack it and pack "
                "it again with tar --sort=name, or give each sample a key of its own"
            )
        seen.add(key)
    return entries


def _bounded_entries(path: Path, tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The entries of the tar, `size` bytes long. Raises ValueError where a header lies about how long its entry is."""
    while True:
        place = tar.offset
        try:
            entry = tar.next()
        except (OSError, ValueError, OverflowError, MemoryError) as error:  # a size that no file has
            raise ValueError(
                f"{path} has a header at byte {place} that cannot be read; fetch the file again"
            ) from error
        if entry is None:
            return
        if entry.isreg() and not 0 <= entry.size <= size - entry.offset_data:
            raise ValueError(
                f"{path} is cut or damaged: its member {shown(entry.name)} at byte {entry.offset} is told to have "
                f"{entry.size} bytes, and {max(0, size - entry.offset_data)} follow; fetch the file again"
            )
        yield entry


def _split(name: str) -> tuple[str, str]:
    """(key, extension): the name up to the first dot of its file, and the rest."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return folder + slash + stem, (dot + extension).lower()
