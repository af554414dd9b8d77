"""Files of every mode become upright RGB; resizing agrees with Pillow; bombs and damage are errors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pivot.data import images
from pivot.data.images import ImageError, decode_rgb, fit_square, image_extension, load_image
from tests.data.fakes import GEOMETRY, image_bytes


def save(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def smooth(width, height):
    """A gradient, which JPEG keeps to within a few levels."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "PA", "I;16"])
def test_every_png_mode_becomes_rgb(mode):
    image = Image.fromarray(smooth(12, 10))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode in ("PA", "LA"):
        image = image.convert("RGBA").convert("LA")
    else:
        image = image.convert(mode)
    expected = Image.fromarray(smooth(12, 10)).convert("L" if mode in ("I;16", "LA", "PA") else mode).convert("RGB")
    rgb = decode_rgb(save(image))
    assert rgb.shape == (10, 12, 3) and rgb.dtype == np.uint8
    np.testing.assert_allclose(rgb, np.asarray(expected), atol=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats_come_close(mode, format):
    image = Image.fromarray(smooth(32, 24)).convert(mode)
    rgb = decode_rgb(save(image if format == "JPEG" else image.convert("RGB"), format, quality=95))
    np.testing.assert_allclose(rgb, np.asarray(image.convert("RGB")), atol=12)


def test_simplejpeg_and_pillow_decode_alike():
    """The reference log-probs must not depend on which of the two a machine took: equal, measured with 1.9 and 13.0."""
    data = save(Image.fromarray(smooth(61, 47)), "JPEG", quality=90)
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data))))


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (decode_rgb(save(clear)) == 255).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(format):
    """Orientation 6: the camera was held turned, so 24 wide and 16 high are shown 16 wide and 24 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(smooth(24, 16))
    data = save(image, format, exif=exif)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    assert decode_rgb(data).shape == (24, 16, 3)
    np.testing.assert_allclose(decode_rgb(data), expected, atol=60)  # chroma of small JPEGs is rough
    assert np.abs(decode_rgb(data).astype(int) - expected).mean() < 10


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


def test_loaded_images_are_contiguous_uint8():
    pixels = load_image(image_bytes(1), GEOMETRY)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8 and pixels.is_contiguous()


def test_a_bomb_is_refused_from_its_header(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(ImageError, match="12 x 10, more than 99 pixels"):
        decode_rgb(image_bytes(1))


@pytest.mark.parametrize("data", [b"", b"no image", image_bytes(1)[:60], image_bytes(1, "JPEG")[:200]])
def test_damaged_files_are_errors(data):
    with pytest.raises(ImageError):
        decode_rgb(data)


@pytest.mark.parametrize(("format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_the_extension_follows_the_content(format, extension):
    assert image_extension(image_bytes(1, format)) == extension


def test_other_formats_are_errors():
    with pytest.raises(ImageError, match="not a JPEG, PNG or WebP"):
        decode_rgb(image_bytes(1, "BMP"))
