"""An image becomes a square as Pillow and transformers make it, and each way is told from every other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pivot.data.images import decode_rgb
from pivot.encoders import square
from pivot.encoders.square import fit_square, sample_images
from tests.kit import tiny
from tests.kit.sets import GEOMETRY, image_bytes
from tests.kit.tiny import IMAGE_PROCESSORS


def test_resize_agrees_with_pillow():
    """At most one level apart, as data.md measured."""
    rgb = decode_rgb(image_bytes(1, size=(50, 40)))
    expected = np.asarray(Image.fromarray(rgb).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    found = fit_square(rgb, 16, "squash", GEOMETRY.mean).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - expected).max() <= 1


def test_fits():
    """A 4 x 2 image, left half black and right half white: crop keeps the middle, pad adds rows of int(127.5)."""
    rgb = np.zeros((2, 4, 3), dtype=np.uint8)
    rgb[:, 2:] = 255
    cropped = fit_square(rgb, 2, "crop", GEOMETRY.mean)
    assert cropped[0].tolist() == [[0, 255], [0, 255]]
    padded = fit_square(rgb, 4, "pad", GEOMETRY.mean)
    assert padded[0].tolist() == [[127] * 4, [0, 0, 255, 255], [0, 0, 255, 255], [127] * 4]
    assert fit_square(rgb, 4, "squash", GEOMETRY.mean).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="expected squash, pad or crop"):
        fit_square(rgb, 4, "stretch", GEOMETRY.mean)


def test_extreme_aspect_ratios_pass():
    rgb = np.zeros((1, 5000, 3), dtype=np.uint8)
    assert all(fit_square(rgb, 8, fit, GEOMETRY.mean).shape == (3, 8, 8) for fit in ("squash", "pad", "crop"))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_a_high_image_is_resized_in_two_steps_to_the_same(resample, monkeypatch):
    """Of noise, the worst: both round and clip after each pass, and only their order differs; 3 levels, measured."""
    rgb = decode_rgb(image_bytes(1, size=(20, 900)))
    at_once = fit_square(rgb, 48, "squash", GEOMETRY.mean, resample).int()
    monkeypatch.setattr(square, "MAX_BETWEEN_PIXELS", 100)
    assert (fit_square(rgb, 48, "squash", GEOMETRY.mean, resample).int() - at_once).abs().max() <= 3


@pytest.mark.parametrize("way", IMAGE_PROCESSORS)
@pytest.mark.parametrize("shape", [(333, 500), (337, 501), (640, 480), (41, 640), (20, 24)])
def test_pixels_are_bit_for_bit_those_of_transformers(way: tuple[str, str], shape: tuple[int, int]) -> None:
    """Undoing the normalisation in float32 leaves less than a thousandth of a level."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    stock = IMAGE_PROCESSORS[way]
    mean, std = (torch.tensor(values)[:, None, None] for values in (stock.image_mean, stock.image_std))
    expected = 255 * (stock(Image.fromarray(image), return_tensors="pt")["pixel_values"][0] * std + mean)
    found = fit_square(image, tiny.IMAGE_SIZE, way[0], tuple(stock.image_mean), way[1])
    assert float((found - expected).abs().max()) < 1e-3


def test_samples_tell_every_way_of_fitting_from_every_other() -> None:
    """By tens of levels: nothing that a tolerance of a few could hide."""
    ways = [(fit, way) for fit in ("squash", "crop", "pad") for way in ("bicubic", "bilinear")]
    made = [
        torch.stack([fit_square(image, 32, fit, (0.5,) * 3, way) for image in sample_images(32)]).float()
        for fit, way in ways
    ]
    for i, one in enumerate(made):
        assert all(float((one - other).abs().max()) > 15 for other in made[:i])
