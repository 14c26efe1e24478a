"""data/dataset.py: what it reads, and what it says of files that are wrong."""

import gzip
import io
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
from conftest import png, write_data

from data import dataset
from data.dataset import load_dataset
from experiment.files import UserError

TARBALL = "mnist_cluttered.tar.gz"
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 0]
BOXES = [(index, 1, index + 2, 20) for index in range(10)]


def test_the_first_seventy_percent_are_the_training_set(tmp_path, random_images):
    train, test = load_dataset(write_data(tmp_path, random_images, LABELS, BOXES))
    np.testing.assert_array_equal(train.images[..., 0], random_images[:7])
    np.testing.assert_array_equal(test.images[..., 0], random_images[7:])
    assert train.labels.tolist() == LABELS[:7]
    assert test.labels.tolist() == LABELS[7:]
    assert train.boxes.tolist() == [list(box) for box in BOXES[:7]]
    assert test.boxes.tolist() == [list(box) for box in BOXES[7:]]
    assert train.images.dtype == np.uint8


def test_the_originals_files_rgb_without_boxes(tmp_path, random_images):
    train, _ = load_dataset(write_data(tmp_path, np.stack([random_images] * 3, axis=-1), LABELS))
    np.testing.assert_array_equal(train.images[..., 0], random_images[:7])
    assert train.boxes is None


def test_file_order_in_the_tarball_does_not_matter(tmp_path, random_images):
    names = [f"./img_{10 - index}.png" for index in range(10)]
    _, test = load_dataset(write_data(tmp_path, random_images, LABELS, names=names))
    np.testing.assert_array_equal(test.images[..., 0], random_images[2::-1])


def test_a_second_start_decodes_nothing(tmp_path, random_images, monkeypatch):
    folder = write_data(tmp_path, random_images, LABELS)
    load_dataset(folder)
    monkeypatch.setattr(dataset, "extract", lambda *arguments: pytest.fail("extracted again"))
    train, _ = load_dataset(folder)
    np.testing.assert_array_equal(train.images[..., 0], random_images[:7])
    assert sorted(path.name for path in (folder / "img").glob("*.png"))[:3] == ["img_1.png", "img_10.png", "img_2.png"]


@pytest.mark.parametrize("damaged", [None, b"nothing", b"", "a byte"])
def test_images_of_another_tarball_or_damaged_ones_are_extracted_again(tmp_path, random_images, damaged):
    load_dataset(write_data(tmp_path, random_images, LABELS))
    if damaged is None:
        random_images = 255 - random_images
        write_data(tmp_path, random_images, LABELS)
    else:
        cache = tmp_path / "img" / "images.npy"
        whole = cache.read_bytes()
        cache.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damaged == "a byte" else damaged)
    train, _ = load_dataset(tmp_path)
    np.testing.assert_array_equal(train.images[..., 0], random_images[:7])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("1\t3\n2\n", r", line 2: 2 whole numbers are needed, separated by tabs"),
        ("1\n2\n", r", line 1: 2 whole numbers"),
        ("1\t3\n2\t4\t5\n", r", line 2: 2 whole numbers"),
        ("1\t3\n2\tnine\n", r", line 2: 2 whole numbers"),
        ("1\t3\n2\t-1\n", r", line 2: 2 whole numbers"),
        ("1\t3\n2\t1_0\n", r", line 2: 2 whole numbers"),
        ("1\t3\n2\t99999999999999999999\n", r", line 2: 2 whole numbers"),
        ("1\té\n2\t4\n", r", line 1: 2 whole numbers"),
        ("1\t3\n3\t4\n", r", line 2: the index is not the number of the line"),
        ("1\t3\n1\t4\n", r", line 2: the index is not the number of the line"),
        ("1\t3\n2\t10\n", r", line 2: the label is not in 0\.\.9"),
        ("", r" has 0 lines; it must have at least 2"),
        ("1\t3\n", r" has 1 lines; it must have at least 2"),
    ],
)
def test_wrong_labels(tmp_path, random_images, content, says):
    folder = write_data(tmp_path, random_images, LABELS)
    (folder / "labels.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"labels\.txt{says}"):
        load_dataset(folder)


@pytest.mark.parametrize("box", [(5, 1, 5, 9), (5, 9, 6, 9), (0, 0, 31, 5), (0, 0, 5, 21)])
def test_wrong_boxes(tmp_path, random_images, box):
    boxes = [*BOXES[:2], box, *BOXES[3:]]
    with pytest.raises(UserError, match=r"boxes\.txt, line 3: this is not a box in 30 x 20 pixels"):
        load_dataset(write_data(tmp_path, random_images, LABELS, boxes))
    with pytest.raises(UserError, match=r"boxes\.txt has 9 lines for 10 images"):
        load_dataset(write_data(tmp_path, random_images, LABELS, BOXES[:9]))


GREY = np.zeros((20, 30), np.uint8)
COLOURED = np.zeros((20, 30, 3), np.uint8)
COLOURED[5, 5] = 1, 2, 3


@pytest.mark.parametrize(
    ("image", "name", "says"),
    [
        (np.zeros((20, 31), np.uint8), "img_10.png", "img_10.png has the shape (20, 31); others have (20, 30)"),
        (b"not a PNG", "img_10.png", "img_10.png cannot be used (it is not a PNG)"),
        (png(np.eye(20, 30, dtype=np.uint8))[:50], "img_10.png", "img_10.png cannot be used (image file is truncated"),
        (COLOURED, "img_10.png", "img_10.png cannot be used (it has colours"),
        (np.zeros((20, 30), np.uint16), "img_10.png", "img_10.png cannot be used (it is I;16"),
        (np.zeros((1, 2000), np.uint8), "img_10.png", "img_10.png cannot be used (it is L (2000, 1)"),
        (GREY, "img_9.png", "'img_9.png' is a duplicate, or not one of img_1.png ... img_10.png"),
        (GREY, "img_11.png", "'img_11.png' is a duplicate, or not one of img_1.png ... img_10.png"),
        (GREY, "../img_10.png", "'../img_10.png' is a duplicate, or not one of img_1.png"),
        (GREY, "/tmp/img_10.png", "img_10.png' is a duplicate, or not one of img_1.png"),
        (bytes(2 << 20), "img_10.png", "img_10.png is not a file of at most 1,048,576 bytes"),
    ],
)
def test_wrong_images(tmp_path, random_images, image, name, says):
    names = [f"img_{index}.png" for index in range(1, 10)] + [name]
    folder = write_data(tmp_path / "data", [*random_images[:9], image], LABELS, names=names)
    with pytest.raises(UserError) as error:
        load_dataset(folder)
    assert says in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "img.lock", "labels.txt", TARBALL]
    load_dataset(write_data(folder, random_images, LABELS))  # the next good tarball works


def test_too_few_and_too_many_images(tmp_path, random_images):
    with pytest.raises(UserError, match=r"has no img_10\.png; labels\.txt has 10 lines"):
        load_dataset(write_data(tmp_path, random_images[:9], LABELS))
    load_dataset(write_data(tmp_path, random_images, LABELS))
    for count in 2, 9:
        (tmp_path / "labels.txt").write_text("".join(f"{index}\t3\n" for index in range(1, count + 1)))
        with pytest.raises(UserError, match=rf"'img_{count + 1}\.png' is a .*; labels\.txt has {count} lines"):
            load_dataset(tmp_path)


def header(name="img_1.png", kind=tarfile.REGTYPE, size=0):
    """The 512 bytes by which a member begins."""
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size, "/etc/passwd"
    return member.tobuf(tarfile.GNU_FORMAT)


def huge_png(side):
    """A PNG of a hundred bytes that claims to have side x side pixels, as a member."""
    start = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d"
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    content = start + chunk + struct.pack(">I", zlib.crc32(chunk)) + png(GREY)[33:]
    return [header(size=len(content)), content, bytes(-len(content) % 512)]


SPARSE = bytearray(header(kind=tarfile.GNUTYPE_SPARSE))
SPARSE[482] = 1  # its map goes on in further blocks
SPARSE[148:156] = b"%06o\0 " % tarfile.calc_chksums(SPARSE)[0]
SPARSE_MAP = (b"00000000001\0" * 42 + b"\1").ljust(512, b"\0")
MEGABYTE = bytes(1 << 20)
LONG = "its headers are too long"
HOSTILE = {  # pieces of a tarball, and the message
    "symbolic link": ([header(kind=tarfile.SYMTYPE)], "img_1.png is not a file"),
    "hard link": ([header(kind=tarfile.LNKTYPE)], "img_1.png is not a file"),
    "device": ([header(kind=tarfile.CHRTYPE)], "img_1.png is not a file"),
    "pipe": ([header(kind=tarfile.FIFOTYPE)], "img_1.png is not a file"),
    "folder": ([header(kind=tarfile.DIRTYPE)], "img_1.png is not a file"),
    "parent": ([header("..", kind=tarfile.DIRTYPE)], "'..' is a duplicate, or not one of img_1.png"),
    "100 MB": ([header(size=100 << 20), *[MEGABYTE] * 100], "img_1.png is not a file of at most"),
    "8 TB": ([header(size=1 << 43)], "img_1.png is not a file of at most"),
    "long extended header": ([header(kind=tarfile.XHDTYPE, size=200 << 20), *[MEGABYTE] * 200], LONG),
    "long name": ([header(kind=tarfile.GNUTYPE_LONGNAME, size=200 << 20), *[MEGABYTE] * 200], LONG),
    "long sparse map": ([SPARSE, *[SPARSE_MAP * 2000] * 10], LONG),
    "chain of headers": ([header(kind=tarfile.XHDTYPE)] * 100_000, LONG),
    "no number": ([header(kind=tarfile.XHDTYPE, size=21), b"21 GNU.sparse.size=x\n".ljust(512), header()], "invalid"),
    "a million members": ([header(".", kind=tarfile.DIRTYPE)] * 1_000_000, "'.' is a duplicate"),
    "large": (huge_png(5_000), "img_1.png cannot be used (it is L (5000, 5000)"),
    "bomb": (huge_png(50_000), "img_1.png cannot be used (Image size (25000"),
}


@pytest.mark.parametrize(("pieces", "says"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_tarballs(tmp_path, pieces, says):
    folder = write_data(tmp_path / "data", [], LABELS)
    with gzip.open(folder / TARBALL, "wb", compresslevel=1) as file:
        for piece in pieces:
            file.write(piece)
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        load_dataset(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert TARBALL in str(error.value)
    assert says in str(error.value)
    assert peak < 20e6  # bytes
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "img.lock", "labels.txt", TARBALL]


def test_a_table_of_gigabytes_is_not_read(tmp_path, random_images):
    folder = write_data(tmp_path, random_images, LABELS)
    with (folder / "labels.txt").open("r+b") as file:
        file.truncate(10 << 30)  # holes: it takes no space
    with pytest.raises(UserError, match=r"labels\.txt has 10,737,418,240 bytes; the limit is"):
        load_dataset(folder)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not a tarball", "empty", "empty archive"])
def test_broken_tarballs(tmp_path, random_images, damage):
    folder = write_data(tmp_path / "data", random_images, LABELS)
    load_dataset(folder)
    good = (folder / TARBALL).read_bytes()
    middle = len(good) // 2
    tarfile.open(fileobj=(empty := io.BytesIO()), mode="w:gz").close()
    broken = {
        "truncated": good[:middle],
        "flipped": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
        "not a tarball": b"hello",
        "empty": b"",
        "empty archive": empty.getvalue(),
    }
    (folder / TARBALL).write_bytes(broken[damage])
    with pytest.raises(UserError, match=r"mnist_cluttered\.tar\.gz"):
        load_dataset(folder)
    # What was extracted from the good tarball is still there, and used when that comes back.
    assert len(list((folder / "img").glob("*.png"))) == 10
    (folder / TARBALL).write_bytes(good)
    load_dataset(folder)


def test_missing_files(tmp_path, random_images):
    with pytest.raises(UserError, match=r"labels\.txt is missing"):
        load_dataset(tmp_path / "nowhere")
    folder = write_data(tmp_path, random_images, LABELS)
    (folder / TARBALL).unlink()
    with pytest.raises(UserError, match=r"mnist_cluttered\.tar\.gz is missing"):
        load_dataset(folder)
