"""Files of every mode become upright RGB; resizing agrees with Pillow; bombs and damage are errors."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pivot.data.images import ImageError, decode_rgb, image_extension, load_image
from tests.kit.images import save, smooth
from tests.kit.sets import GEOMETRY, image_bytes

REPOSITORY = Path(__file__).parents[2]


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


def test_loaded_images_are_contiguous_uint8():
    pixels = load_image(image_bytes(1), GEOMETRY)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8 and pixels.is_contiguous()


def png(width, height, mode=2, more=b""):
    """A black PNG of 8 bits a sample, with `more` chunks."""
    row = b"\0" * (1 + width * (3 if mode == 2 else 1))
    pixels = zlib.compressobj(1)
    packed = b"".join([*(pixels.compress(row) for _ in range(height)), pixels.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def header_says(width, height):
    """A small PNG that claims a size; what follows the header does not matter."""
    return png(1, 1).replace(png(1, 1)[8:33], chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))


@pytest.mark.parametrize(("size", "format", "options"), [
    ((8944, 8944), "PNG", {}),
    ((4500, 4500), "WEBP", {"lossless": True, "method": 0}),
    ((8000, 8000), "JPEG", {}),
    ((6500, 6500), "JPEG", {"progressive": True}),
])  # fmt: skip
def test_a_bomb_is_refused_from_its_header(size, format, options):
    data = header_says(*size) if format == "PNG" else save(Image.new("RGB", size), format, **options)
    with pytest.raises(ImageError, match=r"MB to decode, more than 370; expected at most [\d,]+ pixels in this format"):
        decode_rgb(data)


@pytest.mark.parametrize("size", [(1, 80_000_000), (80_000_000, 1), (10, 2001)])
def test_an_extreme_aspect_ratio_is_refused_from_its_header(size):
    with pytest.raises(ImageError, match="one side more than 200 times the other; crop it"):
        decode_rgb(header_says(*size))
    assert decode_rgb(png(10, 2000)).shape == (2000, 10, 3)


def test_metadata_is_counted():
    """Pillow unpacks each compressed chunk to 1 MB at most, so 200 of them would take 200 MB and copies of it."""
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"A" * 900_000))
    with pytest.raises(ImageError, match="its metadata.*expected less metadata"):
        decode_rgb(png(8, 8, more=bomb * 200))
    assert decode_rgb(png(8, 8, more=chunk(b"tEXt", b"k\0word"))).shape == (8, 8, 3)


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_that_of_pillow(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(smooth(9, 7)), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(expected))


MEASURE = """
import dataclasses, re, sys
from pathlib import Path
from pivot.data.images import ImageError, load_image
from tests.kit.sets import GEOMETRY, image_bytes
def peak_kb():  # of this process alone; getrusage also knows the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
load_image(image_bytes(1), GEOMETRY)
before = peak_kb()
for path in sys.argv[2:]:
    try:
        load_image(Path(path).read_bytes(), dataclasses.replace(GEOMETRY, size=int(sys.argv[1])))
    except ImageError:
        pass
print(peak_kb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_no_file_takes_400_mb(tmp_path):
    """The largest PNG that is let in, for an encoder with large images, and files that are not."""
    files = {
        "largest": png(7200, 7200, mode=0),
        "highest": png(520, 101_000, mode=0),  # which a resize of its rows alone would make 310 MB
        "bits": header_says(8944, 8944),
        "line": header_says(1, 80_000_000),
        "webp": save(Image.new("RGB", (4500, 4500)), "WEBP", lossless=True, method=0),
        "text": png(8, 8, more=chunk(b"zTXt", b"k\0\0" + zlib.compress(b"A" * 100_000_000))),
        "profile": png(8, 8, more=chunk(b"iCCP", b"k\0\0" + zlib.compress(b"A" * 100_000_000))),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", MEASURE, "1024", *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert 200_000 < int(done.stdout) < 400_000  # kB


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
