"""Reads Caltech-256, from its .tar or the folder that it extracts to:

    256_ObjectCategories/NNN.name/NNN_0001.jpg, NNN_0002.jpg ...

with a folder NNN.name for each category. Other files (there are a few) are left out and counted. The last 10 photos of
each category are the test set, the others the training set.
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
from tqdm import tqdm

from data.dataset import LimitedReader, Split
from experiment.files import UserError

TEST_PHOTOS = 10  # of each category
MAX_FILE = 1 << 25  # bytes
MAX_PIXELS = 50_000_000  # pixels
FORMATS = ["JPEG", "PNG", "GIF", "BMP"]  # a few photos are not what their name says


class Photo(NamedTuple):
    """Where a photo lies: its name in the archive, and `size` bytes from `offset` on in the file `path`."""

    name: str
    path: Path
    offset: int
    size: int


def load_photos(archive, chosen=None):
    """Finds the photos of Caltech-256, and decodes each once to check that it is readable.

    Args:
        archive: Path of the .tar, or of the folder that it extracts to.
        chosen: Categories to take, each by its name or folder ("coffee-mug" or "041.coffee-mug"); None for all.

    Returns:
        The training and the test `Split`, whose images are lists of `Photo`s (in the test set the categories take
        turns); the names of the C categories; and counts of the files that were left out, by the reason.

    Raises:
        UserError: The archive is missing or broken, or a category is missing or has too few photos.
    """
    archive = Path(archive)
    files = in_folder(archive) if archive.is_dir() else in_tar(archive)
    categories, counts = {}, Counter()  # folder -> photos
    for photo in sorted(files):
        found = re.search(r"(?:^|/)(([0-9]{3})\.[^/]+)/\2_[0-9]{4}\.jpg\Z", photo.name)
        if found and found[1].isprintable() and 0 < photo.size <= MAX_FILE:
            categories.setdefault(found[1], []).append(photo)
        else:
            counts["files with other names or sizes left out"] += 1
    if not categories:
        raise UserError(f"{archive} has no photos 256_ObjectCategories/NNN.name/NNN_0001.jpg")
    names = {folder.split(".", 1)[1]: folder for folder in categories}
    folders = {names.get(name, name) for name in chosen or categories}
    if unknown := folders - set(categories):
        raise UserError(f"{archive} has no category {min(unknown)!r}; it has {', '.join(names)}")
    categories = {folder: photos for folder, photos in categories.items() if folder in folders}

    photos = [photo for photos in categories.values() for photo in photos]
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter lock while it decodes
        checked = tqdm(pool.map(is_readable, photos), f"checking {archive}", len(photos), unit=" photos", disable=None)
        unreadable = {photo for photo, readable in zip(photos, checked, strict=True) if not readable}
    if unreadable:
        counts["unreadable photos left out"] = len(unreadable)
    train, test = [], []  # (label, photo)
    for label, (folder, photos) in enumerate(categories.items()):
        readable = [(label, photo) for photo in photos if photo not in unreadable]
        if len({Path(photo.name).name for _, photo in readable}) < len(readable):
            raise UserError(f"{archive} has duplicate photos of {folder}")
        if len(readable) <= TEST_PHOTOS:
            raise UserError(f"{archive}: {folder} has {len(readable)} photos; at least {TEST_PHOTOS + 1} are needed")
        train += readable[:-TEST_PHOTOS]
        test += readable[-TEST_PHOTOS:]
    test = [test[start] for first in range(TEST_PHOTOS) for start in range(first, len(test), TEST_PHOTOS)]
    splits = [Split([p for _, p in items], np.array([label for label, _ in items]), None) for items in (train, test)]
    return *splits, [folder.split(".", 1)[1] for folder in categories], dict(counts)


def in_folder(folder):
    """The files below a folder, as `Photo`s."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [Photo(path.relative_to(folder).as_posix(), path, 0, path.stat().st_size) for path in paths]


def in_tar(archive):
    """The files of an uncompressed tar archive, as `Photo`s; nothing is extracted."""
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=(limited := LimitedReader(file)), mode="r:") as members:
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
        raise UserError(f"{archive} is missing; give 256_ObjectCategories.tar or its folder by --data") from None
    except (tarfile.TarError, EOFError, RecursionError) as error:
        raise UserError(f"{archive} is not a complete .tar ({error}); get it again") from None


def is_readable(photo):
    try:
        open_image(photo).load()
    except Exception:  # Pillow raises a dozen kinds for a bad image
        return False
    return True


def open_image(photo):
    """Opens a photo, its pixels not yet decoded."""
    with photo.path.open("rb") as file:
        file.seek(photo.offset)
        image = Image.open(io.BytesIO(file.read(photo.size)), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{photo.name} has {image.width} x {image.height} pixels")
    return image


def decode(photo, short_side, side, rng=None):
    """Decodes a photo, and crops it as if it had been scaled to `short_side` pixels on its short side.

    Returns:
        The crop, (side, side, 3) uint8, RGB: at the centre, or with a NumPy random generator `rng` at a random place,
        mirrored or not.
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
