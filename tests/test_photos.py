"""data/photos.py: archives of small photos, made here."""

import gzip
import io
import tarfile

import numpy as np
import pytest
from conftest import encoded, write_tar
from PIL import Image

from data.archive import File
from data.photos import crop_boxes, decode, load_all_photos, load_photos
from experiment.files import UserError, acquire_lock

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


def names_of(photos):
    return [photo.name.split("/")[-1] for photo in photos.files]


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def assert_refused(message, archive, *chosen, **options):
    """`load_photos` refuses the archive, with a message that matches."""
    with pytest.raises(UserError, match=message):
        load_photos(archive, *chosen, **options)


FILES = photos_of("002.mug") | photos_of("001.bike") | photos_of("010.mouse", 15)


@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_archive(write, tmp_path):
    archive = write(tmp_path / "archive", FILES)
    train, test, names, counts = load_photos(archive)
    assert names == ["bike", "mug", "mouse"]
    assert counts == {}
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert test.labels.tolist() == 10 * [0, 1, 2]
    names_found = names_of(train) + names_of(test)
    assert names_found[:5] == ["001_0001.jpg", "001_0002.jpg", "002_0001.jpg", "002_0002.jpg", "010_0001.jpg"]
    assert names_found[9:13] == ["001_0003.jpg", "002_0003.jpg", "010_0006.jpg", "001_0004.jpg"]
    assert len(set(names_found)) == len(FILES)
    for photo, label in zip(test.files, test.labels, strict=True):
        shade = int(photo.name[-12:-9]) + int(photo.name[-8:-4])
        assert photo.name.split("/")[-2].endswith(names[label])
        assert abs(int(decode(photo, 25, 20).mean()) - shade) <= 1
    # Classes by name and by folder
    train, test, names, _ = load_photos(archive, ["mouse", "001.bike"])
    assert names == ["bike", "mouse"]
    assert set(train.labels) == set(test.labels) == {0, 1}
    assert_refused("no class 'tea'; it has bike, mug, mouse", archive, ["mouse", "tea"])


def test_what_is_out_of_the_ordinary(tmp_path):
    grey = np.full((30, 40), 100, np.uint8)
    files = FILES | {
        "256_ObjectCategories/001.bike/001_0013.jpg": encoded(grey),
        "256_ObjectCategories/001.bike/001_0014.jpg": encoded(grey, "PNG"),
        "256_ObjectCategories/001.bike/001_0015.jpg": b"no photo",
        "256_ObjectCategories/001.bike/001_0016.jpg": encoded(np.zeros((300, 300, 3), np.uint8))[:900],
        "256_ObjectCategories/001.bike/001_0017.jpg": b"",
        "256_ObjectCategories/001.bike/001_0018.jpg": encoded(np.zeros((20, 161, 3), np.uint8)),
        "256_ObjectCategories/001.bike/RENAME2": b"a list",
        "256_ObjectCategories/001.bike/002_0001.jpg": encoded(grey),
        "256_ObjectCategories/003.a\nb/003_0001.jpg": encoded(grey),
    }
    train, test, _, counts = load_photos(write_tar(tmp_path / "archive.tar", files))
    assert counts == {
        "unreadable photos left out": 2,
        "other files left out": 2,
        "photos elsewhere left out": 2,
        "photos longer than 8:1 left out": 1,
    }
    assert len(train.files) + len(test.files) == len(FILES) + 2
    last = [photo for photo, label in zip(test.files, test.labels, strict=True) if label == 0][-2:]
    assert [decode(photo, 30, 20).shape for photo in last] == [(20, 20, 3)] * 2


def test_archives_that_cannot_be_used(tmp_path):
    assert_refused(r"missing\.tar is missing", tmp_path / "missing.tar")
    (tmp_path / "text.tar").write_text("no archive")
    assert_refused(r"text\.tar is not a complete \.tar", tmp_path / "text.tar")
    tar = write_tar(tmp_path / "whole.tar", FILES)
    with tarfile.open(tar) as members:
        header = members.getmembers()[5].offset
    for end in header + 100, header + 600:  # in a header, and in a photo
        (tmp_path / "part.tar").write_bytes(tar.read_bytes()[:end])
        assert_refused(r"part\.tar is not a complete \.tar", tmp_path / "part.tar")
    assert_refused(r"other\.tar has photos of 0 classes", write_tar(tmp_path / "other.tar", {"photo.jpg": b"?"}))
    few = write_tar(tmp_path / "few.tar", FILES | photos_of("003.cup", 10))
    assert_refused("cup has 10 usable photos; at least 11", few)
    with tarfile.open(tar, "a") as members:
        members.addfile(members.getmembers()[0], io.BytesIO(next(iter(FILES.values()))))
    assert_refused("duplicate photos of mug", tar)
    copy = {f"copy/{name}": content for name, content in photos_of("001.bike").items()}
    assert load_photos(write_folder(tmp_path / "copy", FILES | copy))[3] == {"photos elsewhere left out": COUNT}


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (70, 70), (20, 33)])
def test_crops(size, tmp_path):
    """Red rises to the right and green downwards, so that the colours of a crop tell where it lies."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / (width - 1), y * 255 / (height - 1), 0 * x], axis=2).round().astype(np.uint8)
    path = tmp_path / "photo.png"
    photo = File(path.name, path, 0, path.write_bytes(encoded(pixels, "PNG")))

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


def shade(value, size=(40, 30)):
    return encoded(np.full((size[1], size[0], 3), value, np.uint8), "PNG")


PETS = {f"pets/{name}/{name} no {index:02}.PNG": shade(index) for name in ("cats", "dogs") for index in range(13)}
JUNK = {"pets/.DS_Store": b"1", "pets/cats/._cats no 01.png": shade(1), "__MACOSX/cats/a.png": shade(1)}
JUNK |= {"pets/README.txt": b"pets"}


def write_gz(path, files):
    path = path.with_name("pets.tar.gz")
    path.write_bytes(gzip.compress(write_tar(path.with_suffix(""), files).read_bytes()))
    path.with_suffix("").unlink()
    return path


@pytest.mark.parametrize("write", [write_tar, write_gz, write_folder])
@pytest.mark.parametrize("root", ["pets/", "", "a/b/"])
def test_a_folder_for_each_class(write, root, tmp_path):
    files = {name.replace("pets/", root): content for name, content in (PETS | JUNK).items()}
    files[f"{root}dogs/more/deeper.jpg"] = shade(200)
    files[f"{root}on its own.jpg"] = shade(200)
    archive = write(tmp_path / "pets", files)
    for _ in range(2):  # the second time a .tar.gz has been unpacked
        train, test, names, counts = load_photos(archive)
        assert names == ["cats", "dogs"]
        assert counts == {"other files left out": 4, "photos elsewhere left out": 1}
        assert names_of(train) == [f"cats no {k:02}.PNG" for k in range(3)] + [f"dogs no {k:02}.PNG" for k in range(4)]
        assert names_of(test)[-2:] == ["cats no 12.PNG", "deeper.jpg"]
        assert test.labels.tolist() == 10 * [0, 1]
        assert train.boxes is None


def test_a_tar_gz_that_cannot_be_unpacked(tmp_path):
    path = write_gz(tmp_path / "pets", PETS)
    lock = tmp_path / "pets.tar.gz.lock"
    with acquire_lock(lock):
        assert_refused("process .* uses", path)  # another process unpacks it
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes(4) + whole[-4:])  # the checksum
    assert_refused(r"pets\.tar\.gz is not a complete .*; get it again", path)
    path.write_bytes(whole)
    lock.unlink()
    lock.mkdir()
    assert_refused(r"pets\.tar\.gz cannot be .*unpacked beside itself \(Is a directory\); unpack it elsewhere", path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pets.tar.gz", "pets.tar.gz.lock"]


def test_a_tar_beside_a_tar_gz_stays_as_it_is(tmp_path):
    write_gz(tmp_path / "pets", PETS)
    for name in ("pets.tar", "renamed.tar"):
        (tmp_path / name).write_bytes(b"of the user" if name == "pets.tar" else (tmp_path / "pets.tar.gz").read_bytes())
    for name in ("pets.tar.gz", "renamed.tar"):  # whatever its name, it is a .tar.gz
        assert len(load_photos(tmp_path / name)[0].labels) == 6
    assert (tmp_path / "pets.tar").read_bytes() == b"of the user"


def test_a_share_of_each_class_as_test_set(tmp_path):
    archive = write_tar(tmp_path / "pets.tar", PETS | {"pets/emus/a.png": shade(1), "pets/emus/b.png": shade(2)})
    train, test, names, _ = load_photos(archive, test_share=0.25)
    assert names == ["cats", "dogs", "emus"]
    assert np.bincount(train.labels).tolist() == [10, 10, 1]
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert_refused("emus has 2 usable photos; at least 11 are needed", archive)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_a_training_and_a_test_set_are_taken_as_they_are(test_name, tmp_path):
    files = {f"pets/train/{name}/{k}.png": shade(k) for name in ("cats", "dogs") for k in range(3)}
    files |= {f"pets/{test_name}/dogs/{k}.png": shade(k) for k in range(2)} | {"pets/old/dogs/1.png": shade(1)}
    train, test, names, counts = load_photos(write_folder(tmp_path / "data", files))
    assert (names, train.labels.tolist(), test.labels.tolist()) == (["cats", "dogs"], [0, 0, 0, 1, 1, 1], [1, 1])
    assert counts == {"photos elsewhere left out": 1}
    assert_refused("--test-share is for data without one", tmp_path / "data", test_share=0.5)
    write_folder(tmp_path / "data", {f"pets/{test_name}/emus/1.png": shade(1)})
    assert_refused("emus is in the test set, but not in the training set", tmp_path / "data")


def test_folds_are_fifths_of_the_training_photos(tmp_path):
    emus = [f"{k:02}.png" for k in range(21)]
    archive = write_tar(tmp_path / "pets.tar", PETS | {f"pets/emus/{name}": shade(1) for name in emus})
    known = load_photos(archive, test_share=0.4)[0]
    found = []
    for fold in range(1, 6):
        train, test, _, _ = load_photos(archive, test_share=0.4, fold=fold)
        assert sorted(names_of(train) + names_of(test)) == sorted(names_of(known))
        found += names_of(test)
        places = [names_of(known).index(name) for name in names_of(test) if name in emus]
        assert places == list(range(places[0], places[-1] + 1))  # one piece of the class
    assert sorted(found) == sorted(names_of(known))
    assert_refused("cats has 3 usable training photos; --fold needs 5", archive, fold=1)


def test_numbers_that_tell_classes_apart_stay(tmp_path):
    files = {f"00{k}.cat/any {index}.png": shade(index) for k in (1, 2) for index in range(11)}
    train, _, names, _ = load_photos(write_tar(tmp_path / "cats.tar", {f"/{name}": files[name] for name in files}))
    assert names == ["001.cat", "002.cat"]
    assert train.labels.tolist() == [0, 1]


def test_empty_folders_and_unreadable_classes(tmp_path):
    folder = write_folder(tmp_path / "data", PETS)
    (folder / "pets" / "emus").mkdir()
    assert load_photos(folder)[3] == {"empty folders left out": 1}
    (folder / "pets" / "emus" / "1.png").write_bytes(b"no photo")
    assert_refused("emus has 0 usable photos; at least 11 are needed", folder)
    assert_refused("has no photos", write_folder(tmp_path / "nothing", JUNK))
    assert_refused("has photos of 1 classes; two or more", folder, ["cats"])


BOX_LINES = (
    "file,x0,y0,x1,y1\ncats/cats no 12.PNG,1,2,11,12\ncats/cats no 12.PNG,0,0,40,30\n\ndogs\\dogs no 00.PNG,3,4,5,6.5"
)


def test_boxes(tmp_path):
    files = PETS | {"pets/boxes.csv": ("\ufeff" + BOX_LINES + "\ncats/none.png,1,1,2,2\n").encode()}
    train, test, _, counts = load_photos(write_tar(tmp_path / "pets.tar", files))
    assert counts == {"boxes without a photo left out": 1}
    assert {name: box.tolist() for name, box in zip(names_of(test), test.boxes, strict=True) if box is not None} == {
        "cats no 12.PNG": [[1, 2, 11, 12], [0, 0, 40, 30]]
    }
    assert [box.tolist() for box in train.boxes if box is not None] == [[[3, 4, 5, 6.5]]]
    split, _ = load_all_photos(tmp_path / "pets.tar", ["emus", "dogs"])
    assert split.labels.tolist() == [1] * 13
    assert sum(box is not None for box in split.boxes) == 1
    with pytest.raises(UserError, match="no folder with the name of a class of the model: emus"):
        load_all_photos(tmp_path / "pets.tar", ["emus"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cats/cats no 12.PNG,1,2,11", "line 6: 4 values, not 5"),
        ("cats/cats no 12.PNG,1,2,41,12", "line 6: no box in cats/cats no 12.PNG, which has 40 x 30 pixels"),
        ("cats/cats no 12.PNG,11,2,11,12", "line 6: no box in"),
        ("cats/cats no 12.PNG,a,2,11,12", "line 6: could not convert"),
        ("cats/cats no 12.PNG,nan,2,11,12", "line 6: no box in"),
    ],
)
def test_bad_boxes(line, message, tmp_path):
    for table, says in (f"{BOX_LINES}\n{line}\n", message), (line, "line 1: the header must be file,x0,y0,x1,y1"):
        tar = write_tar(tmp_path / "pets.tar", PETS | {"pets/boxes.csv": table.encode()})
        assert_refused(r"pets\.tar: pets/boxes\.csv, " + says, tar)


@pytest.mark.parametrize(("size", "kind"), [((120, 60), "PNG"), ((50, 90), "JPEG")])
def test_boxes_in_a_crop_are_where_the_crop_shows_them(size, kind, tmp_path):
    """A white box in a black photo, which is turned by its EXIF data."""
    width, height = size
    x0, y0, x1, y1 = width // 2 - 20, height // 2 - 10, width // 2 + 15, height // 2 + 20
    pixels = np.zeros((height, width), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the left: the file has it lying
    Image.fromarray(np.rot90(pixels)).save(file := io.BytesIO(), kind, exif=exif)
    files = PETS | {"pets/cats/x.png": file.getvalue()}
    files["pets/boxes.csv"] = f"file,x0,y0,x1,y1\ncats/x.png,{x0},{y0},{x1},{y1}\n".encode()
    _, test, _, _ = load_photos(write_tar(tmp_path / "pets.tar", files))
    index = names_of(test).index("x.png")
    assert (test.files[index].width, test.files[index].height) == size
    (found,) = crop_boxes(test.files[index], test.boxes[index], 100, 80)
    crop = decode(test.files[index], 100, 80)[:, :, 0] > 127
    rows, columns = np.flatnonzero(crop.any(axis=1)), np.flatnonzero(crop.any(axis=0))
    np.testing.assert_allclose(found, [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1)
    assert not len(crop_boxes(test.files[index], [[0, 0, 1, 1]], 100, 80)) or width == height
