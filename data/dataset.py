"""The cluttered-MNIST files: the one place that knows, checks and reads them.

A data folder holds

    mnist_cluttered.tar.gz   img_1.png ... img_N.png, all of one size; grey, or RGB with three equal channels
    labels.txt               "index<TAB>label" a line, index from 1, label 0..9
    boxes.txt                "index<TAB>x0<TAB>y0<TAB>x1<TAB>y1" a line, half-open, in pixels; may be missing

The first 70% of the images, in file order, are the training set, the rest is the test set.
"""

import gzip
import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from files import hold

TARBALL, LABELS, BOXES = "mnist_cluttered.tar.gz", "labels.txt", "boxes.txt"
CLASSES = 10
LOCK = "img.lock"  # of the process that extracts or generates
ROOT = Path(__file__).resolve().parent.parent
FEW = 1000  # images, for which a second process is not worth its start
PNG = struct.Struct("<QQ")  # before the bytes of a PNG in a pipe: its index and their number

# Limits. What a file claims about itself is checked against them before memory or disk is taken.
LARGEST_MEMBER = 1 << 20  # bytes; a PNG of 100 x 100 has about 600
LARGEST_HEADER = 1 << 16  # bytes of tar headers before a member
LARGEST_SIDE = 1000  # pixels
LARGEST_TABLE = 1 << 24  # bytes of labels.txt or boxes.txt; enough for a million lines


class DataError(ValueError):
    """A file of the data set is missing or wrong; the message names it."""


class Part(NamedTuple):
    """The training or the test set: N images of H x W pixels."""

    images: np.ndarray  # (N, H, W, 1) uint8, black is 0
    labels: np.ndarray  # (N,) int64, 0..9
    boxes: np.ndarray | None  # (N, 4) int64: x0, y0, x1, y1 around the digit, half-open; None without boxes.txt


def load_dataset(folder):
    """Reads a data folder; the first call extracts and decodes its tarball into `img/`.

    Args:
        folder: Path of the data folder.

    Returns:
        The training `Part` and the test `Part`. Their images are views of one array mapped from disk.

    Raises:
        DataError: A file is missing, broken, or does not fit the others.
    """
    folder = Path(folder)
    labels = read_table(folder / LABELS, columns=1)[:, 0]
    if labels.max() >= CLASSES:
        line = int(np.argmax(labels >= CLASSES)) + 1
        raise DataError(f"{folder / LABELS}, line {line}: label {labels[line - 1]} is not in 0..{CLASSES - 1}")
    images = load_images(folder / TARBALL, folder / "img", count=len(labels))
    boxes = read_table(folder / BOXES, columns=4) if (folder / BOXES).exists() else None
    if boxes is not None:
        check_boxes(folder / BOXES, boxes, images)

    training = len(labels) * 7 // 10
    parts = slice(None, training), slice(training, None)
    return tuple(Part(images[part], labels[part], None if boxes is None else boxes[part]) for part in parts)


def read_table(path, columns):
    """Reads lines of "index<TAB>number ...", index 1, 2, 3 ... in order, as an int64 array (lines, columns)."""
    try:
        if path.stat().st_size > LARGEST_TABLE:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST_TABLE:,} are read")
        lines = path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; a data folder holds {TARBALL} and {LABELS}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a text file of numbers") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(rf"[0-9]{{1,9}}(\t[0-9]{{1,9}}){{{columns}}}", line):
            raise DataError(f"{path}, line {number}: {line[:40]!r} is not {columns + 1} numbers with tabs between")
        index, *row = map(int, line.split("\t"))
        if index != number:
            raise DataError(f"{path}, line {number}: index {index} where {number} is due")
        rows.append(row)
    if len(rows) < 2:
        raise DataError(f"{path} has {len(rows)} lines; a training and a test image need 2")
    return np.array(rows)


def check_boxes(path, boxes, images):
    if len(boxes) != len(images):
        raise DataError(f"{path} has {len(boxes):,} lines for {len(images):,} images")
    height, width = images.shape[1:3]
    x0, y0, x1, y1 = boxes.T
    wrong = (x0 >= x1) | (y0 >= y1) | (x1 > width) | (y1 > height)
    if wrong.any():
        line = int(np.argmax(wrong)) + 1
        raise DataError(f"{path}, line {line}: {boxes[line - 1].tolist()} is no box in {width} x {height} pixels")


def load_images(tarball, folder, count):
    """Maps the tarball's images from `folder`/images.npy, which is made first if it is not this tarball's.

    Returns:
        Array (count, H, W, 1) uint8, read-only.
    """
    try:
        with tarball.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"{tarball} is missing; data/generate.py makes one") from None
    images = extracted(folder, checksum)
    if images is None:
        with hold(folder.with_name(LOCK)):
            images = extracted(folder, checksum)  # by another process, meanwhile
            if images is None:
                images = extract(tarball, folder, count, checksum)
    if len(images) != count:
        raise DataError(f"{tarball} has {len(images):,} images, {tarball.with_name(LABELS)} has {count:,} lines")
    return images


def extracted(folder, checksum):
    """Maps `folder`/images.npy if it is there, whole, and of the tarball with this checksum; else None."""
    try:
        if (folder / "SHA256").read_text() == checksum:
            return np.load(folder / "images.npy", mmap_mode="r")
    except (OSError, ValueError):
        pass
    return None


def extract(tarball, folder, count, checksum):
    """Makes `folder` in a temporary one, then renames that: it is complete at any moment, or not there."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    try:
        decode(tarball, part, count)
        (part / "SHA256").write_text(checksum)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return extracted(folder, checksum)


def decode(tarball, folder, count):
    """Writes img_1.png ... img_{count}.png of the tarball to `folder`, and their pixels to `folder`/images.npy."""
    pngs = extract_pngs(tarball, folder, count)
    if count < FEW:
        write_pixels(pngs, tarball, folder, count)
        return
    # This process extracts, another one decodes. Either is mostly Python's own work, which threads would not share.
    command = [sys.executable, "-m", "data.dataset", tarball, folder.resolve(), str(count)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # Ctrl-C, which a session of its own keeps from it, ends this process, and that closes the pipe.
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as decoder:
        try:
            with decoder.stdin:
                for index, png in pngs:
                    decoder.stdin.write(PNG.pack(index, len(png)) + png)
        except BrokenPipeError:
            pass  # it has ended, and says why
        message = os.fsdecode(decoder.stdout.read())
    if decoder.returncode:
        raise DataError(message or f"{tarball}: the process that decodes it ended with code {decoder.returncode}")


def decode_from_pipe(tarball, folder, count):
    """The other process of `decode`: its standard input has each PNG's index, length and bytes."""
    try:
        write_pixels(read_pngs(sys.stdin.buffer), tarball, Path(folder), int(count))
    except (DataError, OSError) as error:
        sys.stdout.buffer.write(os.fsencode(str(error)))
        sys.exit(1)


def read_pngs(pipe):
    """Yields (index, bytes) of each PNG in a pipe, but not of a last one that a killed writer has cut short."""
    while len(header := pipe.read(PNG.size)) == PNG.size:
        index, size = PNG.unpack(header)
        png = pipe.read(size)
        if len(png) == size:
            yield index, png


def extract_pngs(tarball, folder, count):
    """Writes the PNGs of the tarball to `folder`, and yields (index, bytes) of each."""
    missing = set(range(1, count + 1))
    try:
        with (
            gzip.open(tarball) as unzipped,
            tarfile.open(fileobj=(limited := Limited(unzipped)), mode="r:") as archive,
        ):
            members = progress(png_members(tarball, archive, limited, count), count, f"extracting {tarball}")
            for index, png in members:
                if index not in missing:
                    raise DataError(f"{tarball}: img_{index}.png is there twice, or {LABELS} has no line for it")
                missing.remove(index)
                (folder / f"img_{index}.png").write_bytes(png)
                yield index, png
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RecursionError) as error:
        raise DataError(f"{tarball} is not a complete .tar.gz ({error}); get or generate it again") from None
    if missing:
        raise DataError(f"{tarball} has no img_{min(missing)}.png; {LABELS} has {count:,} lines")


def write_pixels(pngs, tarball, folder, count):
    """Decodes PNGs, given as (index, bytes), into `folder`/images.npy."""
    shape = None
    with (folder / "images.npy").open("wb") as images:
        for index, png in pngs:
            pixels = decode_png(tarball, index, png)
            if shape is None:
                shape = pixels.shape  # (H, W)
                check_space(tarball, folder, count * pixels.size)
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape, 1)}
                np.lib.format.write_array_header_1_0(images, header)
                first = images.tell()
            if pixels.shape != shape:
                raise DataError(
                    f"{tarball}: img_{index}.png has {pixels.shape[1]} x {pixels.shape[0]} pixels, "
                    f"others have {shape[1]} x {shape[0]}"
                )
            images.seek(first + (index - 1) * pixels.size)
            images.write(pixels.tobytes())  # not mapped: on a full disk a mapped file kills the process


def check_space(tarball, folder, pixels):
    needed, free = 2 * pixels, shutil.disk_usage(folder).free  # the pixels, and at most about as much for the PNGs
    if needed > free:
        raise OSError(f"{tarball} needs up to {needed / 1e9:.1f} GB in {folder.parent}; {free / 1e9:.1f} GB are free")


class Limited:
    """A file from which only so much is read as one member of a tarball may have, whatever its header claims."""

    def __init__(self, file):
        self.file, self.seek, self.tell = file, file.seek, file.tell
        self.next_member()

    def next_member(self):
        self.left = LARGEST_HEADER + LARGEST_MEMBER

    def read(self, size):
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError("its headers are too long")
        return self.file.read(size)


def png_members(tarball, archive, limited, count):
    """Yields (index, bytes) of each img_{index}.png; anything else in the archive is an error."""
    for position, member in enumerate(archive):
        name = re.fullmatch(r"(?:\./)?img_([1-9][0-9]{0,8})\.png", member.name)
        if position > count:  # one more than the images, for the folder
            raise DataError(f"{tarball} has more files than the {count:,} of {LABELS}")
        if member.isdir() and member.name == ".":
            continue
        if not (name and member.isreg() and member.size <= LARGEST_MEMBER):
            raise DataError(f"{tarball}: {member.name[:80]!r} is not a file img_1.png, img_2.png ... of at most 1 MiB")
        yield int(name[1]), archive.extractfile(member).read()
        limited.next_member()


def decode_png(tarball, index, png):
    """Pixels (H, W) uint8 of one PNG."""
    try:
        image = Image.open(io.BytesIO(png), formats=["PNG"])
        known = image.mode in ("L", "RGB") and max(image.size) <= LARGEST_SIDE
        pixels = np.asarray(image) if known else None
    except Exception as error:  # Pillow raises a dozen kinds for a bad PNG
        raise DataError(f"{tarball}: img_{index}.png cannot be decoded ({error})") from None
    if pixels is None:
        raise DataError(
            f"{tarball}: img_{index}.png is {image.mode}, {image.width} x {image.height}; "
            f"8-bit grey or RGB of at most {LARGEST_SIDE} x {LARGEST_SIDE} is read"
        )
    if pixels.ndim == 3:
        if (pixels != pixels[:, :, :1]).any():
            raise DataError(f"{tarball}: img_{index}.png has colours; three equal channels are read")
        pixels = pixels[:, :, 0]
    return pixels


def progress(items, total, what):
    """Yields the items; shows how many have passed and the time left, on a terminal only."""
    start = shown = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if sys.stderr.isatty() and now - shown > 0.2:
            shown = now
            left = (now - start) / (done + 1) * (total - done)
            print(f"\r{what}: {done:,} of {total:,}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
        yield item
    if shown > start:
        print(f"\r{what}: {total:,} in {time.monotonic() - start:.0f} s" + " " * 20, file=sys.stderr)


if __name__ == "__main__":
    decode_from_pipe(*sys.argv[1:])
