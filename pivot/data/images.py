"""Image files to uint8 pixels of one square size. Normalising is the model's, on the device: a quarter of the bytes."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pivot.data import image_cost
from pivot.encoders.facts import ImageGeometry
from pivot.encoders.square import fit_square

EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
STRIP_PIXELS = 1 << 18  # converted to RGB at a time
ORIENTATION = 0x0112  # EXIF tag


class ImageError(ValueError):
    """An image file that cannot be decoded, or should not be."""


def image_extension(data: bytes) -> str:
    """The extension that a shard's member gets: what the file is, not what it is called. Raises ImageError."""
    return EXTENSION_OF_FORMAT[str(_open(data).format)]


def decode_rgb(data: bytes) -> np.ndarray:
    """uint8[H, W, 3] of a JPEG, PNG or WebP file of any mode, upright; the first frame of an animation.

    Transparency is laid on white. Raises ImageError for damaged files and, before anything is decoded, for those that
    would take more memory than image_cost allows.
    """
    with _open(data) as image:
        try:
            return _upright(_decode(image, data), image.getexif().get(ORIENTATION, 1))
        except (MemoryError, ImageError):
            raise  # the first is the machine's fault, not the image's
        except Exception as error:  # Pillow's plugins raise almost anything on damaged data
            raise ImageError(f"cannot decode the image ({type(error).__name__}: {error})") from error


def load_image(data: bytes, geometry: ImageGeometry) -> Tensor:
    """uint8[3, size, size] of an image file, fitted as the geometry says."""
    return fit_square(decode_rgb(data), geometry.size, geometry.fit, geometry.mean, geometry.resample)


def _open(data: bytes) -> Image.Image:
    """The image with its header read. Raises ImageError for what is none, or too much to decode."""
    _require_room("its metadata", 0, 0, data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we say it ourselves
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except UnidentifiedImageError as error:
        raise ImageError("not a JPEG, PNG or WebP image") from error
    except Exception as error:
        raise ImageError(f"the image's header cannot be read ({type(error).__name__}: {error})") from error
    width, height = image.size
    if max(width, height) > image_cost.MAX_ASPECT * min(width, height):
        raise ImageError(
            f"the image is {width} x {height}, one side more than {image_cost.MAX_ASPECT} times the other; crop it"
        )
    _require_room(f"{width} x {height}", width * height, _bytes_per_pixel(image, data), data)
    if EXTENSION_OF_FORMAT[str(image.format)] == "jpg" and image_cost.num_scans(data) > image_cost.MAX_SCANS:
        raise ImageError(f"the JPEG has more than {image_cost.MAX_SCANS} scans; save it again")
    return image


def _bytes_per_pixel(image: Image.Image, data: bytes) -> int:
    if image.format in ("PNG", "WEBP"):
        return image_cost.PNG_BYTES if image.format == "PNG" else image_cost.WEBP_BYTES
    several = image_cost.needs_coefficients(data)
    if image.mode in ("RGB", "L"):
        return image_cost.JPEG_SCANS_BYTES if several else image_cost.JPEG_BYTES
    return image_cost.PILLOW_JPEG_SCANS_BYTES if several else image_cost.PILLOW_JPEG_BYTES


def _require_room(what: str, num_pixels: int, bytes_per_pixel: int, data: bytes) -> None:
    """Raise ImageError unless so many pixels and what else the file holds can be decoded within the limit."""
    metadata = image_cost.METADATA_COPIES * image_cost.metadata_bytes(data)
    needed, limit = num_pixels * bytes_per_pixel + metadata, image_cost.MAX_DECODE_BYTES
    if needed > limit:
        most = f"at most {(limit - metadata) // bytes_per_pixel:,} pixels" if num_pixels else "less metadata"
        raise ImageError(
            f"the image ({what}) takes {needed / 1e6:.0f} MB to decode, more than {limit / 1e6:.0f}; expected {most} "
            "in this format: make it smaller"
        )


def _decode(image: Image.Image, data: bytes) -> np.ndarray:
    """uint8[H, W, 3], as the file has them."""
    width, height = image.size
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:  # it stops at harmless warnings too; Pillow decides what is really broken
            several = image_cost.needs_coefficients(data)
            cost = image_cost.PILLOW_JPEG_SCANS_BYTES if several else image_cost.PILLOW_JPEG_BYTES
            _require_room(f"{width} x {height}", width * height, cost, data)
    rgb = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):  # in strips: each conversion makes copies
        strip = image.crop((0, top, width, min(top + rows, height)))
        rgb[top : top + rows] = np.asarray(_to_rgb(strip))
    return rgb


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels as EXIF says that the camera was held."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip instead of scale
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
