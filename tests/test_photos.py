"""data/photos.py: archives of small photos, made here."""

import numpy as np
import pytest
from conftest import encoded, write_tar
from PIL import Image

from data.photos import Photo, decode, load_photos
from experiment.files import UserError

COUNT = 12  # photos of each category: 2 for training, 10 to test


def photos_of(category, count=COUNT):
    """Photos by name, each of one shade."""
    number = category.split(".")[0]
    return {
        f"256_ObjectCategories/{category}/{number}_{index:04}.jpg": encoded(
            np.full((30, 40, 3), int(number) + index, np.uint8)
        )
        for index in range(1, count + 1)
    }


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


FILES = photos_of("002.mug") | photos_of("001.bike") | photos_of("010.mouse", 15)


@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_archive(write, tmp_path):
    train, test, names, counts = load_photos(write(tmp_path / "archive", FILES))
    assert names == ["bike", "mug", "mouse"]
    assert counts == {}
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert test.labels.tolist() == 10 * [0, 1, 2]
    name = [photo.name.split("/")[-1] for photo in (*train.images, *test.images)]
    assert name[:5] == ["001_0001.jpg", "001_0002.jpg", "002_0001.jpg", "002_0002.jpg", "010_0001.jpg"]
    assert name[9:13] == ["001_0003.jpg", "002_0003.jpg", "010_0006.jpg", "001_0004.jpg"]
    assert len(set(name)) == len(FILES)
    for photo, label in zip(test.images, test.labels, strict=True):
        shade = int(photo.name[-12:-9]) + int(photo.name[-8:-4])
        assert photo.name.split("/")[-2].endswith(names[label])
        assert abs(int(decode(photo, 25, 20).mean()) - shade) <= 1


def test_categories_by_name_and_folder(tmp_path):
    archive = write_tar(tmp_path / "archive.tar", FILES)
    train, test, names, _ = load_photos(archive, ["mouse", "001.bike"])
    assert names == ["bike", "mouse"]
    assert set(train.labels) == set(test.labels) == {0, 1}
    with pytest.raises(UserError, match="no category 'tea'; it has bike, mug, mouse"):
        load_photos(archive, ["mouse", "tea"])


def test_what_is_out_of_the_ordinary(tmp_path):
    grey = np.full((30, 40), 100, np.uint8)
    files = FILES | {
        "256_ObjectCategories/001.bike/001_0013.jpg": encoded(grey),
        "256_ObjectCategories/001.bike/001_0014.jpg": encoded(grey, "PNG"),
        "256_ObjectCategories/001.bike/001_0015.jpg": b"no photo",
        "256_ObjectCategories/001.bike/001_0016.jpg": encoded(np.zeros((300, 300, 3), np.uint8))[:900],
        "256_ObjectCategories/001.bike/001_0017.jpg": b"",
        "256_ObjectCategories/001.bike/RENAME2": b"a list",
        "256_ObjectCategories/001.bike/002_0001.jpg": encoded(grey),
        "256_ObjectCategories/003.a\nb/003_0001.jpg": encoded(grey),
    }
    train, test, _, counts = load_photos(write_tar(tmp_path / "archive.tar", files))
    assert counts == {
        "unreadable photos left out": 2,
        "files with other names or sizes left out": 4,
    }
    assert len(train.images) + len(test.images) == len(FILES) + 2
    last = [photo for photo, label in zip(test.images, test.labels, strict=True) if label == 0][-2:]
    assert [decode(photo, 30, 20).shape for photo in last] == [(20, 20, 3)] * 2


def test_archives_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match=r"missing\.tar is missing"):
        load_photos(tmp_path / "missing.tar")
    (tmp_path / "text.tar").write_text("no archive")
    with pytest.raises(UserError, match=r"text\.tar is not a complete \.tar"):
        load_photos(tmp_path / "text.tar")
    whole = write_tar(tmp_path / "whole.tar", FILES).read_bytes()
    (tmp_path / "half.tar").write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(UserError, match=r"half\.tar is not a complete \.tar"):
        load_photos(tmp_path / "half.tar")
    with pytest.raises(UserError, match=r"other\.tar has no photos"):
        load_photos(write_tar(tmp_path / "other.tar", {"photo.jpg": b"?"}))
    with pytest.raises(UserError, match=r"003\.cup has 10 photos; at least 11"):
        load_photos(write_tar(tmp_path / "few.tar", FILES | photos_of("003.cup", 10)))
    twice = {f"copy/{name}": content for name, content in photos_of("001.bike").items()}
    with pytest.raises(UserError, match=r"duplicate photos of 001\.bike"):
        load_photos(write_folder(tmp_path / "twice", FILES | twice))


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (70, 70), (20, 33)])
def test_crops(size, tmp_path):
    """Red rises to the right and green downwards, so that the colours of a crop tell where it lies."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / (width - 1), y * 255 / (height - 1), 0 * x], axis=2).round().astype(np.uint8)
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(pixels, "PNG"))
    photo = Photo(path.name, path, 0, path.stat().st_size)

    # At the centre: as scaling all of it and cutting out the middle does.
    scale = 40 / min(size)
    scaled = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (scaled.width - 32) // 2, (scaled.height - 32) // 2
    expected = np.asarray(scaled)[top : top + 32, left : left + 32].astype(int)
    assert np.abs(decode(photo, 40, 32) - expected).max() <= 8

    crops = [decode(photo, 40, 32, np.random.default_rng(seed)).astype(int) for seed in range(60)]
    np.testing.assert_array_equal(crops[0], decode(photo, 40, 32, np.random.default_rng(0)))
    mirrored = [crop[0, 0, 0] > crop[0, -1, 0] for crop in crops]
    assert 15 < sum(mirrored) < 45
    lefts = [crop[0, :, 0].min() * width / 255 * scale for crop in crops]
    tops = [crop[0, 0, 1] * height / 255 * scale for crop in crops]
    for places, length in ((lefts, width), (tops, height)):
        room = length * scale - 32
        assert min(places) < 0.15 * room + 1
        assert 0.8 * room < max(places) < room + 1


def test_a_photo_that_was_turned_in_the_camera(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    image, path = Image.fromarray(pixels), tmp_path / "photo.jpg"
    exif = image.getexif()
    exif[0x0112] = 6  # turn it clockwise to see it upright
    image.save(path, exif=exif)
    crop = decode(Photo(path.name, path, 0, path.stat().st_size), 20, 20)
    assert crop[:8].mean() < 20
    assert crop[-8:].mean() > 235
