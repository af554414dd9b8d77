"""What in a row is a picture: a path, bytes, {bytes, path}, base64 text, a `data:` URL, or a list of these."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from data_tools.records import ImageBytes, Malformed, shown

CONTENT_FIELDS = ("bytes", "base64", "b64", "data")  # of a dict that holds a picture
NAME_FIELDS = ("path", "image", "image_url", "url", "source", "file", "filename", "file_name")
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
MEDIA_PATH = re.compile(
    r"[^\n]{1,1000}\.(jpe?g|jfif|png|gif|bmp|tiff?|webp|avif|jp2|p[bgnp]m|hei[cf]|svg|"
    r"mp4|m4v|avi|mov|mkv|webm|mpe?g|wav|mp3|flac|ogg|m4a)",
    re.IGNORECASE,
)
# How files begin: JPEG, PNG, GIF, TIFF, JPEG 2000; and Matroska, Ogg, MP3, FLAC.
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
_FILMS = (b"\x1aE\xdf\xa3", b"OggS", b"ID3", b"fLaC")
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_BASE64_START = re.compile(r"[A-Za-z0-9+/]{32}")
_STANDARD = str.maketrans("-_", "+/")  # the URL-safe alphabet has these two letters of its own


def as_images(value: Any) -> tuple[str | ImageBytes, ...] | None:
    """The images that a field holds, () where it is empty; None for anything else. Raises Malformed on cut base64."""
    if is_absent(value):
        return ()
    if isinstance(value, list | tuple):
        images = [_as_image(item) for item in value]
        return None if None in images else tuple(image for image in images if image is not None)
    image = _as_image(value)
    return None if image is None else (image,)


def is_absent(value: Any) -> bool:
    """Nothing is there: null, NaN (which pandas writes for it), or an empty text, list or struct."""
    if isinstance(value, dict):
        return all(is_absent(inner) for inner in value.values())
    return value is None or value != value or value == "" or value == []


def is_picture(data: bytes) -> bool:
    """Whether a file begins like a picture that can be read."""
    is_bitmap = data[:2] == b"BM" and data[6:10] == b"\0\0\0\0"
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return data.startswith(_PICTURES) or is_bitmap or is_webp or data[4:12] in (b"ftypavif", b"ftypavis")


def begins_like_media(data: bytes) -> bool:
    """Whether a file begins like a picture, a film or a sound."""
    is_other = data[:4] == b"RIFF" or data[4:8] == b"ftyp"  # AVI and WAV; MP4, MOV and HEIC
    return is_picture(data) or data.startswith(_FILMS) or is_other


def is_embedded_media(value: Any) -> bool:
    """Whether a value is a whole picture, film or sound, as bytes or as text."""
    if isinstance(value, bytes):
        return begins_like_media(value)
    return isinstance(value, str) and (_DATA_URL.match(value) is not None or _is_base64(value))


def _as_image(value: Any) -> str | ImageBytes | None:
    if isinstance(value, ImageBytes):
        return value
    if isinstance(value, bytes):
        return ImageBytes(value)
    if isinstance(value, str):
        content = _from_base64(value)
        return value if content is None else ImageBytes(content)
    return _from_struct(value) if isinstance(value, dict) else None


def _from_struct(struct: dict[str, Any]) -> str | ImageBytes | None:
    names = [struct[field] for field in NAME_FIELDS if not is_absent(struct.get(field))]
    content = next((struct[field] for field in CONTENT_FIELDS if not is_absent(struct.get(field))), None)
    if isinstance(content, str):
        content = _from_base64(content, certain=True)
    if content is not None:
        name = names[0] if names and isinstance(names[0], str) else ""
        return ImageBytes(content, name) if isinstance(content, bytes) else None
    image = _as_image(names[0]) if names else None
    if isinstance(image, str) and is_absent(struct.get("path")) and not (REMOTE.match(image) or _is_path(image)):
        return None  # {url: "x"}: text under a name that says nothing
    return image


def _is_path(text: str) -> bool:
    return MEDIA_PATH.fullmatch(text) is not None


def _is_base64(text: str) -> bool:
    if " " in text[:64]:  # so most texts are told apart at once
        return False
    head = text[:64].translate(_STANDARD).replace("\n", "").replace("\r", "").lstrip()[:32]
    return _BASE64_START.fullmatch(head) is not None and begins_like_media(base64.b64decode(head))


def _from_base64(text: str, *, certain: bool = False) -> bytes | None:
    """The file that is written in `text`; None where that is a name, unless it is `certain` to be base64."""
    if url := _DATA_URL.match(text):
        text, certain = text[url.end() :], True
    if not certain and not _is_base64(text):
        return None
    letters = "".join(text.split()).translate(_STANDARD).rstrip("=")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"base64 that cannot be decoded ({error}): {shown(text, 24)}", "undecodable image") from error
