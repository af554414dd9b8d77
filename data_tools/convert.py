"""One record to one sample: its images found and checked, its prompt split at `<image>`, or the reason for a drop."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.readers.messages import IMAGE_PLACEHOLDER
from data_tools.readers.pictures import REMOTE
from data_tools.recoding import to_shard_format
from data_tools.records import Drop, ImageBytes, Record, shown
from pivot.data.images import ImageError, decode_rgb, image_extension
from pivot.data.samples import SAMPLE_VERSION, UNPAIRED, Sample, check_sample, dump_sample, sample_shape

MAX_IMAGE_BYTES = 100_000_000  # of one file; read whole into memory
SHOWN_PATH = 200  # letters of a path in a message; what is longer is no path that anybody wrote
JPEG_QUALITY = 92  # of images that are made smaller
NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}  # the row's fault; others the machine's


@dataclass(frozen=True)
class Packed:
    """A sample ready to be written, its members in order and the JSON first."""

    key: str  # the first 16 hex digits of the content's hash: equal content has an equal key
    source: str
    sample: Sample
    members: list[tuple[str, bytes]]  # (extension, content)
    recoded: tuple[str, ...] = ()  # the formats of images that became PNG

    @property
    def num_bytes(self) -> int:
        return sum(len(data) for _, data in self.members)

    @cached_property
    def shape(self) -> str:
        return sample_shape((extension for extension, _ in self.members), self.sample)


class Rejected(Exception):
    """Ends the conversion of a record with the reason for dropping it."""


def convert(record: Record, trusted: Sequence[Path], max_side: int | None = None) -> Packed | Drop:
    """The sample that `record` becomes. Images are read only from below `trusted` (resolved folders).

    Their bytes are kept, but for images with a side above `max_side`, which are made smaller. Raises OSError for an
    image that is there and cannot be read: a drop would lose a good row to a disk or a network that fails for a moment.
    """
    try:
        _check_texts(record)
        files = [_read_image(image, record.folders, trusted) for image in record.images]
        return _pack(record, files, max_side)
    except Rejected as rejected:
        reason, detail = rejected.args
        return Drop(reason, record.id, detail)
    except UnicodeEncodeError as error:
        return Drop("malformed row", record.id, f"text that is not Unicode ({error.reason})")
    except OSError as error:
        raise type(error)(
            f"{record.id}: its image cannot be read ({error}). Nothing is lost: mend that and run the same command "
            "again, it goes on"
        ) from error


def split_messages(turns: Sequence[tuple[str, str]], num_images: int) -> list[dict[str, Any]]:
    """The messages of a prompt, images numbered through all of them. Raises Rejected when their number is another.

    Images come first where no turn says where they belong. The line break behind a placeholder is left out: the chat
    template puts one there.
    """
    num_placeholders = sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns)
    if num_placeholders not in (0, num_images):
        raise Rejected(
            "image-token mismatch",
            f"the prompt has {num_placeholders} {IMAGE_PLACEHOLDER}, the row {num_images} images"
            + ("" if num_images else "; if they are in another column, name it with --map image=COLUMN"),
        )
    first_of_user = next((i for i, (role, _) in enumerate(turns) if role == "user"), 0)
    messages, shown = [], 0
    for number, (role, text) in enumerate(turns):
        pieces = text.split(IMAGE_PLACEHOLDER)
        if not num_placeholders and number == first_of_user:
            pieces = [""] * num_images + [text]
        messages.append({"role": role, "content": _parts(pieces, shown)})
        shown += len(pieces) - 1
    return messages


def _parts(pieces: Sequence[str], first_image: int) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image", "image": first_image + number - 1})
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _check_texts(record: Record) -> None:
    for field in ("chosen", "rejected"):
        text = getattr(record, field)
        if text is not None and not text.strip():
            raise Rejected("zero-length completion", f"field {field} is blank")
    if record.rejected is not None and record.chosen.strip() == record.rejected.strip():
        raise Rejected("chosen equals rejected", record.chosen[:80])
    if not record.prompt.replace(IMAGE_PLACEHOLDER, "").strip() and not record.images:
        raise Rejected("empty prompt", "neither text nor image")


def _read_image(image: str | ImageBytes, folders: Sequence[str], trusted: Sequence[Path]) -> bytes:
    if isinstance(image, str):
        return _find_image(image, folders, trusted).read_bytes()
    if len(image.data) > MAX_IMAGE_BYTES:
        raise Rejected("undecodable image", f"{image.name}: more than {MAX_IMAGE_BYTES} bytes")
    return image.data


def _find_image(path: str, folders: Sequence[str], trusted: Sequence[Path]) -> Path:
    """The file that `path` names, looked for in `folders`; its real place must lie below one of `trusted`."""
    if REMOTE.match(path):
        raise Rejected("URL", f"{shown(path, SHOWN_PATH)}: nothing is fetched; download the images first")
    if "\0" in path:
        raise Rejected("missing image", f"{shown(repr(path))} is no file name")
    outside = None
    for folder in folders:
        real = Path(os.path.realpath(os.path.join(folder, path)))
        if not any(real.is_relative_to(root) for root in trusted):
            outside = outside or real
        elif (size := _file_size(real)) is not None:
            if size > MAX_IMAGE_BYTES:
                raise Rejected("undecodable image", f"{shown(path, SHOWN_PATH)}: more than {MAX_IMAGE_BYTES} bytes")
            return real
    if outside is not None:
        there, folder = shown(str(outside), SHOWN_PATH), shown(str(outside.parent), SHOWN_PATH)
        raise Rejected(
            "path outside the roots",
            f"{shown(path, SHOWN_PATH)} leads to {there}; if that is meant, admit its "
            f"folder with --allow-root {folder}",
        )
    where = f"is not in {', '.join(folders)}" if folders else "is named and not there"
    raise Rejected("missing image", f"{shown(path, SHOWN_PATH)} {where}")


def _file_size(path: Path) -> int | None:
    """None where no file is. Raises OSError where that cannot be told, which Path.is_file would take for none."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in NO_SUCH_FILE:
            return None
        raise
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def shrink(rgb: np.ndarray, max_side: int) -> tuple[bytes, int, int]:
    """(JPEG, width, height) of uint8[H, W, 3] with its longer side at `max_side`; without the metadata it had."""
    height, width = rgb.shape[:2]
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    file = io.BytesIO()
    small = Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    small.save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return file.getvalue(), *size


def _pack(record: Record, files: list[bytes], max_side: int | None) -> Packed:
    images, image_members, recoded = [], [], []
    for number, (image, data) in enumerate(zip(record.images, files, strict=True)):
        origin = image if isinstance(image, str) else image.name
        try:
            data, format = to_shard_format(data)
            extension = image_extension(data)
            rgb = decode_rgb(data)  # upright, as the loader will see it
        except ImageError as error:
            raise Rejected("undecodable image", f"{shown(origin, SHOWN_PATH)}: {error}") from error
        recoded += [format] if format else []
        height, width = rgb.shape[:2]
        if max_side is not None and max(height, width) > max_side:
            data, width, height = shrink(rgb, max_side)
            extension = "jpg"
        member = extension if len(files) == 1 else f"img{number}.{extension}"
        sha256 = hashlib.sha256(data).hexdigest()
        images.append({"member": member, "w": width, "h": height, "sha256": sha256, "origin": origin})
        image_members.append((member, data))
    prompt = split_messages([*record.history, ("user", record.prompt)], len(files))
    if record.label is not None:
        completions = {"completion": record.chosen}
    else:
        completions = {"chosen": record.chosen} | ({} if record.rejected is None else {"rejected": record.rejected})
    sample: Sample = {
        "v": SAMPLE_VERSION,
        "id": record.id,
        "kind": record.kind,
        "prompt": prompt,
        **{field: [{"role": "assistant", "content": text}] for field, text in completions.items()},
        **({} if record.label is None else {"label": record.label}),
        "images": images,
        "answer": list(record.answer) if isinstance(record.answer, tuple) else record.answer,
        "rejected_images": None,
        "margin": record.margin,
        "source": record.source,
        "meta": {},
    }
    check_sample(sample)
    members = [("json", dump_sample(sample)), *image_members]
    return Packed(content_key(sample), record.source, sample, members, tuple(recoded))


def content_key(sample: Sample) -> str:
    """16 hex digits over what a sample teaches: conversation and image bytes, not where it comes from."""
    if sample["kind"] == UNPAIRED:  # the same answer under both labels is two samples
        texts = [sample["prompt"], sample["completion"], sample["label"]]
    else:
        texts = [sample["prompt"], sample["chosen"], sample.get("rejected")]
    content = [*texts, [image["sha256"] for image in sample["images"]]]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
