"""What a reader gives for each row of its format, before images are looked at."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ImageBytes:
    """An image file that the row itself holds."""

    data: bytes = field(repr=False)
    name: str = ""  # what the row calls it


@dataclass(frozen=True)
class Record:
    """One row in the common form. Nothing in it is checked beyond its types."""

    id: str  # unique in its source
    source: str  # the data set, or the part of a mixture, that it comes from
    prompt: str  # the question; may hold `<image>` where an image belongs
    chosen: str
    rejected: str | None  # None: an SFT sample
    images: tuple[str | ImageBytes, ...] = ()  # paths as the row has them, or content
    folders: tuple[str, ...] = ()  # where to look for paths, in this order
    answer: str | None = None
    repeat_time: float = 1.0  # how often a mixture wants the source per epoch
    history: tuple[tuple[str, str], ...] = ()  # (role, text) of the messages before the question
    margin: float | None = None  # by how much the chosen answer was rated above the rejected

    @property
    def kind(self) -> str:
        return "sft" if self.rejected is None else "preference"

    def canonical(self) -> bytes:
        """What identifies the row, for telling whether an input has changed; folders may move."""
        fields = {name: value for name, value in vars(self).items() if name not in ("folders", "images")}
        images = [hashlib.sha256(i.data).hexdigest() if isinstance(i, ImageBytes) else i for i in self.images]
        return json.dumps({**fields, "images": images}, sort_keys=True).encode()


@dataclass(frozen=True)
class Drop:
    """A row that does not become a sample."""

    reason: str  # from a short list, for counting
    id: str
    detail: str

    def canonical(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()


def as_images(value: Any) -> tuple[str | ImageBytes, ...] | None:
    """The images of a row: a path, bytes, {bytes, path}, a list of these or nothing; None for anything else."""
    if value is None or value == "":
        return ()
    if isinstance(value, list | tuple):
        images = [_as_image(item) for item in value]
        return None if None in images else tuple(image for image in images if image is not None)
    image = _as_image(value)
    return None if image is None else (image,)


def _as_image(value: Any) -> str | ImageBytes | None:
    if isinstance(value, str | ImageBytes):
        return value
    if isinstance(value, bytes):
        return ImageBytes(value)
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return ImageBytes(value["bytes"], str(value.get("path") or ""))
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return value["path"]
    return None
