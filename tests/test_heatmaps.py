"""heatmaps.py: files that are complete or not there, and pictures."""

import numpy as np
import pytest
from PIL import Image

import heatmaps
from files import complete_file


def test_a_file_is_complete_or_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted():
        with complete_file(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with complete_file(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_rows_survive_a_round_trip_to_the_letter(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [{"step": 0, "loss": "", "accuracy": 1 / 3}, {"step": 100, "loss": 0.1 + 0.2, "accuracy": 1.0}]
    heatmaps.write_rows(path, rows)
    assert heatmaps.read_rows(path) == rows
    text = path.read_text()
    heatmaps.write_rows(path, heatmaps.read_rows(path))
    assert path.read_text() == text
    assert heatmaps.read_rows(tmp_path / "missing.csv") == []


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [((100, 100), (400, 400)), ((28, 20), (392, 280)), ((300, 9), (300, 9)), ((600, 5), (600, 5))],
)
def test_pictures_are_enlarged_by_whole_numbers(size, enlarged):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    large = heatmaps.enlarge(picture)
    assert large.shape == (*enlarged, 3)
    times = enlarged[0] // size[0]
    np.testing.assert_array_equal(large[::times, times - 1 :: times], picture)


def test_pictures_are_saved_as_they_are(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    heatmaps.save_picture(picture, tmp_path / "picture.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "picture.png")), picture)


def test_clear_deletes_what_a_run_writes_and_nothing_else(tmp_path):
    for name in (
        "history.csv",
        "predictions.csv",
        "accuracy.png",
        "index.html",
        "overview.png",
        "notes.txt",
        "img_mine.png",
    ):
        (tmp_path / name).write_text("")
    for name in ("img_0", "img_12", "maps", "img_mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image_test.png").write_text("")
    heatmaps.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["img_mine", "img_mine.png", "notes.txt"]
