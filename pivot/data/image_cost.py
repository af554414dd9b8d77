"""How much memory it takes to decode an image file, worked out from its header before anything is decoded.

A few kilobytes can hold an image of gigabytes. The bytes a pixel below were measured as peaks of whole processes, with
Pillow 13.0 and simplejpeg 1.9; they hold the decoder's own buffers, the RGB pixels and one copy of those.
"""

from __future__ import annotations

from collections.abc import Iterator

from PIL import PngImagePlugin

MAX_DECODE_BYTES = 370_000_000  # of one image; a file under it stays below 400 MB
MAX_ASPECT = 200  # longer to shorter side; resizing builds an intermediate image of the longer one
MAX_SCANS = 100  # of a JPEG, each of which is as much work as a whole image; encoders write up to 64
METADATA_COPIES = 3  # that Pillow makes of the EXIF, colour profile and texts

PNG_BYTES = 7  # a pixel: 4 of Pillow's and 3 of ours
WEBP_BYTES = 20  # libwebp: two canvases, its work space and the frame, 4 each; then as PNG
JPEG_BYTES = 6  # the pixels, and a copy that is turned or cropped
JPEG_SCANS_BYTES = 9  # a progressive file is kept as coefficients, 2 bytes for each component, until its last scan
PILLOW_JPEG_BYTES = 7
PILLOW_JPEG_SCANS_BYTES = 13  # four components

_PIXEL_CHUNKS = (b"IDAT", b"fdAT", b"VP8 ", b"VP8L", b"ALPH", b"ANMF")
_COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")  # Pillow stops at MAX_TEXT_CHUNK bytes of each
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)  # SOF markers of JPEG
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # all SOF markers
_SCAN = 0xDA
_WITHOUT_BODY = (0x01, *range(0xD0, 0xDA))


def metadata_bytes(data: bytes) -> int:
    """The bytes of the file that are no pixels: what Pillow copies when it opens the file."""
    if data.startswith(b"\xff\xd8"):
        return sum(size for _, _, size in _segments(data))
    sizes = ((name, min(size, len(data))) for name, size in _chunks(data) if name not in _PIXEL_CHUNKS)
    return sum(max(size, PngImagePlugin.MAX_TEXT_CHUNK) if name in _COMPRESSED else size for name, size in sizes)


def needs_coefficients(data: bytes) -> bool:
    """Whether a JPEG has several scans, or none that can be made out: libjpeg then keeps the whole image twice."""
    num_components = 0
    for marker, start, size in _segments(data):
        if marker in _PROGRESSIVE:
            return True
        if marker in _FRAMES and size > 5:
            num_components = data[start + 5]
        if marker == _SCAN and size > 0:
            return data[start] != num_components
    return True


def num_scans(data: bytes) -> int:
    """An upper bound: a thumbnail in the metadata counts too."""
    return data.count(bytes([0xFF, _SCAN]))


def _chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """(name, size) of each chunk of a PNG or WebP file, as far as these can be followed."""
    png = data.startswith(b"\x89PNG")
    position = 8 if png else 12
    while position + 8 <= len(data):
        if png:
            name, size = data[position + 4 : position + 8], int.from_bytes(data[position : position + 4], "big")
        else:
            name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        yield name, size
        position += 12 + size if png else 8 + size + size % 2


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, size) of the body of each segment of a JPEG, up to its first scan."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF or marker in _WITHOUT_BODY:
            position += 1 if marker == 0xFF else 2
            continue
        size = int.from_bytes(data[position + 2 : position + 4], "big") - 2
        if size < 0 or position + 4 + size > len(data):
            return
        yield marker, position + 4, size
        if marker == _SCAN:
            return
        position += 4 + size
