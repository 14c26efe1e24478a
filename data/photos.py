"""The photos of Caltech-256: the one place that knows, checks and reads its archive.

The archive, a .tar or the folder that it extracts to, holds

    256_ObjectCategories/NNN.name/NNN_0001.jpg, NNN_0002.jpg ...

with a folder NNN.name for each category. Other files (there are a few) are left out and counted. The last 10 photos of
each category are for testing, the others for training.
"""

import io
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from data.dataset import DataError, Limited, progress

TEST_PHOTOS = 10  # of each category
LARGEST_FILE = 1 << 25  # bytes
LARGEST_PHOTO = 50_000_000  # pixels
FORMATS = ["JPEG", "PNG", "GIF", "BMP"]  # a few photos are not what their name says


class Photo(NamedTuple):
    """Where a photo lies: its name in the archive, and `size` bytes from `offset` on in the file `path`."""

    name: str
    path: Path
    offset: int
    size: int


class Photos(NamedTuple):
    """The training or the test set."""

    photos: list  # N of Photo
    labels: np.ndarray  # (N,) int64, 0..C-1


def load_photos(archive, chosen=None):
    """Finds the photos of Caltech-256, and decodes each once to know that it can be read.

    Args:
        archive: Path of the .tar, or of the folder that it extracts to.
        chosen: Categories to take, each by its name or folder ("coffee-mug" or "041.coffee-mug"); None for all.

    Returns:
        The training `Photos`; the test `Photos`, in which the categories take turns; the names of the C categories; and
        counts of what is out of the ordinary, by what it is.

    Raises:
        DataError: The archive is missing or broken, or a category is not there or has too few photos.
    """
    archive = Path(archive)
    files = in_folder(archive) if archive.is_dir() else in_tar(archive)
    categories, counts = {}, Counter()  # folder -> photos
    for photo in sorted(files):
        found = re.search(r"(?:^|/)(([0-9]{3})\.[^/]+)/\2_[0-9]{4}\.jpg\Z", photo.name)
        if found and found[1].isprintable() and 0 < photo.size <= LARGEST_FILE:
            categories.setdefault(found[1], []).append(photo)
        else:
            counts["files of other names or sizes left out"] += 1
    if not categories:
        raise DataError(f"{archive} has no photos 256_ObjectCategories/NNN.name/NNN_0001.jpg")
    if chosen:
        categories = select(archive, categories, chosen)

    parts = ([], [])  # training, test: lists of (place in the category, label, photo)
    photos = [photo for photos in categories.values() for photo in photos]
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        remarks = list(progress(pool.map(inspect, photos), len(photos), f"checking {archive}"))
    remark = dict(zip(photos, remarks, strict=True))
    counts.update(text for text in remarks if text)
    for label, (folder, photos) in enumerate(categories.items()):
        readable = [photo for photo in photos if remark[photo] != "unreadable photos left out"]
        if len({photo.name.rsplit("/", 1)[1] for photo in readable}) < len(readable):
            raise DataError(f"{archive} has photos of {folder} twice")
        if len(readable) <= TEST_PHOTOS:
            raise DataError(f"{archive}: {folder} has {len(readable)} photos; at least {TEST_PHOTOS + 1} are needed")
        for place, photo in enumerate(readable, start=TEST_PHOTOS - len(readable)):
            parts[place >= 0].append((place, label, photo))
    parts[1].sort(key=lambda item: item[:2])
    training, test = (Photos([item[2] for item in part], np.array([item[1] for item in part])) for part in parts)
    return training, test, [folder.split(".", 1)[1] for folder in categories], dict(counts)


def in_folder(folder):
    """The files below a folder, as `Photo`s."""
    return [
        Photo(path.relative_to(folder).as_posix(), path, 0, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    ]


def in_tar(archive):
    """The files of an uncompressed tar archive, as `Photo`s; nothing is extracted."""
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=(limited := Limited(file)), mode="r:") as members:
            found = []
            for member in members:
                limited.next_member()
                if member.isreg():
                    size = 0 if member.issparse() else member.size
                    found.append(Photo(member.name, archive, member.offset_data, size))
            file.seek(members.offset)
            if file.read(512) != bytes(512):  # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"it breaks off after {len(found):,} files")
            return found
    except FileNotFoundError:
        raise DataError(f"{archive} is missing; give 256_ObjectCategories.tar or its folder by --data") from None
    except (tarfile.TarError, EOFError, RecursionError) as error:
        raise DataError(f"{archive} is not a complete .tar ({error}); get it again") from None


def select(archive, categories, chosen):
    """Those of the categories (folder -> photos) that were chosen by name or folder."""
    by_name = {folder.split(".", 1)[1]: folder for folder in categories}
    folders = {by_name.get(name, name) for name in chosen}
    if unknown := folders - set(categories):
        raise DataError(f"{archive} has no category {min(unknown)!r}; it has {', '.join(by_name)}")
    return {folder: photos for folder, photos in categories.items() if folder in folders}


def inspect(photo):
    """Decodes a photo; says what is out of the ordinary with it, or ""."""
    try:
        image = open_image(photo)
        image.load()
    except Exception:  # Pillow raises a dozen kinds for a bad image
        return "unreadable photos left out"
    if image.format != "JPEG":
        return "photos in other formats"
    return "" if image.mode == "RGB" else "photos that are not RGB"


def open_image(photo):
    """Opens a photo, its pixels not yet decoded."""
    with photo.path.open("rb") as file:
        file.seek(photo.offset)
        image = Image.open(io.BytesIO(file.read(photo.size)), formats=FORMATS)
    if image.width * image.height > LARGEST_PHOTO:
        raise ValueError(f"{photo.name} has {image.width} x {image.height} pixels")
    return image


def decode(photo, short_side, side, rng=None):
    """Decodes a photo, and crops it as if it had been scaled to `short_side` pixels on its short side.

    Args:
        photo: A `Photo`.
        short_side: Pixels.
        side: Pixels of the crop, at most `short_side`.
        rng: NumPy random generator for a random place, mirrored or not; None for the crop at the centre.

    Returns:
        (side, side, 3) uint8, RGB.
    """
    image = open_image(photo)
    image.draft("RGB", (short_side, short_side))  # of a large JPEG only as much as is needed
    image = ImageOps.exif_transpose(image).convert("RGB")
    scale = min(image.size) / short_side
    room = [length - side * scale for length in image.size]
    left, top = (length * (0.5 if rng is None else rng.random()) for length in room)
    crop = image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + side * scale, top + side * scale))
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if rng is not None and rng.random() < 0.5 else pixels
