"""Whatever the files hold and whatever the maps are: an error of the documented kind, or a right result.

`pytest tests/test_properties.py --hypothesis-profile=fuzz` tries 10,000 cases of each.
"""

import gzip
import io
import re
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import png, write_data
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cam
from data.dataset import TARBALL, decode_png, load_dataset, read_table
from experiment.files import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 9), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good data folder of six images, and the bytes of its files."""
    folder = write_data(tmp_path_factory.mktemp("good"), IMAGES, LABELS, boxes=[(1, 2, 4, 6)] * 6)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(function, *arguments):
    """What the function returns, or the message of the UserError by which it refuses its arguments."""
    try:
        return function(*arguments)
    except UserError as error:
        return str(error)


def load(files):
    """Reads a data folder of these files; returns its images, labels and boxes, or None if it was refused.

    Nothing may come to lie beside the folder, or be left in it, but the images of a good one.
    """
    with tempfile.TemporaryDirectory() as outside:
        folder = Path(outside) / "data"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        parts = refused(load_dataset, folder)
        assert [path.name for path in Path(outside).iterdir()] == ["data"]
        made = {path.name for path in folder.iterdir()} - set(files) - {"img.lock"}
        assert made <= {"img"}
        if isinstance(parts, str):
            return None
        images, labels, boxes = (np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[:3])
        pngs = {f"img_{index + 1}.png" for index in range(len(labels))}
        assert {path.name for path in (folder / "img").iterdir()} == {"checksums", "images.npy"} | pngs
        return images, labels, boxes


def mutated(content, changes):
    """Bytes with some of them replaced, inserted or cut."""
    content = bytearray(content)
    for place, kind, byte in changes:
        place %= len(content) + 1
        content[place : place + (kind != "insert")] = b"" if kind == "cut" else bytes([byte])
    return bytes(content)


CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.sampled_from(["replace", "insert", "cut"]), st.integers(0, 255)), max_size=4
)


@given(CHANGES)
@example([])
def test_a_changed_tarball(good, changes):
    loaded = load(good | {TARBALL: mutated(good[TARBALL], changes)})
    assert loaded or changes
    if loaded:  # the change did not matter
        images, labels, boxes = loaded
        np.testing.assert_array_equal(images[..., 0], IMAGES)
        assert labels.tolist() == LABELS
        assert boxes.tolist() == [[1, 2, 4, 6]] * 6
    tar = mutated(gzip.decompress(good[TARBALL]), changes)
    load(good | {TARBALL: gzip.compress(tar, 1)})  # whatever it is now, it is read or refused


NAME = st.one_of(
    st.integers(0, 8).map("img_{}.png".format),
    st.sampled_from(["../img_1.png", "/img_1.png", ".", "./img_1.png", "img_01.png", "IMG_1.PNG"]),
    st.text(max_size=20),
)
KIND = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
CONTENT = st.one_of(st.integers(0, 5).map(lambda index: png(IMAGES[index])), st.binary(max_size=50))
FORMAT = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@given(st.lists(st.tuples(NAME, KIND, CONTENT), max_size=9), FORMAT)
def test_any_members(good, members, form):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", format=form) as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "img_1.png"
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            try:
                archive.addfile(member, io.BytesIO(content))
            except (ValueError, UnicodeError):  # a name that no tarball can have
                return
    loaded = load(good | {TARBALL: file.getvalue()})
    names = [name.removeprefix("./") for name, _, _ in members if name != "."]
    if loaded:
        assert sorted(names) == [f"img_{index}.png" for index in range(1, 7)]
    else:
        all_good = all(kind == tarfile.REGTYPE and content.startswith(b"\x89PNG") for _, kind, content in members)
        assert not (all_good and len(members) == 6 and set(names) == {f"img_{index}.png" for index in range(1, 7)})


@given(CHANGES)
@example([(11, "replace", 0)])  # a chunk IHDR without a byte
def test_a_changed_png(changes):
    found = refused(decode_png, Path("tarball"), 1, mutated(png(IMAGES[0]), changes))
    if isinstance(found, str):
        assert "img_1.png" in found
    else:
        assert found.dtype == np.uint8
        assert found.ndim == 2


NUMBER = st.one_of(st.integers(-2, 12).map(str), st.text(alphabet="0123456789 -+.exI\ta٣", max_size=6))
LINES = st.lists(st.lists(NUMBER, min_size=1, max_size=6).map("\t".join), max_size=8)


@given(LINES, st.sampled_from(["\n", "\r\n"]), st.sampled_from([1, 4]))
@example(["1\t3", "2\t000"], "\r\n", 1)
@example(["1\t3", "3\t4"], "\n", 1)
def test_any_table(lines, end, columns):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.txt"
        path.write_text("".join(line + end for line in lines), encoding="utf-8", newline="")
        table = refused(read_table, path, columns)
    numbers = [line.split("\t") for line in lines]
    plain = all(re.fullmatch("[0-9]{1,9}", number) for line in numbers for number in line)
    if len(lines) < 2 or not plain or {len(line) for line in numbers} != {columns + 1}:
        assert "table.txt" in table
    elif [int(line[0]) for line in numbers] != list(range(1, len(lines) + 1)):
        assert re.search("table.txt, line [0-9]+: the index", table)
    else:
        np.testing.assert_array_equal(table, [[int(number) for number in line[1:]] for line in numbers])


MAPS = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9),
    elements=st.floats(width=32),
)


@given(MAPS)
@example(np.array([[[1, np.nan]]]))
@example(np.array([[[1, np.inf]]]))
@example(np.array([[[1, -np.inf]]]))
def test_any_map(maps):
    if not np.isfinite(maps).all():
        for function in cam.normalize, lambda maps: [cam.bounding_box(one) for one in maps]:
            with pytest.raises(ValueError, match="not finite"):
                function(maps)
        return
    normalized = cam.normalize(maps)
    for class_map, shades in zip(maps, normalized, strict=True):
        picture = cam.overlay(np.zeros(class_map.shape, np.uint8), shades)
        assert picture.shape == (*class_map.shape, 3)
        if class_map.min() == class_map.max():
            assert not shades.any()
        else:
            assert (shades.min(), shades.max()) == (0, 1)
            assert shades[np.unravel_index(class_map.argmax(), class_map.shape)] == 1
    boxes = [cam.bounding_box(one) for one in maps]
    height, width = maps.shape[1:]
    for class_map, box in zip(maps, boxes, strict=True):
        assert (box is None) == (class_map.max() <= 0)
        if box:
            x0, y0, x1, y1 = box
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height


@given(MAPS, st.integers(1, 20), st.integers(1, 20))
def test_an_upsampled_map_is_between_its_minimum_and_maximum(maps, height, width):
    maps = np.where(np.abs(maps) < 1e30, maps, 0).astype(np.float32)  # NaN, infinite, or near it
    large = cam.upsample(maps, height, width)
    assert large.shape == (len(maps), height, width)
    # Subnormal values are flushed to zero.
    slack = np.maximum(1e-5 * np.abs(maps).max(axis=(1, 2)), np.finfo(np.float32).tiny)
    assert (large.min(axis=(1, 2)) >= maps.min(axis=(1, 2)) - slack).all()
    assert (large.max(axis=(1, 2)) <= maps.max(axis=(1, 2)) + slack).all()
