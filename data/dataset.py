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
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiment.files import UserError, acquire_lock

TARBALL, LABELS, BOXES_TXT = "mnist_cluttered.tar.gz", "labels.txt", "boxes.txt"
CLASSES = 10
LOCK = "img.lock"  # held while images are extracted or generated

# What a file claims about itself is checked before memory or disk is taken.
MAX_MEMBER = 1 << 20  # bytes; a PNG of 100 x 100 has about 600
MAX_IMAGE_SIDE = 1000  # pixels
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
    check_lines(folder / LABELS, labels < CLASSES, f"the label is not in 0..{CLASSES - 1}")
    images = load_images(folder, len(labels))
    boxes, (count, height, width, _) = None, images.shape
    if (folder / BOXES_TXT).exists():
        boxes = read_table(folder / BOXES_TXT, columns=4)
        if len(boxes) != count:
            raise UserError(f"{folder / BOXES_TXT} has {len(boxes):,} lines for {count:,} images")
        x0, y0, x1, y1 = boxes.T
        good = (x0 < x1) & (y0 < y1) & (x1 <= width) & (y1 <= height)
        check_lines(folder / BOXES_TXT, good, f"this is not a box in {width} x {height} pixels")
    split = count * 7 // 10
    whole = Split(images, labels, boxes)
    return whole.first(split), Split(images[split:], labels[split:], None if boxes is None else boxes[split:])


def read_table(path, columns):
    """Reads lines of "index<TAB>number ...", index 1, 2, 3 ... in order, as an int64 array (lines, columns)."""
    try:
        if path.stat().st_size > MAX_TABLE:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; the limit is {MAX_TABLE:,}")
        with warnings.catch_warnings(action="ignore"):  # of an empty file
            table = np.loadtxt(path, np.int64, comments=None, delimiter="\t", ndmin=2, encoding="ascii")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a data folder holds {TARBALL} and {LABELS}") from None
    except ValueError as error:
        reason = str(error).split(";")[0]
        raise UserError(f"{path} must have {columns + 1} numbers a line, separated by tabs ({reason})") from None
    if len(table) < 2:
        raise UserError(f"{path} has {len(table)} lines; it must have at least 2, a training and a test image")
    if table.shape[1] != columns + 1:
        raise UserError(f"{path} must have {columns + 1} numbers a line, separated by tabs; it has {table.shape[1]}")
    check_lines(path, table[:, 0] == np.arange(1, len(table) + 1), "the index is not the number of the line")
    check_lines(path, (table >= 0).all(axis=1), "a number is negative")
    return np.ascontiguousarray(table[:, 1:])


def check_lines(path, good, reason):
    """Raises a UserError that names the first line that is not good."""
    if not good.all():
        raise UserError(f"{path}, line {good.argmin() + 1}: {reason}")


def load_images(folder, count):
    """Memory-maps `img/images.npy` (count, H, W, 1) uint8; extracts the tarball first if that is missing or stale."""
    tarball, img, part = folder / TARBALL, folder / "img", folder / "img.part"
    try:
        with tarball.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{tarball} is missing; python -m data.generate makes one") from None
    images = map_images(img, checksum)
    if images is None:
        with acquire_lock(folder / LOCK):
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


class LimitedFile(gzip.GzipFile):
    """Refuses to read more than a member may have at once, as tarfile does for headers that claim to be long."""

    def read(self, size=-1):
        if size > MAX_MEMBER:
            raise tarfile.ReadError("its headers are too long")
        return super().read(size)


def read_pngs(tarball, count):
    """Yields (index, bytes) of each img_{index}.png in the tarball; anything else in it is an error."""
    try:
        with LimitedFile(tarball) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for position, member in enumerate(archive):
                if position > count:  # one more than the images, for the folder
                    raise UserError(f"{tarball} has more files than the {count:,} of {LABELS}")
                if member.isdir() and member.name == ".":
                    continue
                name = re.fullmatch(r"(?:\./)?img_([1-9][0-9]{0,8})\.png", member.name)
                if not (name and member.isreg() and member.size <= MAX_MEMBER):
                    wanted = "a file img_1.png, img_2.png ... of at most 1 MiB"
                    raise UserError(f"{tarball}: {member.name[:80]!r} is not {wanted}")
                yield int(name[1]), archive.extractfile(member).read()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RecursionError) as error:
        raise UserError(f"{tarball} is not a complete .tar.gz ({error}); get or generate it again") from None


def decode_png(tarball, index, png):
    """Pixels (H, W) uint8 of one PNG."""
    try:
        image = Image.open(io.BytesIO(png), formats=["PNG"])  # the header alone
        if image.mode not in ("L", "RGB") or max(image.size) > MAX_IMAGE_SIDE:
            limit = f"8-bit grey or RGB of at most {MAX_IMAGE_SIDE} pixels is read"
            raise ValueError(f"it is {image.mode} {image.size}; {limit}")
        pixels = np.asarray(image)
    except Exception as error:  # Pillow raises a dozen kinds for a bad PNG
        raise UserError(f"{tarball}: img_{index}.png cannot be decoded ({error})") from None
    if pixels.ndim == 3:
        if (pixels != pixels[:, :, :1]).any():
            raise UserError(f"{tarball}: img_{index}.png has colours; its three channels must be equal")
        pixels = pixels[:, :, 0]
    return pixels
