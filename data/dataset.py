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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data.archive import BROKEN
from experiment.files import UserError, acquire_lock

TARBALL, LABELS, BOXES_TXT = "mnist_cluttered.tar.gz", "labels.txt", "boxes.txt"
CLASSES = 10
LOCK = "img.lock"  # held while images are extracted or generated
# What a file claims about itself is checked before memory or disk is taken.
MAX_PNG = 1 << 20  # bytes; one of 100 x 100 pixels has about 600
MAX_HEADERS = 1 << 16  # bytes in the tarball before each PNG
MAX_IMAGE_SIDE = 1000  # pixels
MAX_TABLE = 1 << 24  # bytes of labels.txt or boxes.txt; enough for a million lines


class Split(NamedTuple):
    """The training or the test set: N images."""

    images: Sequence  # (N, H, W, channels) uint8, black is 0; a list if they have several sizes
    labels: np.ndarray  # (N,) int64, 0..C-1
    boxes: Sequence | None  # (N, 4) int64: x0, y0, x1, y1 around the object, half-open; None if unknown
    prepared: Sequence | None = None  # as the network takes them, if not as they are

    @property
    def inputs(self):
        """The images as the network takes them."""
        return self.images if self.prepared is None else self.prepared

    def first(self, count):
        """The first `count` images, with all that belongs to them, as a `Split`."""
        return Split(*(field if field is None else field[:count] for field in self))


def load_dataset(folder, multiple_of=1):
    """Reads a data folder; the first call extracts its tarball into `img/`.

    Args:
        folder: Path of the data folder.
        multiple_of: Height and width become multiples of this, by black pixels at the bottom and on the right.

    Returns:
        The training and the test `Split`. Their images are views of one array, mapped from disk if it is not padded.

    Raises:
        UserError: A file is missing, broken, or does not fit the others.
    """
    folder = Path(folder)
    for path in folder / LABELS, folder / TARBALL:
        if not path.exists():
            raise UserError(f"{path} is missing; --data takes a folder, as python -m data.generate makes it")
    labels, boxes = read_table(folder / LABELS, columns=1)[:, 0], None
    check_lines(folder / LABELS, labels < CLASSES, f"the label is not in 0..{CLASSES - 1}")
    images = load_images(folder, len(labels))
    count, height, width, _ = images.shape
    if (folder / BOXES_TXT).exists():
        boxes = read_table(folder / BOXES_TXT, columns=4)
        if len(boxes) != count:
            raise UserError(f"{folder / BOXES_TXT} has {len(boxes):,} lines for {count:,} images")
        x0, y0, x1, y1 = boxes.T
        inside = (x0 < x1) & (y0 < y1) & (x1 <= width) & (y1 <= height)
        check_lines(folder / BOXES_TXT, inside, f"this is not a box in {width} x {height} pixels")
    if height % multiple_of or width % multiple_of:
        images = np.pad(images, ((0, 0), (0, -height % multiple_of), (0, -width % multiple_of), (0, 0)))
    split = count * 7 // 10
    test = Split(images[split:], labels[split:], None if boxes is None else boxes[split:])
    return Split(images, labels, boxes).first(split), test


def read_table(path, columns):
    """Reads lines of "index<TAB>number ...", index 1, 2, 3 ..., as an int64 array (lines, columns)."""
    if path.stat().st_size > MAX_TABLE:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; the limit is {MAX_TABLE:,}")
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    if len(lines) < 2:
        raise UserError(f"{path} has {len(lines)} lines; it must have at least 2, a training and a test image")
    numbers = re.compile("\t".join(["[0-9]{1,9}"] * (columns + 1)))
    check_lines(path, map(numbers.fullmatch, lines), f"{columns + 1} whole numbers are needed, separated by tabs")
    table = np.loadtxt(lines, np.int64, delimiter="\t")
    check_lines(path, table[:, 0] == np.arange(len(table)) + 1, "the index is not the number of the line")
    return np.ascontiguousarray(table[:, 1:])


def check_lines(path, good, reason):
    """Raises a UserError that names the first line that is not good."""
    for line, is_good in enumerate(good, start=1):
        if not is_good:
            raise UserError(f"{path}, line {line}: {reason}")


def load_images(folder, count):
    """Maps `img/images.npy` (count, H, W, 1) uint8; extracts the tarball first if that cache is missing or stale."""
    tarball, img, part = folder / TARBALL, folder / "img", folder / "img.part"
    with tarball.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    if (images := load_cache(img, count, checksum)) is not None:
        return images
    try:
        lock = acquire_lock(folder / LOCK, wait=True)
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror}), and the images must be extracted there once"
        raise UserError(f"{reason}; copy it, and give the copy by --data") from None
    with lock:
        if (images := load_cache(img, count, checksum)) is not None:  # another process has just extracted it
            return images
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir()
        try:
            extract(tarball, part, count)
            images = np.load(part / "images.npy", mmap_mode="r")
            (part / "checksums").write_text(f"{checksum} {zlib.crc32(images)}")
            shutil.rmtree(img, ignore_errors=True)
            part.rename(img)
        except BROKEN as error:
            raise UserError(f"{tarball} is not a complete .tar.gz ({error}); get or generate it again") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return np.load(img / "images.npy", mmap_mode="r")


def load_cache(img, count, checksum):
    """The images that were extracted earlier; None if there are none, or they are damaged or of another tarball."""
    with suppress(OSError, ValueError, EOFError):
        images = np.load(img / "images.npy", mmap_mode="r")
        if images.shape[:1] == (count,) and (img / "checksums").read_text() == f"{checksum} {zlib.crc32(images)}":
            return images
    return None


class LimitedFile(gzip.GzipFile):
    """Raises an error when more than `left` bytes are read, as tarfile does for headers that claim to be long."""

    left = MAX_HEADERS

    def read(self, size=-1):
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError("its headers are too long")
        return super().read(size)


def extract(tarball, folder, count):
    """Extracts img_1.png ... img_{count}.png to `folder`, and writes their pixels to `folder`/images.npy."""
    missing, shape = {f"img_{index}.png": index for index in range(1, count + 1)}, None
    images = (folder / "images.npy").open("wb")
    with images, LimitedFile(tarball) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in tqdm(archive, f"extracting {tarball}", count, unit=" images", disable=None):
            name = member.name.removeprefix("./")
            if name == "." and member.offset == 0:  # the folder, which comes first in a tarball of "."
                continue
            if name not in missing:
                reason = f"is a duplicate, or not one of img_1.png ... img_{count}.png"
                raise UserError(f"{tarball}: {name[:80]!r} {reason}; {LABELS} has {count:,} lines")
            if not member.isreg() or member.size > MAX_PNG:
                raise UserError(f"{tarball}: {name} is not a file of at most {MAX_PNG:,} bytes")
            file.left = member.size + MAX_HEADERS  # for this PNG, and the headers of the next
            index, png = missing.pop(name), archive.extractfile(member).read()
            (folder / name).write_bytes(png)
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
                raise UserError(f"{tarball}: {name} has the shape {pixels.shape}; others have {shape}")
            images.seek(start + (index - 1) * pixels.size)
            images.write(pixels.tobytes())  # not through a memory map, which kills the process when the disk is full
    if missing:
        raise UserError(f"{tarball} has no {next(iter(missing))}; {LABELS} has {count:,} lines")


def decode_png(tarball, index, png):
    """Pixels (H, W) uint8 of one PNG."""
    try:
        image = Image.open(io.BytesIO(png), formats=["PNG"])  # the header alone
        if image.mode not in ("L", "RGB") or max(image.size) > MAX_IMAGE_SIDE:
            raise ValueError(f"it is {image.mode} {image.size}, not L or RGB of at most {MAX_IMAGE_SIDE} pixels a side")
        pixels = np.atleast_3d(image)  # (H, W, 1) or (H, W, 3)
        if (pixels != pixels[:, :, :1]).any():
            raise ValueError("it has colours; its three channels must be equal")
    except Exception as error:  # Pillow raises a dozen kinds for a bad PNG
        reason = "it is not a PNG" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{tarball}: img_{index}.png cannot be used ({reason})") from None
    return pixels[:, :, 0]
