"""Image files to uint8 pixels of one square size. Normalising is the model's, on the device: a quarter of the bytes.

Resizing is torch's antialiased one on uint8, which transformers' processors use too. It differs from Pillow's by at
most one level and needs a third of the time.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

if TYPE_CHECKING:
    from pivot.processor import ImageGeometry

EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MAX_PIXELS = 80_000_000  # 240 MB as RGB; below the number at which Pillow starts to warn of a bomb
MAX_RATIO = 16  # of the sides of an image, cropped just as transformers does
ORIENTATION = 0x0112  # EXIF tag


class ImageError(ValueError):
    """An image file that cannot be decoded, or should not be."""


def image_extension(data: bytes) -> str:
    """The extension that a shard's member gets: what the file is, not what it is called. Raises ImageError."""
    return EXTENSION_OF_FORMAT[str(_open(data).format)]


def decode_rgb(data: bytes) -> np.ndarray:
    """uint8[H, W, 3] of a JPEG, PNG or WebP file of any mode, upright; the first frame of an animation.

    Transparency is laid on white. Raises ImageError for damaged files and for more than MAX_PIXELS, the latter
    before anything is decoded.
    """
    image = _open(data)
    try:
        upright = image.getexif().get(ORIENTATION, 1) == 1
        if image.format == "JPEG" and image.mode in ("RGB", "L") and upright:
            try:
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
            except ValueError:
                pass  # it stops at harmless warnings too; Pillow decides what is really broken
        return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Exception as error:  # Pillow's plugins raise almost anything on damaged data
        raise ImageError(f"cannot decode the image ({type(error).__name__}: {error})") from error


def load_image(data: bytes, geometry: ImageGeometry) -> Tensor:
    """uint8[3, size, size] of an image file, fitted as the geometry says."""
    return fit_square(decode_rgb(data), geometry.size, geometry.fit, geometry.mean, geometry.resample)


def fit_square(
    rgb: np.ndarray, size: int, fit: str, mean: tuple[float, float, float], resample: str = "bicubic"
) -> Tensor:
    """uint8[3, size, size] of uint8[H, W, 3]: `squash` both sides, `crop` the centre, or `pad` with the mean colour.

    The pixels are those of transformers' processors, which crop behind the resize and pad before it.
    """
    if fit == "crop":
        return _crop(rgb, size, resample)
    if fit == "pad":
        return _pad(rgb, size, mean, resample)
    if fit == "squash":
        return _resize(rgb, size, size, resample)
    raise ValueError(f"data.image.fit is {fit!r}, expected squash, pad or crop")


def _crop(rgb: np.ndarray, size: int, resample: str) -> Tensor:
    height, width = rgb.shape[:2]
    longest = MAX_RATIO * min(height, width)  # of a longer one, cut what would be resized for nothing
    rgb = _middle(rgb, min(height, longest), min(width, longest))
    height, width = rgb.shape[:2]
    short = min(height, width)
    resized = _resize(rgb, int(size * height / short), int(size * width / short), resample)
    return _middle(resized.permute(1, 2, 0), size, size).permute(2, 0, 1).contiguous()


def _middle(pixels: Any, height: int, width: int) -> Any:
    """The middle of [H, W, 3], rounded towards its start as transformers rounds."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _pad(rgb: np.ndarray, size: int, mean: tuple[float, float, float], resample: str) -> Tensor:
    height, width = rgb.shape[:2]
    longest = max(height, width)
    color = [int(255 * value) for value in mean]
    if longest * longest > MAX_PIXELS:  # its square would be too large to hold: pad behind the resize
        height, width = max(1, size * height // longest), max(1, size * width // longest)
        rgb, longest = _resize(rgb, height, width, resample).permute(1, 2, 0).numpy(), size
    square = np.full((longest, longest, 3), color, dtype=np.uint8)
    top, left = (longest - height) // 2, (longest - width) // 2
    square[top : top + height, left : left + width] = rgb
    return _resize(square, size, size, resample)


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we say it ourselves
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image has more than {MAX_PIXELS} pixels ({error})") from error
    except Exception as error:
        raise ImageError(f"not a JPEG, PNG or WebP image ({type(error).__name__})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"the image is {width} x {height}, more than {MAX_PIXELS} pixels")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip instead of scale
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _resize(rgb: np.ndarray, height: int, width: int, resample: str) -> Tensor:
    # From H, W, 3 in memory: the channels-last layout that torch's fast uint8 path wants.
    pixels = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None]
    if pixels.shape[2:] != (height, width):
        pixels = F.interpolate(pixels, size=(height, width), mode=resample, antialias=True)
    return pixels[0].contiguous()
