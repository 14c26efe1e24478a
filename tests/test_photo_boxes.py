"""data/photo_boxes.py: true boxes in tables and annotations."""

import pytest
from conftest import write_tar
from test_photo_folders import PETS, assert_refused, shade, write_folder

from data.photo_folders import load_all_photos, load_photos

BOX_LINES = (
    "file,x0,y0,x1,y1\ncats/cats no 12.PNG,1,2,11,12\ncats/cats no 12.PNG,0,0,40,30\n\ndogs\\dogs no 00.PNG,3,4,5,6.5"
)


def boxes_of(photos):
    return {photo.name: box.tolist() for photo, box in zip(photos.files, photos.boxes, strict=True) if box is not None}


def test_boxes(tmp_path):
    files = PETS | {"pets/boxes.csv": ("\ufeff" + BOX_LINES + "\ncats/none.png,1,1,2,2\n").encode()}
    train, test, _, notes = load_photos(write_tar(tmp_path / "pets.tar", files))
    assert notes == ["boxes without a photo left out: 1, such as pets/cats/none.png"]
    assert boxes_of(test) == {"pets/cats/cats no 12.PNG": [[1, 2, 11, 12], [0, 0, 40, 30]]}
    assert boxes_of(train) == {"pets/dogs/dogs no 00.PNG": [[3, 4, 5, 6.5]]}
    photos, _ = load_all_photos(tmp_path / "pets.tar", ["emus", "dogs"])
    assert boxes_of(photos) == boxes_of(train)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cats/cats no 12.PNG,1,2,11", "line 6: 4 values, not 5"),
        ("cats/cats no 12.PNG,1,2,41,12", "line 6: no box in pets/cats/cats no 12.PNG, which has 40 x 30 pixels"),
        ("cats/cats no 12.PNG,11,2,11,12", "line 6: no box in"),
        ("cats/cats no 12.PNG,a,2,11,12", "line 6: could not convert"),
        ("cats/cats no 12.PNG,nan,2,11,12", "line 6: no box in"),
    ],
)
def test_bad_boxes(line, message, tmp_path):
    for table, says in (f"{BOX_LINES}\n{line}\n", message), (line, "line 1: the header must be file,x0,y0,x1,y1"):
        tar = write_tar(tmp_path / "pets.tar", PETS | {"pets/boxes.csv": table.encode()})
        assert_refused(r"pets\.tar: pets/boxes\.csv, " + says, tar)


def voc(*objects):
    """A Pascal VOC annotation of (name, xmin, ymin, xmax, ymax)."""
    keys = "xmin", "ymin", "xmax", "ymax"
    corners = ["".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, box, strict=True)) for _, *box in objects]
    found = [f"<object><name>{o[0]}</name><bndbox>{c}</bndbox></object>" for o, c in zip(objects, corners, strict=True)]
    return f"<annotation>{''.join(found)}</annotation>".encode()


def test_pascal_voc_boxes(tmp_path):
    files = {f"pets/{name}/{k}.png": shade(k) for name in ("cats", "dogs") for k in (1, 2)} | {
        "pets/cats/cat.png": shade(1),
        "pets/cats/1.xml": voc(("", 1, 2, 3, 4.5), ("tree", 5, 6, 7, 8)),  # beside the photo
        "annots/cat.xml": voc(("tree", 5, 6, 7, 8), ("cats", 1, 2, 41, 31)),  # the only photo with that name
        "annots/dogs/1.xml": voc(("dog", 0, 0, 2, 2)),  # two photos, but one folder of the same name
        "annots/2.xml": voc(("cat", 0, 0, 2, 2)),  # of cats or of dogs?
        "settings.xml": b"<settings/>",  # of something else
    }
    (tmp_path / "pets" / "annots").mkdir(parents=True)  # class folders are in pets/
    folder = write_folder(tmp_path, {name.replace("annots", "pets/annots"): files[name] for name in files})
    train, test, names, notes = load_photos(folder, test_share=0.5)
    assert names == ["cats", "dogs"]
    assert notes == ["boxes without a photo left out: 1, such as pets/annots/2.xml"]
    assert boxes_of(train) | boxes_of(test) == {
        "pets/cats/1.png": [[1, 2, 3, 4.5], [5, 6, 7, 8]],
        "pets/cats/cat.png": [[1, 2, 40, 30]],
        "pets/dogs/1.png": [[0, 0, 2, 2]],
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", b"<annotation>", "pets/a.xml: no element found"),
        ("a.xml", voc(("cat", 1, 2, "x", 4)), "pets/a.xml: could not convert string to float: 'x'"),
        ("a.xml", voc(("cat", 1, 2, "", 4)), "pets/a.xml: could not convert string to float: ''"),
        ("cats no 12.xml", voc(("cat", 1, 2, 42, 4)), "no box in pets/cats/cats no 12.PNG, which has 40 x 30 pixels"),
        ("cats no 12.xml", voc(("cat", 0, 0.5, 1, 1)), "cats no 12.xml: all values are in 0..1; boxes are in pixels"),
        ("boxes.csv", b"file,x0,y0,x1,y1\nb,0,0,.5,1\n", "boxes.csv: all values are in 0..1"),
        ("boxes.csv", b"file,x0,y0,x1,y1\nb,0,0,5,1\n", "boxes of pets/b, and photos such as pets/cats/cats no 00.PNG"),
        ("boxes.csv", b"file,x0,y0,x1,y1\n\xff,0,0,5,1\n", "boxes.csv, line 1: .*decode"),
        ("a.xml", voc(("cat", 0, 0, 9, 9)), "boxes of pets/a.xml, and photos such as pets/cats/cats no 00.PNG"),
    ],
)
def test_bad_box_files(name, content, message, tmp_path):
    assert_refused(message, write_tar(tmp_path / "pets.tar", PETS | {f"pets/{name}": content}))
