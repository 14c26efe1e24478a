"""Reads cluttered MNIST. A data folder holds

    mnist_cluttered.tar.gz   img_1.png ... img_N.png, all of one size; grey, or RGB with three equal channels
    labels.txt               "index<TAB>label" a line, index from 1, label 0..9
    boxes.txt                "index<TAB>x0<TAB>y0<TAB>x1<TAB>y1" a line, half-open, in pixels; may be missing

The first 70% of the images, in file order, are the training set, the rest is the test set.
"""

import gzip
import hashlib
import io
import re
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiment.files import UserError, acquire_lock

TARBALL, LABELS, BOXES = "mnist_cluttered.tar.gz", "labels.txt", "boxes.txt"
CLASSES = 10
LOCK = "img.lock"  # held while images are extracted or generated

# Limits. What a file claims about itself is checked against them before memory or disk is taken.
MAX_MEMBER = 1 << 20  # bytes; a PNG of 100 x 100 has about 600
MAX_HEADER = 1 << 16  # bytes of tar headers before a member
MAX_SIDE = 1000  # pixels
MAX_TABLE = 1 << 24  # bytes of labels.txt or boxes.txt; enough for a million lines


class Split(NamedTuple):
    """The training or the test set: N images of H x W pixels."""

    images: np.ndarray  # (N, H, W, 1) uint8, black is 0
    labels: np.ndarray  # (N,) int64, 0..C-1
    boxes: np.ndarray | None  # (N, 4) int64: x0, y0, x1, y1 around the object, half-open; None if unknown

    def first(self, count):
        """The first `count` images, labels and boxes, as a `Split`."""
        return Split(self.images[:count], self.labels[:count], None if self.boxes is None else self.boxes[:count])


def load_dataset(folder):
    """Reads a data folder; the first call extracts its tarball into `img/`.

    Args:
        folder: Path of the data folder.

    Returns:
        The training `Split` and the test `Split`. Their images are views of one array mapped from disk.

    Raises:
        UserError: A file is missing, broken, or does not fit the others.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; --data takes the folder that holds {TARBALL} and {LABELS}")
    labels = read_table(folder / LABELS, columns=1)[:, 0]
    for line, label in enumerate(labels, start=1):
        if label >= CLASSES:
            raise UserError(f"{folder / LABELS}, line {line}: label {label} is not in 0..{CLASSES - 1}")
    images = load_images(folder, count=len(labels))
    boxes = read_boxes(folder / BOXES, images.shape) if (folder / BOXES).exists() else None
    split = len(labels) * 7 // 10
    train = Split(images[:split], labels[:split], None if boxes is None else boxes[:split])
    test = Split(images[split:], labels[split:], None if boxes is None else boxes[split:])
    return train, test


def read_table(path, columns):
    """Reads lines of "index<TAB>number ...", index 1, 2, 3 ... in order, as an int64 array (lines, columns)."""
    try:
        if path.stat().st_size > MAX_TABLE:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; the limit is {MAX_TABLE:,}")
        lines = path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a data folder holds {TARBALL} and {LABELS}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file of numbers") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(rf"[0-9]{{1,9}}(\t[0-9]{{1,9}}){{{columns}}}", line):
            raise UserError(f"{path}, line {number}: {line[:40]!r} is not {columns + 1} numbers separated by tabs")
        index, *row = map(int, line.split("\t"))
        if index != number:
            raise UserError(f"{path}, line {number}: the index is {index}; it must be {number}")
        rows.append(row)
    if len(rows) < 2:
        raise UserError(f"{path} has {len(rows)} lines; it must have at least 2, a training and a test image")
    return np.array(rows)


def read_boxes(path, shape):
    """Reads the boxes (N, 4) of images of the shape (N, H, W, 1)."""
    boxes, (count, height, width, _) = read_table(path, columns=4), shape
    if len(boxes) != count:
        raise UserError(f"{path} has {len(boxes):,} lines for {count:,} images")
    x0, y0, x1, y1 = boxes.T
    wrong = (x0 >= x1) | (y0 >= y1) | (x1 > width) | (y1 > height)
    if wrong.any():
        line = int(np.argmax(wrong)) + 1
        raise UserError(f"{path}, line {line}: {boxes[line - 1].tolist()} is not a box in {width} x {height} pixels")
    return boxes


def load_images(folder, count):
    """Maps the tarball's images from `img/images.npy`, after extracting them if that is not of this tarball.

    Returns:
        Array (count, H, W, 1) uint8, read-only.
    """
    tarball, img = folder / TARBALL, folder / "img"
    try:
        with tarball.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{tarball} is missing; data/generate.py makes one") from None
    images = map_images(img, checksum)
    if images is None:
        with acquire_lock(folder / LOCK):
            part = folder / "img.part"  # renamed when it is complete
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            part.mkdir()
            try:
                extract(tarball, part, count)
                (part / "SHA256").write_text(checksum)
                shutil.rmtree(img, ignore_errors=True)
                part.rename(img)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        images = map_images(img, checksum)
    if len(images) != count:
        raise UserError(f"{tarball} has {len(images):,} images, {folder / LABELS} has {count:,} lines")
    return images


def map_images(img, checksum):
    """Maps `img`/images.npy if it is there, whole, and of the tarball with this checksum; else None."""
    try:
        if (img / "SHA256").read_text() == checksum:
            return np.load(img / "images.npy", mmap_mode="r")
    except (OSError, ValueError):
        pass
    return None


def extract(tarball, folder, count):
    """Extracts img_1.png ... img_{count}.png to `folder`, and writes their pixels to `folder`/images.npy."""
    missing, shape = set(range(1, count + 1)), None
    with (folder / "images.npy").open("wb") as images:
        for index, png in tqdm(read_pngs(tarball, count), f"extracting {tarball}", count, unit=" images", disable=None):
            if index not in missing:
                raise UserError(f"{tarball}: img_{index}.png is a duplicate, or {LABELS} has no line for it")
            missing.remove(index)
            (folder / f"img_{index}.png").write_bytes(png)
            pixels = decode_png(tarball, index, png)  # (H, W)
            if shape is None:
                shape = pixels.shape
                needed, free = 2 * count * pixels.size, shutil.disk_usage(folder).free  # pixels, and PNGs of less
                if needed > free:
                    raise UserError(f"{tarball} needs up to {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape, 1)}
                np.lib.format.write_array_header_1_0(images, header)
                start = images.tell()
            if pixels.shape != shape:
                raise UserError(f"{tarball}: img_{index}.png has the shape {pixels.shape}; others have {shape}")
            images.seek(start + (index - 1) * pixels.size)
            images.write(pixels.tobytes())  # not through a memory map, which kills the process when the disk is full
    if missing:
        raise UserError(f"{tarball} has no img_{min(missing)}.png; {LABELS} has {count:,} lines")


class LimitedReader:
    """A file of which only so much can be read as one member of a tarball may have, whatever its header claims."""

    def __init__(self, file):
        self.file, self.seek, self.tell = file, file.seek, file.tell
        self.next_member()

    def next_member(self):
        self.left = MAX_HEADER + MAX_MEMBER

    def read(self, size):
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError("its headers are too long")
        return self.file.read(size)


def read_pngs(tarball, count):
    """Yields (index, bytes) of each img_{index}.png in the tarball; anything else in it is an error."""
    try:
        with gzip.open(tarball) as file, tarfile.open(fileobj=(limited := LimitedReader(file)), mode="r:") as archive:
            for position, member in enumerate(archive):
                if position > count:  # one more than the images, for the folder
                    raise UserError(f"{tarball} has more files than the {count:,} of {LABELS}")
                if member.isdir() and member.name == ".":
                    continue
                name = re.fullmatch(r"(?:\./)?img_([1-9][0-9]{0,8})\.png", member.name)
                if not (name and member.isreg() and member.size <= MAX_MEMBER):
                    raise UserError(
                        f"{tarball}: {member.name[:80]!r} is not a file img_1.png, img_2.png ... of at most 1 MiB"
                    )
                yield int(name[1]), archive.extractfile(member).read()
                limited.next_member()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RecursionError) as error:
        raise UserError(f"{tarball} is not a complete .tar.gz ({error}); get or generate it again") from None


def decode_png(tarball, index, png):
    """Pixels (H, W) uint8 of one PNG."""
    try:
        image = Image.open(io.BytesIO(png), formats=["PNG"])  # the header alone
        if image.mode not in ("L", "RGB") or max(image.size) > MAX_SIDE:
            raise ValueError(f"it is {image.mode} {image.size}; 8-bit grey or RGB of at most {MAX_SIDE} pixels is read")
        pixels = np.asarray(image)
    except Exception as error:  # Pillow raises a dozen kinds for a bad PNG
        raise UserError(f"{tarball}: img_{index}.png cannot be decoded ({error})") from None
    if pixels.ndim == 3:
        if (pixels != pixels[:, :, :1]).any():
            raise UserError(f"{tarball}: img_{index}.png has colours; its three channels must be equal")
        pixels = pixels[:, :, 0]
    return pixels
