"""Reads image files of any format, orientation or bit depth as RGB uint8."""

import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from skimage import transform

from experiment.files import UserError

MAX_PICTURE_SIDE = 1024  # pixels of a picture's longer side; a larger one is scaled down
MAX_PIXELS = 50_000_000  # that are decoded
MAX_ASPECT_RATIO = 8  # of a picture whose short side is scaled


class Picture(NamedTuple):
    """A picture, upright, and the size that it has in its file."""

    pixels: np.ndarray  # (H, W, 3) uint8, at most MAX_PICTURE_SIDE pixels high and wide
    height: int
    width: int


def read_picture(source):
    """Reads a picture; what is transparent becomes white, and more than 8 bits are scaled by their own range.

    Args:
        source: Path of an image file, an open one, or array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, or of
            another type for one grey channel.

    Returns:
        A `Picture`.

    Raises:
        UserError: The file is missing or is not an image, or the array has another shape or type.
    """
    name = "the array" if isinstance(source, np.ndarray) else source
    try:
        if isinstance(source, np.ndarray):
            if source.ndim not in (2, 3):
                raise ValueError(f"its shape is {source.shape}")
            return to_picture(Image.fromarray(source.squeeze(2) if source.shape[2:] == (1,) else source))
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):  # see MAX_PIXELS
            image = Image.open(source)
        with image:
            return to_picture(image)
    except FileNotFoundError:
        raise UserError(f"{name} is missing") from None
    except Exception as error:  # Pillow raises a dozen kinds for a bad image
        raise UserError(f"{name} is not a readable image ({' '.join(str(error).split())})") from None


def to_picture(image):
    """`Picture` of a Pillow image."""
    size = image.size
    image.draft("RGB", (MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))  # a JPEG is decoded at a half, a quarter or an eighth
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,}")
    turned = ImageOps.exif_transpose(image)
    if image.size != turned.size:
        size = size[::-1]
    image = turned
    if image.mode[0] in "IF":  # 16 bits or more
        values = np.asarray(image, np.float32)
        low, high = values.min(), values.max()
        if not np.isfinite(high - low):
            raise ValueError("it has infinite or NaN values")
        image = Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    return Picture(np.asarray(image), *size[::-1])


def resize(pixels, height, width):
    """Scales pixels (H, W, channels) to (height, width, channels), float64 of the same range."""
    return transform.resize(pixels, (height, width), preserve_range=True, anti_aliasing=True)


def scale_short_side(pixels, side):
    """Scales pixels (H, W, channels) to `side` pixels on the short side.

    Raises:
        UserError: The picture is so long that it would become very large.
    """
    rows, columns = pixels.shape[:2]
    if max(rows, columns) > MAX_ASPECT_RATIO * min(rows, columns):
        raise UserError(f"{columns} x {rows} pixels are too long; crop the image")
    scale = side / min(rows, columns)
    return resize(pixels, round(scale * rows), round(scale * columns)) if scale != 1 else pixels
