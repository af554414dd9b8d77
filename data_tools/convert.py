"""One record to one sample: its images found and checked, its prompt split at `<image>`, or the reason for a drop."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.records import Drop, Record
from pivot.data.images import ImageError, decode_rgb, image_extension
from pivot.data.samples import SAMPLE_VERSION, Sample, check_sample, dump_sample

IMAGE_PLACEHOLDER = "<image>"
MAX_IMAGE_BYTES = 100_000_000  # of one file; read whole into memory
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


@dataclass(frozen=True)
class Packed:
    """A sample ready to be written, its members in order and the JSON first."""

    key: str  # the first 16 hex digits of the content's hash: equal content has an equal key
    source: str
    sample: Sample
    members: list[tuple[str, bytes]]  # (extension, content)

    @property
    def num_bytes(self) -> int:
        return sum(len(data) for _, data in self.members)


class Rejected(Exception):
    """Ends the conversion of a record with the reason for dropping it."""


def convert(record: Record, trusted: Sequence[Path]) -> Packed | Drop:
    """The sample that `record` becomes. Images are read only from below `trusted` (resolved folders)."""
    try:
        _check_texts(record)
        files = [_find_image(path, record.folders, trusted).read_bytes() for path in record.images]
        return _pack(record, files)
    except Rejected as rejected:
        reason, detail = rejected.args
        return Drop(reason, record.id, detail)
    except UnicodeEncodeError as error:
        return Drop("malformed row", record.id, f"text that is not Unicode ({error.reason})")
    except OSError as error:
        return Drop("missing image", record.id, str(error))


def split_prompt(prompt: str, num_images: int) -> list[dict[str, Any]]:
    """Content parts of a prompt; images come first where it does not say where they belong.

    The line break behind a placeholder is left out: the chat template puts one there. Raises Rejected.
    """
    pieces = prompt.split(IMAGE_PLACEHOLDER)
    found = len(pieces) - 1
    if found == 0:
        pieces = [""] * num_images + [prompt]
    elif found != num_images:
        raise Rejected(
            "image-token mismatch", f"the prompt has {found} {IMAGE_PLACEHOLDER}, the row {num_images} images"
        )
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image", "image": number - 1})
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _check_texts(record: Record) -> None:
    for field in ("chosen", "rejected"):
        if not getattr(record, field).strip():
            raise Rejected("zero-length completion", f"field {field} is blank")
    if record.chosen.strip() == record.rejected.strip():
        raise Rejected("chosen equals rejected", record.chosen[:80])
    if not record.prompt.replace(IMAGE_PLACEHOLDER, "").strip() and not record.images:
        raise Rejected("empty prompt", "neither text nor image")


def _find_image(path: str, folders: Sequence[str], trusted: Sequence[Path]) -> Path:
    """The file that `path` names, looked for in `folders`; its real place must lie below one of `trusted`."""
    if _URL.match(path):
        raise Rejected("URL", f"{path[:200]}: nothing is fetched; download the images first")
    if "\0" in path:
        raise Rejected("missing image", f"{path!r} is no file name")
    outside = None
    for folder in folders:
        real = Path(os.path.realpath(os.path.join(folder, path)))
        if not any(real.is_relative_to(root) for root in trusted):
            outside = outside or real
        elif real.is_file():
            if real.stat().st_size > MAX_IMAGE_BYTES:
                raise Rejected("undecodable image", f"{path}: more than {MAX_IMAGE_BYTES} bytes")
            return real
    if outside is not None:
        raise Rejected(
            "path outside the roots",
            f"{path} leads to {outside}; if that is meant, admit its folder with --allow-root {outside.parent}",
        )
    raise Rejected("missing image", f"{path} is not in {', '.join(folders)}")


def _pack(record: Record, files: list[bytes]) -> Packed:
    images, image_members = [], []
    for number, (path, data) in enumerate(zip(record.images, files, strict=True)):
        try:
            extension = image_extension(data)
            height, width = decode_rgb(data).shape[:2]  # upright, as the loader will see it
        except ImageError as error:
            raise Rejected("undecodable image", f"{path}: {error}") from error
        member = extension if len(files) == 1 else f"img{number}.{extension}"
        sha256 = hashlib.sha256(data).hexdigest()
        images.append({"member": member, "w": width, "h": height, "sha256": sha256, "origin": path})
        image_members.append((member, data))
    sample = {
        "v": SAMPLE_VERSION,
        "id": record.id,
        "kind": "preference",
        "prompt": [{"role": "user", "content": split_prompt(record.prompt, len(files))}],
        "chosen": [{"role": "assistant", "content": record.chosen}],
        "rejected": [{"role": "assistant", "content": record.rejected}],
        "images": images,
        "answer": record.answer,
        "rejected_images": None,
        "margin": None,
        "source": record.source,
        "meta": {},
    }
    check_sample(sample)
    return Packed(content_key(sample), record.source, sample, [("json", dump_sample(sample)), *image_members])


def content_key(sample: Sample) -> str:
    """16 hex digits over what a sample teaches: conversation and image bytes, not where it comes from."""
    texts = [sample["prompt"], sample["chosen"], sample.get("rejected")]
    content = [*texts, [image["sha256"] for image in sample["images"]]]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
