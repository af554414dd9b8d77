"""WebDataset tars of others: members by name, `KEY.json` with a row of any known format and `KEY.jpg`, `.png`, `.webp`.

Members are read as bytes and the row as JSON; nothing is decoded by its extension, so a pickle is never opened. A key
that holds two JSON members (dotted or repeated names) is ambiguous and dropped. A tar that was cut is an error: most
readers take it for a shorter one.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.readers.rows import Place, RowFormat, parse_line, read_row
from data_tools.records import Drop, ImageBytes, Record

BLOCK = 512
MAX_MEMBER_BYTES = 100_000_000
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
Members = dict[str, list[bytes]]  # extension -> contents


class TarReader:
    def __init__(self, find_format: Callable[[dict[str, Any]], RowFormat | None]) -> None:
        self._find_format = find_format

    def matches(self, path: Path) -> bool:
        return bool(_tars(path))

    def read(self, path: Path, image_roots: Sequence[Path]) -> Iterator[Record | Drop]:
        if (path / "manifest.json").is_file():
            raise ValueError(f"{path} is packed already; python -m data_tools reshard writes it in other shards")
        number = 0
        for tar in _tars(path):
            for key, members in _samples(tar):
                yield from self._read_sample(key, members, Place(path.stem, f"{number:09d}", ()))
                number += 1

    def _read_sample(self, key: str, members: Members, place: Place) -> Iterator[Record | Drop]:
        texts = members.get(".json", [])
        if len(texts) != 1 or any(len(found) > 1 for found in members.values()):
            found = sum(len(contents) for contents in members.values())
            detail = f"{found} members, {len(texts)} of them .json; expected one, under a key without dots"
            yield Drop("ambiguous key", key, detail)
            return
        row = parse_line(texts[0])
        if not isinstance(row, dict):
            yield Drop("malformed row", key, f"{key}.json is not a JSON object")
            return
        format = self._find_format(row)
        if format is None:
            yield Drop("malformed row", key, f"{key}.json has fields of no known format: {', '.join(row)[:100]}")
            return
        names = _named_images(row) or sorted(name for name in members if name.endswith(IMAGES))
        missing = [name for name in names if name not in members]
        if missing:
            yield Drop("missing image", key, f"{key}.json names {missing[0][1:]}, which is no member")
            return
        images = [ImageBytes(members[name][0], f"{key}{name}") for name in names]
        yield from read_row(format, {"id": key, **row, "image": images or None, "images": None}, place)


def _named_images(row: dict[str, Any]) -> list[str]:
    """The extensions that our own samples list in order; others do not say."""
    images = row.get("images")
    entries = images if isinstance(images, list) else []
    return [f".{entry['member']}".lower() for entry in entries if isinstance(entry, dict) and entry.get("member")]


def _tars(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.tar")) or sorted(path.glob("shards/*.tar"))
    return [path] if path.suffix == ".tar" and path.is_file() else []


def _samples(path: Path) -> Iterator[tuple[str, Members]]:
    """(key, members) of each run of members with the same key, the name up to its first dot."""
    key, members = "", Members()
    for name, data in _members(path):
        folder, _, file = name.rpartition("/")
        stem, dot, extension = file.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if members and this != key:
            yield key, members
            members = {}
        key = this
        members.setdefault((dot + extension).lower(), []).append(data)
    if members:
        yield key, members


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file) as tar:
                for member in tar:
                    wanted = member.name.lower().endswith((".json", *IMAGES))
                    if not member.isfile() or not wanted or member.size > MAX_MEMBER_BYTES:
                        continue
                    content = tar.extractfile(member)
                    data = content.read() if content is not None else b""
                    if len(data) != member.size:
                        raise ValueError(f"{path}: {member.name} is cut; fetch the file again")
                    yield member.name, data
                end = tar.offset
        except tarfile.TarError as error:
            raise ValueError(f"{path} is damaged ({error}); fetch the file again") from error
        file.seek(0, 2)
        size = file.tell()
        file.seek(min(end, size))
        rest = file.read(2 * BLOCK)
        if size < end or len(rest) < BLOCK or rest.strip(b"\0"):
            raise ValueError(f"{path} has no end-of-archive mark at byte {end}: it is cut or damaged; fetch it again")
