"""Which fields of a row hold its pictures, whatever the format; and that nothing which looks like media stays unread.

A picture that is passed over teaches to answer without looking, and no number of a run shows it. So a row whose
pictures are in doubt is dropped with a reason, and `--map image=COLUMN` ends the doubt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from data_tools.readers.pictures import MEDIA_PATH, REMOTE, as_images, is_absent, is_embedded_media
from data_tools.records import ImageBytes, Malformed, shown

Image = str | ImageBytes
Row = dict[str, Any]
UNREAD = "unread media"

_PICTURES = frozenset({"image", "img", "picture", "pic", "photo", "screenshot", "pixel"})  # also in the plural
_PICTURES |= {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
_FILMS = frozenset({"video", "audio", "sound", "frame", "clip", "mp"})  # mp4, mp3
# Words that may stand beside these in the name of a field which holds the thing itself. `image_id`, `image_caption` and
# `image_source` speak about a picture: what they hold must look like one.
_BESIDE = frozenset({"path", "file", "filename", "name", "url", "uri", "byte", "data", "base", "b", "list", "input"})
_BESIDE |= {"value", "raw", "original", "decoded", "local", "relative", "full", "main"}
_ANSWERS = frozenset({"chosen", "rejected"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_USUAL = ("image", "images")  # taken before others where several fields name the same pictures
# Fields that formats read as text, in which a file's name is only a word.
_TEXTS = frozenset({"id", "source", "kind", "system", "text", "prompt", "question", "instruction", "query", "chosen"})
_TEXTS |= {"rejected", "response", "completion", "caption", "answer", "answers", "answer_gt", "conversations"}
_TEXTS |= {"messages", "rejected_response", "rejected_messages", "rejected_conversations", "completions", "models"}
_TEXTS |= {"ds_name", "data_source", "origin_dataset", "origin_split"}
_DEPTH = 8  # of values in values that are looked through


def images_of(row: Row, column: str | None = None, *, carried: Sequence[Image] = ()) -> tuple[Image, ...]:
    """The pictures of a row in order; `carried` are those in its messages.

    `column` is what the user named: only that is read then, and with '' none is. Raises Malformed where a field holds
    what is no picture, where fields hold different ones, and where media would stay unread.
    """
    if column is not None:
        return _read(reach(row, column), column) if column else ()
    fields = {name: value for name, value in row.items() if isinstance(name, str) and not is_absent(value)}
    images = _agreed(_series(fields), tuple(carried))
    for name, value in fields.items():
        _require_read(name, value, images)
    return images


def part_images(row: Row) -> tuple[Row, Row]:
    """(the fields that pictures are read from, all others)."""
    pictures = {name: value for name, value in row.items() if _kind_of(name) == "picture"}
    return pictures, {name: value for name, value in row.items() if name not in pictures}


def reach(row: Row, column: str) -> Any:
    """The value of a column; `a.b.0` reaches into nested values."""
    if column in row:
        return row[column]
    value: Any = row
    for step in column.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.lstrip("-").isdigit() and -len(value) <= int(step) < len(value):
            value = value[int(step)]
        else:
            raise Malformed(f"there is no column {column}; the row has {', '.join(map(str, row))[:200]}")
    return value


def natural_key(name: str) -> list[tuple[int, str]]:
    """For sorting names by the numbers in them: img2 before img10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


@lru_cache(maxsize=1024)  # the rows of a set have the same names
def _kind_of(name: str) -> str | None:
    """What a field holds by its name: a picture, a picture of one answer, a film (or a sound), or None."""
    words = {word.lower().removesuffix("s") for word in _WORD.findall(name)}
    things = words - _BESIDE
    if not things:
        return None
    if things <= _PICTURES:
        return "picture"
    if things & _PICTURES and things <= _PICTURES | _ANSWERS:
        return "answer's picture"
    return "film" if things & _FILMS and things <= _PICTURES | _FILMS else None


def _series(fields: Row) -> dict[str, tuple[Image, ...]]:
    """name -> pictures; image_1, image_2, ... are one series under the name of its first."""
    series: dict[str, list[str]] = {}
    for name in fields:
        if _kind_of(name) == "picture":
            series.setdefault(re.sub(r"\d+", "", name).rstrip("_-. "), []).append(name)
    ordered = [sorted(names, key=natural_key) for names in series.values()]
    ordered.sort(key=lambda names: _USUAL.index(names[0]) if names[0] in _USUAL else len(_USUAL))
    return {names[0]: tuple(image for name in names for image in _read(fields[name], name)) for names in ordered}


def _read(value: Any, name: str) -> tuple[Image, ...]:
    images = as_images(value)
    if images is None:
        raise Malformed(
            f"expected {name} as a path, bytes, {{bytes, path}} or a list, found {shown(value)}; name another column "
            "with --map image=COLUMN, or say with --map image= that there are no pictures"
        )
    return images


def _agreed(columns: dict[str, tuple[Image, ...]], carried: tuple[Image, ...]) -> tuple[Image, ...]:
    if carried:
        columns = {**columns, "the messages": carried}
    if not columns:
        return ()
    first, images = next(iter(columns.items()))
    for name, others in columns.items():
        if not _same(images, others):
            raise Malformed(
                f"{first} and {name} hold different pictures; say which with --map image={first} (or =ANOTHER)", UNREAD
            )
    return images


def _same(some: Sequence[Image], others: Sequence[Image]) -> bool:
    return len(some) == len(others) and all(map(_may_be_same, some, others))


def _may_be_same(one: Image, other: Image) -> bool:
    """Content is compared with content and path with path: of a file and a name, or a URL, it cannot be told."""
    if isinstance(one, ImageBytes) and isinstance(other, ImageBytes):
        return one.data == other.data
    if isinstance(one, str) and isinstance(other, str) and not REMOTE.match(one) and not REMOTE.match(other):
        return os.path.basename(one) == os.path.basename(other)
    return True


def _require_read(name: str, value: Any, images: tuple[Image, ...]) -> None:
    kind = _kind_of(name)
    if kind == "answer's picture" and not _same(as_images(value) or (), images):
        raise Malformed(f"field {name}: both answers must see the same image", "rejected image not supported")
    if kind == "film" and isinstance(value, str | bytes | list | dict):
        raise Malformed(_unread(name, value, "COLUMN"), UNREAD)
    if kind in ("picture", "answer's picture") or name in _TEXTS:
        return
    for inner in _leaves(value):
        # Beside pictures that were read, a name tells where they come from; a whole file is one more.
        if is_embedded_media(inner) or (not images and _names_media(inner)):
            raise Malformed(_unread(name, inner, name), UNREAD)


def _names_media(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    return MEDIA_PATH.fullmatch(value.partition("?")[0] if REMOTE.match(value) else value) is not None


def _unread(name: str, value: Any, column: str) -> str:
    return (
        f"field {name} holds {shown(value, 40)}, which is not read; --map image={column} says where the row's pictures "
        "are, --map image= that it has none"
    )


def _leaves(value: Any) -> Iterator[Any]:
    level = [value]
    for _ in range(_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict | list | tuple):
                inner += one.values() if isinstance(one, dict) else one
            else:
                yield one
        level = inner
