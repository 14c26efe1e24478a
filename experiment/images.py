"""Reads image files of any format, orientation or bit depth as RGB uint8."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from skimage import transform

from experiment.files import UserError

SUFFIXES = (  # of the images in a folder
    *(".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp"),
    *(".tif", ".tiff", ".avif", ".ppm", ".pgm"),
)
MAX_PICTURE_SIDE = 1024  # pixels of a picture's longer side; a larger one is scaled down
MAX_PIXELS = 50_000_000  # that are decoded
MAX_ASPECT_RATIO = 8  # of a picture whose short side is scaled


class Picture(NamedTuple):
    """A picture, upright, and the size that it has in its file."""

    pixels: np.ndarray  # (H, W, 3) uint8, at most MAX_PICTURE_SIDE pixels high and wide
    height: int
    width: int


def read_picture(source, name=None):
    """Reads a picture; what is transparent becomes white, and more than 8 bits are scaled by their own range.

    Args:
        source: Path of an image file, an open one, a Pillow image, or array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4):
            uint8, or of another type for one grey channel.
        name: Name of an open file, for messages.

    Returns:
        A `Picture`.

    Raises:
        UserError: The file is missing or is not an image, or the array has another shape or type.
    """
    name = "the array" if isinstance(source, np.ndarray) else name or source
    try:
        if isinstance(source, Image.Image):
            return to_picture(source.copy())
        if isinstance(source, np.ndarray):
            if source.ndim not in (2, 3) or not source.size:
                raise ValueError(f"its shape is {source.shape}")
            source = source.squeeze(2) if source.shape[2:] == (1,) else source
            if source.ndim == 2 and source.dtype != np.uint8:
                source = source.astype(np.float32)
            return to_picture(Image.fromarray(source))
        with Image.open(source) as image:
            return to_picture(image)
    except FileNotFoundError:
        raise UserError(f"{name} is missing") from None
    except UnidentifiedImageError:  # its own message has the memory address of an open file
        raise UserError(f"{name} is not a readable image (unknown format; convert it to PNG)") from None
    except Exception as error:  # Pillow raises a dozen kinds for a bad image
        raise UserError(f"{name} is not a readable image ({' '.join(str(error).split())})") from None


def to_picture(image):
    """`Picture` of a Pillow image."""
    size = image.size
    image.draft("RGB", (MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))  # a JPEG is decoded at a half, a quarter or an eighth
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,}")
    drafted = image.size
    ImageOps.exif_transpose(image, in_place=True)
    if image.size != drafted:
        size = size[::-1]
    if image.mode[0] in "IF":  # 16 bits or more
        values = np.asarray(image, np.float32)
        low, high = values.min(), values.max()
        if not np.isfinite(high - low):
            raise ValueError("it has infinite or NaN values")
        image = Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
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
        raise UserError(f"{columns} x {rows} pixels are too elongated; crop the image")
    scale = side / min(rows, columns)
    return resize(pixels, round(scale * rows), round(scale * columns))


def random_crop(pixels, short_side, side, rng):
    """A crop of a picture (H, W, 3) at a random place, mirrored or not: (side, side, 3) uint8.

    Its size is that of a crop from the picture scaled to `short_side` pixels; `rng` is a NumPy random generator.
    """
    image = Image.fromarray(pixels)
    cropped = side * min(image.size) / short_side  # pixels of the picture
    left, top = ((length - cropped) * rng.random() for length in image.size)
    box = left, top, left + cropped, top + cropped
    crop = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


class Mapped(Sequence):
    """A list of function(item) for each item of a list, each computed when it is asked for."""

    def __init__(self, function, items):
        self.function, self.items = function, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        """One of them, or a slice."""
        if isinstance(index, slice):
            return Mapped(self.function, self.items[index])
        return self.function(self.items[index])
