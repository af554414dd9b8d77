"""What a reader gives for each row of its format, before images are looked at."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pivot.data.samples import UNPAIRED

SHOWN_LETTERS = 80  # of a value that a message repeats: it may be a whole file in base64


class Malformed(Exception):
    """Ends the reading of a row: the detail says what was expected, `reason` is what it counts as."""

    def __init__(self, detail: str, reason: str = "malformed row") -> None:
        super().__init__(detail)
        self.reason = reason


def shown(value: Any, letters: int = SHOWN_LETTERS) -> str:
    """A value for a message, cut where it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= letters else f"{text[:letters]}... ({len(text):,} letters)"


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
    chosen: str  # with a label, the one answer
    rejected: str | None  # None: an SFT sample, or one with a label
    images: tuple[str | ImageBytes, ...] = ()  # paths as the row has them, or content
    folders: tuple[str, ...] = ()  # where to look for paths, in this order
    answer: str | tuple[str, ...] | None = None  # of a question; several are equally right
    repeat_time: float = 1.0  # how often a mixture wants the source per epoch
    history: tuple[tuple[str, str], ...] = ()  # (role, text) of the messages before the question
    margin: float | None = None  # by how much the chosen answer was rated above the rejected
    prompt_taken_off: bool = False  # both answers began with the prompt
    label: bool | None = None  # whether the one answer is desirable, where it says so

    @property
    def kind(self) -> str:
        if self.label is not None:
            return UNPAIRED
        return "sft" if self.rejected is None else "preference"

    def canonical(self) -> bytes:
        """What identifies the row, for telling whether an input has changed; folders may move."""
        fields = {name: value for name, value in vars(self).items() if name not in ("folders", "images")}
        if self.label is None:  # as it was before there were labels, so that a pack begun then goes on
            del fields["label"]
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
