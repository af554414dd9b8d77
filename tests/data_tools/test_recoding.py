"""Pictures of other formats become PNG without the change of a pixel; what would lose something is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from data_tools.recoding import to_shard_format
from pivot.data.images import ImageError, decode_rgb, image_extension
from tests.kit.sets import image_bytes


def save(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(mode="RGB"):
    pixels = np.random.default_rng(3).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


FORMATS = {
    "BMP": ("RGB", "L", "P", "1"),
    "TIFF": ("RGB", "L", "P", "1"),
    "PPM": ("RGB", "L", "1"),
    "GIF": ("P", "L", "1"),
}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in FORMATS.items() for mode in modes])
def test_no_pixel_changes(format, mode):
    data = save(picture(mode), format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    png, found = to_shard_format(data)
    assert found == format and image_extension(png) == "png"
    np.testing.assert_array_equal(decode_rgb(png), expected)
    assert to_shard_format(data) == (png, found)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_what_shards_hold_keeps_its_bytes(format):
    data = image_bytes(1, format)
    assert to_shard_format(data) == (data, None)


def test_what_is_no_picture_is_left_to_others():
    assert to_shard_format(b"<html>") == (b"<html>", None)


def test_a_pillow_without_avif_reads_the_others(monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    assert to_shard_format(save(Image.new("RGB", (4, 3)), "BMP"))[1] == "BMP"


def test_a_moving_picture_gives_its_first_frame_and_says_so():
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (10, 200)]
    png, found = to_shard_format(save(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert found == "GIF, first frame" and decode_rgb(png)[0, 0].tolist() == [10, 0, 0]


def test_transparency_is_laid_on_white_as_of_any_picture():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert decode_rgb(to_shard_format(save(clear, "TIFF"))[0]).min() == 255


def test_a_tiff_is_turned_upright():
    data = save(Image.new("RGB", (12, 10)), "TIFF", tiffinfo={0x0112: 6})
    assert decode_rgb(to_shard_format(data)[0]).shape[:2] == (12, 10)


def test_print_colours_become_rgb():
    assert decode_rgb(to_shard_format(save(picture("CMYK"), "TIFF"))[0]).shape == (10, 12, 3)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (save(picture(), "TIFF", save_all=True, append_images=[picture()]), "a TIFF of 2 pages"),
        (save(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "pixels of mode F"),
        (save(Image.new("1", (9000, 9000)), "TIFF", compression="group4"), "9000 x 9000, more than"),
        (save(picture(), "BMP")[:200], "cannot decode the image"),
    ],
)
def test_what_would_lose_something_is_refused(data, said):
    with pytest.raises(ImageError, match=said):
        to_shard_format(data)
