"""Pictures of other formats as PNG: shards hold JPEG, PNG and WebP alone, which every reader of them decodes."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from pivot.data.image_cost import MAX_DECODE_BYTES
from pivot.data.images import ImageError

RECODED = ("AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")  # as Pillow calls them
KEPT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # those that PNG has too; others become RGB
BYTES_PER_PIXEL = 12  # of memory: the picture, a copy that is upright and one of another mode, 4 each
MAX_PIXELS = MAX_DECODE_BYTES // BYTES_PER_PIXEL
REFUSED_MODES = ("F", "I")  # numbers without a range of their own: what is black and what is white cannot be told


def to_shard_format(data: bytes) -> tuple[bytes, str | None]:
    """(PNG, what it was) of a picture in one of RECODED, its first frame where it moves; others as they are, None.

    No pixel changes but where PNG lacks the mode. Raises ImageError for what is too large, damaged, or has several
    pages.
    """
    Image.init()
    formats = [name for name in RECODED if name in Image.OPEN]  # an older Pillow without AVIF stops at its name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we say it ourselves
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image has more than {MAX_PIXELS} pixels ({error})") from error
    except Exception:
        return data, None  # whether it is one of a shard's formats is for others to say
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"the image is {width} x {height}, more than {MAX_PIXELS} pixels")
    name = str(image.format)
    try:
        frames = int(getattr(image, "n_frames", 1))
        if frames > 1 and name == "TIFF":
            raise ImageError(f"a TIFF of {frames} pages; make a picture of each")
        return _as_png(image), f"{name}, first frame" if frames > 1 else name
    except (MemoryError, ImageError):
        raise  # the machine's fault, or said already
    except Exception as error:  # Pillow's plugins raise almost anything on damaged data
        raise ImageError(f"cannot decode the image ({type(error).__name__}: {error})") from error


def _as_png(image: Image.Image) -> bytes:
    image.load()
    if image.mode in REFUSED_MODES:
        raise ImageError(f"pixels of mode {image.mode}; scale them to 8 or 16 bits first")
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in KEPT_MODES:
        upright = upright.convert("RGB")
    file = io.BytesIO()
    upright.save(file, "PNG", icc_profile=None, exif=b"")  # a profile would be that of the mode before
    return file.getvalue()
