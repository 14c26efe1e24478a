"""figures.py, and the atomic writes of files.py."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from experiment import figures
from experiment.files import atomic_write


def test_a_file_is_complete_or_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted():
        with atomic_write(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with atomic_write(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [((100, 100), (400, 400)), ((28, 20), (392, 280)), ((300, 9), (300, 9)), ((600, 5), (600, 5))],
)
def test_pictures_are_enlarged_by_whole_numbers(size, enlarged):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    large = figures.enlarge(picture)
    assert large.shape == (*enlarged, 3)
    times = enlarged[0] // size[0]
    np.testing.assert_array_equal(large[::times, times - 1 :: times], picture)


def test_pictures_are_saved_as_they_are(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    figures.save_picture(picture, tmp_path / "picture.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "picture.png")), picture)


def test_class_maps_are_on_one_scale_about_zero_and_boxes_in_their_place(tmp_path):
    """Constant maps of -2, 0 and 4, whose colours are at 1/4, 1/2 and 1; a box around the lower right quarter."""
    image, maps = np.zeros((50, 100, 3), np.uint8), np.broadcast_to([-2.0, 0.0, 4.0], (5, 10, 3))
    titles = [(name, "black") for name in ("image", "low", "none", "high")]
    figures.save_class_maps(tmp_path / "maps.png", image, maps, titles, [None, None, (50, 25, 100, 50)])
    picture = np.asarray(Image.open(tmp_path / "maps.png"))[-100:]  # below the titles
    np.testing.assert_array_equal(picture[:, :200], np.zeros((100, 200, 3)))
    low, none, high = (np.rint(127.5 * np.array(matplotlib.colormaps["jet"](n)[:3])) for n in (64, 128, 255))
    np.testing.assert_array_equal(picture[:, 208:408], np.broadcast_to(low, (100, 200, 3)))
    np.testing.assert_array_equal(picture[:, 416:616], np.broadcast_to(none, (100, 200, 3)))
    np.testing.assert_array_equal(picture[:49, 624:824], np.broadcast_to(high, (49, 200, 3)))
    np.testing.assert_array_equal(picture[50, 724:824], np.full((100, 3), 255))
    np.testing.assert_array_equal(picture[54:96, 730:818], np.broadcast_to(high, (42, 88, 3)))
    scale = picture[:, 832 : 832 + 50]  # its bar
    assert (abs(scale[50] - 2.0 * none) <= 8).all()  # of the row beside the exact middle


@pytest.mark.parametrize("size", [(400, 7), (7, 400), (3000, 40), (1, 1)])
def test_maps_of_very_narrow_images_and_boxes_of_a_pixel(size, tmp_path):
    maps = np.random.default_rng(0).normal(size=(5, 4, 2))
    titles = [("image", "black"), ("computer-keyboard: S = 1.23", "black"), ("b", "black")]
    figures.save_class_maps(tmp_path / "maps.png", np.zeros((*size, 3), np.uint8), maps, titles, [(0, 0, 1, 1), None])
    assert Image.open(tmp_path / "maps.png").height > 64


@pytest.mark.parametrize("text", ["cat", "Würfel", "цифра", "αβγ", "قط"])
def test_class_names_in_any_script_are_drawn(text):
    """Each character as itself, not as the box that stands for a missing one."""
    font = figures.load_font(20, text)
    missing = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(character)) != missing for character in text)


@pytest.mark.filterwarnings("error")
def test_what_no_font_has_is_drawn_as_boxes(tmp_path):
    picture = Image.new("RGB", (100, 100), "red")
    figures.save_grid(tmp_path / "grid.png", [[(picture, "\U00012000\U00013000: S = 1.0", "black")]])
    title = np.asarray(Image.open(tmp_path / "grid.png"))[:24]
    assert title.min() < 100
