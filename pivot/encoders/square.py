"""How an image becomes the encoder's square, and which of these ways a stock image processor takes.

Resizing is torch's antialiased one on uint8, which transformers' processors use too. It differs from Pillow's by at
most one level and needs a third of the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pivot.encoders.facts import EncoderFacts, Triple

FITS, RESAMPLES = ("squash", "crop", "pad"), ("bicubic", "bilinear")
MAX_RATIO = 16  # of the sides of an image, cropped just as transformers does
MAX_PADDED_PIXELS = 30_000_000  # of the square that a longer image is laid on before it is resized: 90 MB
MAX_BETWEEN_PIXELS = 30_000_000  # of the image between the two passes of a resize
# Levels of 255 between two libraries that do the same: Pillow and torch round a resize differently, by one a pass.
MAX_LEVELS = 3.0


def fit_square(rgb: np.ndarray, size: int, fit: str, mean: Triple, resample: str = "bicubic") -> Tensor:
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


def _pad(rgb: np.ndarray, size: int, mean: Triple, resample: str) -> Tensor:
    height, width = rgb.shape[:2]
    longest = max(height, width)
    color = [int(255 * value) for value in mean]
    if longest * longest > MAX_PADDED_PIXELS:  # its square would be too large to hold: pad behind the resize
        height, width = max(1, size * height // longest), max(1, size * width // longest)
        rgb, longest = _resize(rgb, height, width, resample).permute(1, 2, 0).numpy(), size
    square = np.full((longest, longest, 3), color, dtype=np.uint8)
    top, left = (longest - height) // 2, (longest - width) // 2
    square[top : top + height, left : left + width] = rgb
    return _resize(square, size, size, resample)


def _resize(rgb: np.ndarray, height: int, width: int, resample: str) -> Tensor:
    # From H, W, 3 in memory: the channels-last layout that torch's fast uint8 path wants.
    pixels = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None]
    if rgb.shape[0] * width > MAX_BETWEEN_PIXELS:  # torch resizes the rows first, all of a very high image
        pixels = F.interpolate(pixels, size=(height, rgb.shape[1]), mode=resample, antialias=True)
    if pixels.shape[2:] != (height, width):
        pixels = F.interpolate(pixels, size=(height, width), mode=resample, antialias=True)
    return pixels[0].contiguous()


# -- which way a stock image processor takes -----------------------------------------------------------------------


def recognise_fit(image_processor: Any, facts: EncoderFacts, size: int | None) -> tuple[str, str]:
    """(fit, resample) by which our pixels are those of a stock image processor, seen on sample images.

    `size`: what the processor must make, None for anything. Raises ValueError where its pixels are none of ours.
    """
    images = sample_images(facts.size)
    stock = as_levels(image_processor, images, facts)
    if size is not None and stock.shape[-1] != size:
        raise ValueError(f"it makes {stock.shape[-1]} pixels a side, and the encoder takes {size}")
    near = {(fit, way): max_difference(stock, images, facts, fit, way) for fit in FITS for way in RESAMPLES}
    (fit, way), levels = min(near.items(), key=lambda item: item[1])
    if levels > MAX_LEVELS:
        raise ValueError(
            f"its pixels are neither those of a squash nor of a crop or pad (the nearest is {fit}, {way}, up to "
            f"{levels:.0f} of 255 levels away)"
        )
    return fit, way


def sample_images(size: int) -> list[np.ndarray]:
    """A wide and a tall image, larger than `size`, of which each fit and each way to resample makes other pixels."""
    generator = np.random.default_rng(0)
    shapes = ((size + size // 2, 2 * size + 5), (2 * size + 7, size + size // 3))
    return [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def as_levels(image_processor: Any, images: list[np.ndarray], facts: EncoderFacts) -> Tensor:
    """float32[I, 3, S, S], from 0 to 255: what an image processor makes of `images`, its normalisation undone."""
    made = [image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"] for image in images]
    for pixels in made:
        if pixels.ndim != 4 or pixels.shape[-1] != pixels.shape[-2]:
            raise ValueError(f"of one image it makes pixels of the shape {list(pixels.shape[1:])}; expected one square")
    mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
    return 255 * (torch.cat(made) * std + mean)


def max_difference(stock: Tensor, images: list[np.ndarray], facts: EncoderFacts, fit: str, resample: str) -> float:
    """The most by which a pixel of ours differs from one of `stock` (as `as_levels` gives them), in levels of 255."""
    fitted = torch.stack([fit_square(image, stock.shape[-1], fit, facts.mean, resample) for image in images])
    return float((fitted - stock).abs().max())
