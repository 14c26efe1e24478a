"""Reads photos, from a folder or from an archive of it (.tar or .tar.gz):

    photos/cats/any name.jpg             a folder for each class; the last 10 photos of each, by name, are the test set
    photos/train/cats/any name.jpg       or a training and a test set (test/ or val/), which are taken as they are
    photos/test/cats/any name.jpg
    NNN.name/NNN_0001.jpg                or Caltech-256 as it is; the classes have no number in their names

Other files, photos that cannot be read, and photos longer than 8:1 are left out and counted. A file boxes.csv has the
true boxes of some photos: lines "file,x0,y0,x1,y1", with that header; `file` is relative to the folder of boxes.csv, a
box is half-open and in pixels of the upright photo, and a photo with several objects has several lines.
"""

import csv
import io
import posixpath
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from data.archive import File, list_files, read_bytes
from experiment.files import UserError
from experiment.images import MAX_ASPECT_RATIO, MAX_PIXELS

TEST_PHOTOS = 10  # of each class
FOLDS = 5  # of the training photos, for validation
BOXES_CSV = "boxes.csv"
HEADER = ["file", "x0", "y0", "x1", "y1"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
MAX_FILE = 1 << 25  # bytes
FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP"]  # a few photos are not what their name says
HIDDEN = re.compile(r"(?:^|/)(?:\.|__MACOSX(?:/|\Z))")  # what macOS puts beside a file, and the like
NUMBERED = re.compile(r"[0-9]{3}\.(.+)")  # a folder of Caltech-256
NUMBERED_PHOTO = re.compile(r"(?:.*/)?([0-9]{3})\.[^/]+/\1_[0-9]{4}\.jpg")


class Photos(NamedTuple):
    """The training or the test set: N photos, which stay in their folder or archive until they are decoded."""

    files: list[File]
    labels: np.ndarray  # (N,) int64, 0..C-1
    boxes: list | None  # true boxes of each photo, (n, 4) float64, or None; None if there is no boxes.csv

    def first(self, count):
        """The first `count` photos."""
        return Photos(self.files[:count], self.labels[:count], None if self.boxes is None else self.boxes[:count])

    def fingerprint(self):
        """What makes these photos the same as others, wherever they lie: names and sizes, labels, boxes."""
        return [(file.name, file.size) for file in self.files], self.labels, self.boxes


def load_photos(archive, chosen=None, test_share=None, fold=None):
    """Finds the training and the test photos, and decodes each once to check that it is readable.

    Args:
        archive: Path of the folder or archive.
        chosen: Classes to take, each by its name or folder ("coffee-mug" or "041.coffee-mug"); None for all.
        test_share: Share of each class that is the test set, 0..1; None for its last 10 photos.
        fold: For validation, 1..5: this fifth of the training photos of each class, by name, is the test set, and the
            test photos are left out.

    Returns:
        The training and the test `Photos` (in the test set the classes take turns); names of the C classes; counts of
        what was left out, by the reason.

    Raises:
        UserError: The archive is missing or broken, or a class is missing or has too few photos.
    """
    sets, boxes, counts = find_photos(archive, chosen)
    separate = "train" in sets
    names = list(sets["train" if separate else ""])
    if len(names) < 2:
        raise UserError(f"{archive} has photos of {len(names)} classes; two or more, each in a folder, are needed")
    if separate and test_share is not None:
        raise UserError(f"{archive} has a test set; --test-share is for data without one")
    train, test = [], []
    for label, name in enumerate(names):
        if separate:
            known, new = sets["train"][name], sets["test"].pop(name, [])
            if not known:
                raise UserError(f"{archive}: {name} has no training photo that can be used")
        else:
            photos = sets[""][name]
            count = TEST_PHOTOS if test_share is None else max(1, round(test_share * len(photos)))
            if len(photos) <= count:
                raise UserError(f"{archive}: {name} has {len(photos)} usable photos; at least {count + 1} are needed")
            known, new = photos[:-count], photos[-count:]
        if fold:
            if len(known) < FOLDS:
                raise UserError(f"{archive}: {name} has {len(known)} usable training photos; --fold needs {FOLDS}")
            start, end = (fold - 1) * len(known) // FOLDS, fold * len(known) // FOLDS
            known, new = known[:start] + known[end:], known[start:end]
        train += [(label, photo) for photo in known]
        test += [(turn, label, photo) for turn, photo in enumerate(new)]
    if separate and sets["test"]:
        raise UserError(f"{archive}: {min(sets['test'])} is in the test set, but not in the training set")
    if not test:
        raise UserError(f"{archive} has no test photo that can be used")
    in_turn = [(label, photo) for _, label, photo in sorted(test)]
    return make_photos(train, boxes), make_photos(in_turn, boxes), names, dict(counts)


def load_all_photos(archive, names):
    """Finds all photos of the classes `names`, to test a network on; returns `Photos`, and counts as `load_photos`."""
    sets, boxes, counts = find_photos(archive)
    labelled = []
    for classes in sets.values():
        for name, photos in classes.items():
            if name in names:
                labelled += [(names.index(name), photo) for photo in photos]
            else:
                counts["photos of classes that the model does not have left out"] += len(photos)
    if not labelled:
        raise UserError(f"{archive} has no folder with the name of a class of the model: {', '.join(names)}")
    return make_photos(labelled, boxes), dict(counts)


def make_photos(labelled, boxes):
    """`Photos` of (label, file) pairs; `boxes` by the name of the file."""
    files = [file for _, file in labelled]
    labels = np.array([label for label, _ in labelled])
    return Photos(files, labels, [boxes.get(file.name) for file in files] if boxes else None)


def find_photos(archive, chosen=None):
    """Finds photos and boxes in a folder or archive.

    Returns:
        sets: Set -> class -> readable `File`s by name. Sets are "train" and "test", or "" if they are not separate.
        boxes: Name of a photo -> its boxes, (n, 4) float64.
        counts: Counter of what was left out, by the reason.
    """
    archive = Path(archive)
    files, folders = list_files(archive)
    counts, tables, photos = Counter(), [], []
    for file in sorted(files):
        if file.name.split("/")[-1] == BOXES_CSV:
            tables.append(file)
        elif 0 < file.size <= MAX_FILE and file.name.lower().endswith(SUFFIXES) and not HIDDEN.search(file.name):
            photos.append(file)
        else:
            counts["other files left out"] += 1
    if not photos:
        raise UserError(f"{archive} has no photos ({', '.join(SUFFIXES)})")
    above = find_sets(photos)
    placed = group(photos, folders, above, counts)
    names = sorted({folder for folder, _, _ in placed})
    titles = {name: NUMBERED.sub(r"\1", name) if is_numbered(names) else name for name in names}
    wanted = set(chosen or names)
    if unknown := wanted - set(names) - set(titles.values()):
        raise UserError(f"{archive} has no class {min(unknown)!r}; it has {', '.join(titles.values())}")
    placed = [found for found in placed if {found[0], titles[found[0]]} & wanted]
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter lock while it decodes
        checked = pool.map(check, [photo for _, _, photo in placed])
        checked = list(tqdm(checked, f"checking {archive}", len(placed), unit=" photos", disable=None))
    sets, by_name = {which: {} for which in above}, {}
    for (folder, which, _), (photo, reason) in zip(placed, checked, strict=True):
        found = sets[which].setdefault(titles[folder], [])
        if reason:
            counts[f"{reason} left out"] += 1
        elif photo.name in by_name:
            raise UserError(f"{archive} has duplicate photos of {titles[folder]}")
        else:
            found.append(photo)
            by_name[photo.name] = photo
    return sets, read_boxes(archive, tables, by_name, counts), counts


def find_sets(photos):
    """The path above the class folders of each set: {"train": "a/train/", "test": "a/val/"} or {"": "a/"}."""
    depth, _ = Counter(photo.name.count("/") for photo in photos).most_common(1)[0]
    usual = [posixpath.dirname(photo.name) for photo in photos if photo.name.count("/") == depth]
    root = posixpath.join(posixpath.commonpath(map(posixpath.dirname, usual)), "")
    for test in "test", "val":
        sets = {"train": f"{root}train/", "test": f"{root}{test}/"}
        if all(any(photo.name.startswith(above) for photo in photos) for above in sets.values()):
            return sets
    return {"": root}


def group(photos, folders, above, counts):
    """The photos in folders of classes, as a sorted list of (folder, set, photo); the others are counted."""
    placed = []
    for which, start in above.items():
        for photo in photos:
            folder, below, _ = photo.name.removeprefix(start).partition("/")
            if photo.name.startswith(start) and below and folder.isprintable():
                placed.append((folder, which, photo))
    filled = {above[which] + folder for folder, which, _ in placed}
    for path in folders:
        parent = posixpath.join(posixpath.dirname(path), "")
        if parent in above.values() and path not in filled and not HIDDEN.search(path):
            counts["empty folders left out"] += 1
    if is_numbered({folder for folder, _, _ in placed}):  # Caltech-256, and a few strays
        placed = [found for found in placed if NUMBERED_PHOTO.fullmatch(found[-1].name)]
    if len(placed) < len(photos):
        counts["photos elsewhere left out"] = len(photos) - len(placed)
    return sorted(placed)


def is_numbered(names):
    """Whether the folders are named as in Caltech-256, with a number before a name of its own."""
    return len({name[4:] for name in names if NUMBERED.fullmatch(name)}) == len(names)


def check(photo):
    """Decodes a photo; returns it with its size, and the reason to leave it out, or None."""
    try:
        image = open_image(photo)
        image.load()
        width, height = ImageOps.exif_transpose(image).size
    except Exception:  # Pillow raises a dozen kinds for a bad image
        return photo, "unreadable photos"
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return photo, f"photos longer than {MAX_ASPECT_RATIO}:1"
    return photo._replace(width=width, height=height), None


def read_boxes(archive, tables, photos, counts):
    """The boxes of the photos, from all files boxes.csv: name of a photo -> (n, 4) float64."""
    boxes = {}
    for table in tables:
        rows = csv.reader(io.TextIOWrapper(io.BytesIO(read_bytes(table)), "utf-8-sig"))
        try:
            if next(rows, None) != HEADER:
                raise ValueError(f"the header must be {','.join(HEADER)}")
            for row in filter(None, rows):
                if len(row) != 5:
                    raise ValueError(f"{len(row)} values, not 5")
                name = posixpath.normpath(posixpath.join(posixpath.dirname(table.name), row[0].replace("\\", "/")))
                x0, y0, x1, y1 = (float(value) for value in row[1:])
                if name not in photos:
                    counts["boxes without a photo left out"] += 1
                    continue
                width, height = photos[name].width, photos[name].height
                if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                    raise ValueError(f"no box in {row[0]}, which has {width} x {height} pixels")
                boxes.setdefault(name, []).append([x0, y0, x1, y1])
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise UserError(f"{archive}: {table.name}, line {rows.line_num}: {error}") from None
    return {name: np.array(found) for name, found in boxes.items()}


def open_image(photo):
    """Opens a photo, its pixels not yet decoded."""
    image = Image.open(io.BytesIO(read_bytes(photo)), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{photo.name} has {image.width} x {image.height} pixels")
    return image


def decode(photo, short_side, side, rng=None):
    """Decodes a photo, and crops it as if it had been scaled to `short_side` pixels on its short side.

    Returns RGB (side, side, 3) uint8: the crop at the centre, or with a NumPy random generator `rng` at a random place,
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


def crop_boxes(photo, boxes, short_side, side):
    """Boxes (n, 4) of a photo in pixels of its crop at the centre (see `decode`); those beyond it are left out."""
    scale = short_side / min(photo.width, photo.height)
    left, top = ((scale * length - side) / 2 for length in (photo.width, photo.height))
    cropped = (np.asarray(boxes) * scale - [left, top, left, top]).clip(0, side).round().astype(int)
    return cropped[(cropped[:, 2:] > cropped[:, :2]).all(axis=1)]
