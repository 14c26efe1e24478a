"""data/photo_folders.py: archives of small photos, made here."""

import gzip
import io
import os
import re
import tarfile

import numpy as np
import pytest
from conftest import encoded, write_tar
from PIL import Image

from data.photo_folders import load_all_photos, load_photos, read_photo
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
    train, test, names, notes = load_photos(archive)
    assert names == ["bike", "mug", "mouse"]
    assert notes == []
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert test.labels.tolist() == 10 * [0, 1, 2]
    names_found = names_of(train) + names_of(test)
    assert names_found[:5] == ["001_0001.jpg", "001_0002.jpg", "002_0001.jpg", "002_0002.jpg", "010_0001.jpg"]
    assert names_found[9:13] == ["001_0003.jpg", "002_0003.jpg", "010_0006.jpg", "001_0004.jpg"]
    assert len(set(names_found)) == len(FILES)
    for photo, label in zip(test.files, test.labels, strict=True):
        shade = int(photo.name[-12:-9]) + int(photo.name[-8:-4])
        assert photo.name.split("/")[-2].endswith(names[label])
        assert abs(int(read_photo(photo).pixels.mean()) - shade) <= 1
    # Classes by name and by folder
    train, test, names, _ = load_photos(archive, ["mouse", "001.bike"])
    assert names == ["bike", "mouse"]
    assert set(train.labels) == set(test.labels) == {0, 1}
    assert_refused("no class 'tea'; it has bike, mug, mouse", archive, ["mouse", "tea"])


def test_what_is_out_of_the_ordinary(tmp_path):
    grey = np.full((30, 40), 100, np.uint8)
    bike = "256_ObjectCategories/001.bike/001_00"
    files = FILES | {
        f"{bike}13.jpg": encoded(grey),
        f"{bike}14.jpg": encoded(grey, "PNG"),
        f"{bike}15.jpg": b"no photo",
        f"{bike}16.jpg": encoded(np.zeros((300, 300, 3), np.uint8))[:900],
        f"{bike}17.jpg": b"",
        f"{bike}18.jpg": encoded(np.zeros((20, 161, 3), np.uint8)),
        f"{bike}19.jpg": b"",
        "256_ObjectCategories/001.bike/RENAME2": b"a list",
    }
    train, test, names, notes = load_photos(write_tar(tmp_path / "archive.tar", files))
    assert names == ["bike", "mug", "mouse"]
    reason = "is not a readable image (unknown format; convert it to PNG)"
    assert notes == [
        "other files left out: 1, such as 256_ObjectCategories/001.bike/RENAME2",
        f"photos that cannot be used left out: 5, such as {bike}15.jpg {reason}",
    ]
    assert len(train.files) + len(test.files) == len(FILES) + 2


@pytest.mark.parametrize("suffix", ["jpeg", "JFIF", "png", "gif", "BMP", "webp", "tif", "tiff", "avif", "ppm", "pgm"])
def test_formats(suffix, tmp_path):
    names = [f"{name}/{index}.{suffix}" for name in ("a", "b") for index in range(2)]
    grey = Image.new("L", (40, 30), 100)
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        grey.save(tmp_path / name, "JPEG" if suffix == "JFIF" else None)
    train, test, _, notes = load_photos(tmp_path, test_share=0.5)
    assert (names_of(train), names_of(test), notes) == ([f"0.{suffix}"] * 2, [f"1.{suffix}"] * 2, [])
    assert abs(read_photo(test.files[0]).pixels.astype(int) - 100).max() <= 2


def test_photos_of_all_kinds_are_read_as_show_py_reads_them(tmp_path):
    deep = np.tile(np.linspace(30000, 60000, 40).astype(np.uint16), (30, 1))
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(tmp_path / "transparent.png")
    Image.new("L", (8000, 8000), 9).save(tmp_path / "large.jpg")  # 64 megapixels
    exif = Image.Exif()
    exif[0x0112] = 6  # it lies on its side
    Image.new("L", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    files = {f"{kind}/{path.name}": path.read_bytes() for path in tmp_path.iterdir() for kind in ("a", "b")}
    train, test, _, notes = load_photos(write_tar(tmp_path / "kinds.tar", files), test_share=0.25)
    assert notes == []
    sizes = {photo.name.split("/")[1]: (photo.width, photo.height) for photo in train.files + test.files}
    assert sizes == {
        "deep.png": (40, 30),
        "transparent.png": (40, 30),
        "large.jpg": (8000,) * 2,
        "turned.jpg": (30, 40),
    }
    pixels = {photo.name: read_photo(photo).pixels for photo in train.files + test.files}
    assert (pixels["a/deep.png"].min(), pixels["a/deep.png"].max()) == (0, 255)
    assert pixels["b/transparent.png"].min() == 255
    (tmp_path / "kinds.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"kinds\.tar"):
        read_photo(test.files[0])


def test_archives_that_cannot_be_used(tmp_path):
    assert_refused(r"missing\.tar is missing", tmp_path / "missing.tar")
    for name, content in ("text.tar", b"no archive"), ("photos.zip", b"PK\3\4"), ("photos.tar.gz", gzip.compress(b"")):
        (tmp_path / name).write_bytes(content)
        assert_refused(f"{name} is not a complete .*; unpack an archive of another kind", tmp_path / name)
    tar = write_tar(tmp_path / "whole.tar", FILES)
    with tarfile.open(tar) as members:
        header = members.getmembers()[5].offset
    for end in header + 100, header + 600:  # in a header, and in a photo
        (tmp_path / "part.tar").write_bytes(tar.read_bytes()[:end])
        assert_refused(r"part\.tar is not a complete", tmp_path / "part.tar")
    few = write_tar(tmp_path / "few.tar", FILES | photos_of("003.cup", 10))
    assert_refused("cup has 10 usable photos; at least 11", few)
    with tarfile.open(tar, "a") as members:  # as by tar -r; the last one counts, as when it is unpacked
        members.addfile(members.getmembers()[0], io.BytesIO(next(iter(FILES.values()))))
    assert len(load_photos(tar)[0].labels) == 9


def shade(value, size=(40, 30)):
    return encoded(np.full((size[1], size[0], 3), value, np.uint8), "PNG")


PETS = {f"pets/{name}/{name} no {index:02}.PNG": shade(index) for name in ("cats", "dogs") for index in range(13)}
JUNK = {"pets/.DS_Store": b"1", "pets/cats/._cats no 01.png": shade(1), "__MACOSX/cats/a.png": shade(1)}
JUNK |= {"pets/README.txt": b"pets", "pets/@eaDir/cats.png/small.jpg": shade(1), "pets/cats/3.XML": b"<settings/>"}


def write_tar_gz(path, files):
    tar = write_tar(path.with_name("pets.part"), files)
    path.write_bytes(gzip.compress(tar.read_bytes()))
    tar.unlink()
    return path


@pytest.mark.parametrize("write", [write_tar, write_tar_gz, write_folder])
@pytest.mark.parametrize("root", ["pets/", "", "a/b/"])
def test_a_folder_for_each_class(write, root, tmp_path):
    files = {name.replace("pets/", root): content for name, content in (PETS | JUNK).items()}
    files[f"{root}dogs/more/deeper.jpg"] = shade(200)
    files[f"{root}on its own.jpg"] = shade(200)
    archive = write(tmp_path / "pets", files)
    train, test, names, notes = load_photos(archive)
    assert names == ["cats", "dogs"]
    assert [note.split(",")[0] for note in notes] == [
        "other files left out: 1",
        "photos outside the class folders left out: 1",
    ]
    assert names_of(train) == [f"cats no {k:02}.PNG" for k in range(3)] + [f"dogs no {k:02}.PNG" for k in range(4)]
    assert names_of(test)[-2:] == ["cats no 12.PNG", "deeper.jpg"]
    assert test.labels.tolist() == 10 * [0, 1]
    assert train.boxes is None


def test_a_tar_gz_is_unpacked_once_and_again_if_it_is_replaced(tmp_path):
    path = write_tar_gz(tmp_path / "pets.tar.gz", PETS)
    tar = tmp_path / "pets.tar.gz.unpacked.tar"
    load_photos(path)
    time = path.stat().st_mtime_ns
    write_tar(tar, PETS | {"pets/cats/x.png": shade(1)})
    os.utime(tar, ns=(time, time))
    assert len(load_photos(path)[0].files) == 7  # the unpacked copy is used
    write_tar_gz(path, PETS | {"pets/cats/x.png": shade(1), "pets/cats/y.png": shade(1)})
    os.utime(path, ns=(time - 10**9, time - 10**9))  # by an older one
    assert len(load_photos(path)[0].files) == 8


def test_a_tar_gz_that_cannot_be_unpacked(tmp_path):
    path = write_tar_gz(tmp_path / "pets.tar.gz", PETS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes(4) + whole[-36:])
    assert_refused(r"pets\.tar\.gz is not a complete \.tar or \.tar\.gz", path)
    path.write_bytes(whole)
    (tmp_path / "pets.tar.gz.lock").unlink()
    (tmp_path / "pets.tar.gz.lock").mkdir()
    assert_refused(r"pets\.tar\.gz cannot be .*unpacked beside itself \(Is a directory\); unpack it elsewhere", path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pets.tar.gz", "pets.tar.gz.lock"]


def test_a_tar_beside_a_tar_gz_stays_as_it_is(tmp_path):
    write_tar_gz(tmp_path / "pets.tar.gz", PETS)
    (tmp_path / "pets.tar").write_bytes(b"of the user")
    (tmp_path / "renamed.tar").write_bytes((tmp_path / "pets.tar.gz").read_bytes())
    for name in ("pets.tar.gz", "renamed.tar"):  # whatever its name, it is a .tar.gz
        assert len(load_photos(tmp_path / name)[0].labels) == 6
    assert (tmp_path / "pets.tar").read_bytes() == b"of the user"


def test_links_in_a_tar(tmp_path):
    tar = write_tar(tmp_path / "pets.tar", {f"cats/{k}.png": shade(k) for k in range(4)} | {"cats/x.txt": b""})
    links = {
        ("dogs/0.png", tarfile.LNKTYPE): "cats/0.png",
        ("dogs/1.png", tarfile.SYMTYPE): "../cats/1.png",
        ("dogs/2.png", tarfile.SYMTYPE): "../cats/./1.png",
        ("dogs/3.png", tarfile.SYMTYPE): "../cats/none.png",
        ("cats/circle", tarfile.SYMTYPE): "../cats",
    }
    with tarfile.open(tar, "a") as archive:
        for (name, kind), target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    train, test, names, notes = load_photos(tar, test_share=0.1)
    assert names == ["cats", "dogs"]
    assert notes[0] == "other files left out: 2, such as cats/circle"
    assert notes[1].startswith("photos that cannot be used left out: 1, such as dogs/3.png is not a readable image")
    found = {photo.name: read_photo(photo).pixels[0, 0, 0] for photo in train.files + test.files}
    assert found == {f"cats/{k}.png": k for k in range(4)} | {"dogs/0.png": 0, "dogs/1.png": 1, "dogs/2.png": 1}


def test_links_in_a_folder(tmp_path):
    folder = write_folder(tmp_path / "data", {f"cats/{k}.png": shade(k) for k in range(2)})
    elsewhere = write_folder(tmp_path / "elsewhere", {f"more/{k}.png": shade(k) for k in range(3)})
    (folder / "dogs").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(folder)
    (folder / "cats" / "2.png").symlink_to("none.png")
    train, test, names, notes = load_photos(folder, test_share=0.1)
    assert names == ["cats", "dogs"]
    assert len(notes) == 1
    assert re.match(r"photos that cannot be used left out: 1, such as .*data/cats/2\.png", notes[0])
    assert names_of(train) + names_of(test) == ["0.png", "0.png", "1.png", "1.png", "2.png"]


def test_a_share_of_each_class_as_test_set(tmp_path):
    archive = write_tar(tmp_path / "pets.tar", PETS | {"pets/emus/a.png": shade(1), "pets/emus/b.png": shade(2)})
    train, test, names, _ = load_photos(archive, test_share=0.25)
    assert names == ["cats", "dogs", "emus"]
    assert np.bincount(train.labels).tolist() == [10, 10, 1]
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert_refused("emus has 2 usable photos; at least 11 are needed", archive)


SETS = ["train test", "train val", "Train Valid", "TRAIN validation", "training testing", "training_set test_set"]


@pytest.mark.parametrize("folders", SETS)
def test_a_training_and_a_test_set_are_taken_as_they_are(folders, tmp_path):
    train_name, test_name = folders.split()
    files = {f"pets/{train_name}/{name}/{k}.png": shade(k) for name in ("cats", "dogs") for k in range(3)}
    files |= {f"pets/{test_name}/dogs/{k}.png": shade(k) for k in range(2)} | {"pets/old/dogs/1.png": shade(1)}
    train, test, names, notes = load_photos(write_folder(tmp_path / "data", files))
    assert (names, train.labels.tolist(), test.labels.tolist()) == (["cats", "dogs"], [0, 0, 0, 1, 1, 1], [1, 1])
    assert notes == ["photos outside the class folders left out: 1, such as pets/old/dogs/1.png"]
    assert_refused("--test-share is for data without one", tmp_path / "data", test_share=0.5)
    write_folder(tmp_path / "data", {f"pets/{test_name}/emus/1.png": shade(1)})
    assert_refused("emus has no training photo that can be used", tmp_path / "data")


def test_of_a_validation_and_a_test_set_the_test_set_is_taken(tmp_path):
    files = {f"{part}/{name}/{part}.png": shade(1) for part in ("test", "train", "val") for name in ("cats", "dogs")}
    _, test, _, notes = load_photos(write_folder(tmp_path / "data", files))
    assert names_of(test) == ["test.png"] * 2
    assert notes == ["photos outside the class folders left out: 2, such as val/cats/val.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("train/cats/1 train/dogs/1 holdout/cats/1", "has train/, .* a training set is a folder named train, "),
        ("train/cats/1 train/dogs/1 test/1", "data.tar has no test photo that can be used"),
        ("val/cats/1 test/cats/1", "has test/, val/, but not a training and a test set"),
        ("train/cats/1 training/dogs/1 test/cats/1", "has train/, training/, test/, but not a training and a test"),
        ("1 2", "no class folders; expected is photos/CLASS/NAME.jpg, with two classes or more"),
        ("cats/1 cats/2", r"one class \(cats\); expected is photos/CLASS/NAME.jpg, with two classes or more"),
    ],
)
def test_layouts_that_are_refused(names, message, tmp_path):
    files = {f"{name}.png": shade(1) for name in names.split(" ")}
    assert_refused(message, write_tar(tmp_path / "data.tar", files))


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        ("cats/persian cats/siamese dogs", "cats dogs"),
        ("bus car train", "bus car train"),  # not a training set
        ("001.Albatross 002.Auklet", "Albatross Auklet"),  # CUB-200
        ("a\N{IDEOGRAPHIC SPACE}b \N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}",) * 2,
        ("a\nb c\udcffd", "a|b c?d"),
    ],
)
def test_any_folder_is_a_class(folders, names, tmp_path):
    files = {f"data/{folder}/{k}_0001_{k}.png": shade(k) for folder in folders.split(" ") for k in range(6)}
    _, test, found, notes = load_photos(write_folder(tmp_path, files), test_share=0.5)
    assert (found, notes) == ([name.replace("|", " ") for name in names.split(" ")], [])
    assert len(test.files) == len(files) // 2


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
    assert load_photos(folder)[3] == ["empty folders left out: 1, such as emus"]
    (folder / "pets" / "emus" / "1.png").write_bytes(b"no photo")
    assert_refused("emus has 0 usable photos; at least 11 are needed", folder)
    assert_refused("has no photos", write_folder(tmp_path / "nothing", JUNK))
    assert_refused(r"one class \(cats\); expected is photos/CLASS/NAME.jpg", folder, ["cats"])


def test_all_photos_of_the_classes_of_a_model(tmp_path):
    tar = write_tar(tmp_path / "pets.tar", PETS)
    photos, notes = load_all_photos(tar, ["emus", "dogs"])
    assert photos.labels.tolist() == [1] * 13
    assert notes == ["classes that the network does not have left out: 1, such as cats"]
    with pytest.raises(UserError, match=r"no folder with the name of a class of the network: 0, .* 8, 9, \.\.\.$"):
        load_all_photos(tar, list(map(str, range(1000))))
    names, wordnet_ids = ["crane", "emu", "crane"], ["n02012849", "n01518878", "n03126707"]
    cranes = write_tar(tmp_path / "cranes.tar", {f"{folder}/1.png": shade(1) for folder in ("emu", "n03126707")})
    assert load_all_photos(cranes, names, wordnet_ids)[0].labels.tolist() == [1, 2]
    mugs = write_tar(tmp_path / "mugs.tar", {f"{folder}/1.png": shade(1) for folder in ("Coffee-Mug", "tea pot")})
    assert load_all_photos(mugs, ["coffee_mug", "tea_pot"])[0].labels.tolist() == [0, 1]
    write_tar(cranes, {"crane/1.png": shade(1)})
    with pytest.raises(UserError, match="2 classes are named crane; name the folder n02012849 or n03126707"):
        load_all_photos(cranes, names, wordnet_ids)
