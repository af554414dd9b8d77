"""What a reader gives for each row of its format, before images are looked at."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One row in the common form. Nothing in it is checked beyond its types."""

    id: str  # unique in its source
    source: str  # the data set, or the part of a mixture, that it comes from
    prompt: str  # may hold `<image>` where an image belongs
    chosen: str
    rejected: str
    images: tuple[str, ...] = ()  # paths as the row has them
    folders: tuple[str, ...] = ()  # where to look for them, in this order
    answer: str | None = None
    repeat_time: float = 1.0  # how often a mixture wants the source per epoch

    def canonical(self) -> bytes:
        """What identifies the row, for telling whether an input has changed; folders may move."""
        fields = {name: value for name, value in asdict(self).items() if name != "folders"}
        return json.dumps(fields, sort_keys=True).encode()


@dataclass(frozen=True)
class Drop:
    """A row that does not become a sample."""

    reason: str  # from a short list, for counting
    id: str
    detail: str

    def canonical(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()


def as_images(value: Any) -> tuple[str, ...] | None:
    """The `image` field of a row (a path, a list of paths, or nothing) as a tuple; None when it is something else."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return None
