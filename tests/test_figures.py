"""figures.py, what it is made of (pictures.py, units.py), and the atomic writes of files.py."""

import os
import resource

import keras
import matplotlib
import numpy as np
import pytest
from PIL import Image

from cam import bounding_box, class_activation_model, normalize, overlay, upsample
from data.dataset import Split
from experiment import figures, pictures
from experiment.files import atomic_write
from experiment.units import largest_terms, unit_model
from lenet import RECEPTIVE_FIELD, lenet


def test_a_file_is_complete_or_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(text, error=None):
        with atomic_write(path) as part:
            part.write_text(text)
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write("half", KeyboardInterrupt)
    assert path.read_text() == "old"
    write("new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [((100, 100), (400, 400)), ((28, 20), (392, 280)), ((300, 9), (300, 9)), ((600, 5), (600, 5))],
)
def test_pictures_are_enlarged_by_whole_numbers_and_saved_as_they_are(size, enlarged, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    large = pictures.enlarge(picture)
    assert large.shape == (*enlarged, 3)
    times = enlarged[0] // size[0]
    np.testing.assert_array_equal(large[::times, times - 1 :: times], picture)
    pictures.save_picture(pictures.to_image(large), tmp_path / "picture.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "picture.png")), large)


def test_class_maps_are_on_one_scale_about_zero_and_boxes_in_their_place(tmp_path):
    """Constant maps of -2, 0 and 4: half opaque, not drawn, opaque; a box around the lower right quarter."""
    image, maps = np.zeros((50, 100, 3), np.uint8), np.broadcast_to([-2.0, 0.0, 4.0], (5, 10, 3))
    titles = [(name, "black") for name in ("image", "low", "none", "high")]
    figures.save_class_maps(tmp_path / "maps.png", image, maps, titles, [None, None, (50, 25, 100, 50)])
    picture = np.asarray(Image.open(tmp_path / "maps.png"))[-100:]  # below the titles
    assert not picture[:, :200].any()
    low, high = (255 * np.array(matplotlib.colormaps["seismic"](n)[:3]) for n in (64, 255))
    high = np.rint(high)
    assert (picture[:, 208:408] == np.rint(low / 2)).all()
    assert not picture[:, 416:616].any()
    assert (picture[:49, 624:824] == high).all()
    assert (picture[50, 724:824] == 255).all()
    assert (picture[54:96, 732:816] == high).all()
    scale = picture[:, 832 : 832 + 50]  # its bar
    assert (scale[50] >= 250).all()  # of the row beside the exact middle
    assert (scale[0] == high).all()


def test_digits_are_drawn_in_grey_on_white_below_their_maps(tmp_path):
    image = np.zeros((100, 100, 1), np.uint8)
    image[20:30, 40:60] = 255
    [_, mapped, _] = pictures.on_one_scale(image, np.float32([[[0.0]]]), 100)
    np.testing.assert_array_equal(np.asarray(mapped), 255 - image.repeat(3, axis=2) // 3)


@pytest.mark.parametrize("size", [(400, 7), (7, 400), (3000, 40), (1, 1)])
def test_maps_of_very_narrow_images_and_boxes_of_a_pixel(size, tmp_path):
    maps = np.random.default_rng(0).normal(size=(5, 4, 2))
    titles = [("image", "black"), ("computer-keyboard: S = 1.23", "black"), ("b", "black")]
    figures.save_class_maps(tmp_path / "maps.png", np.zeros((*size, 3), np.uint8), maps, titles, [(0, 0, 1, 1), None])
    assert Image.open(tmp_path / "maps.png").height > 64


@pytest.mark.parametrize("text", ["cat", "Würfel", "цифра", "αβγ", "قط"])
def test_class_names_in_any_script_are_drawn(text):
    """Each character as itself, not as the box that stands for a missing one."""
    font = pictures.load_font(20, text)
    missing = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(character)) != missing for character in text)


@pytest.mark.filterwarnings("error")
def test_characters_that_no_font_has_are_drawn_as_boxes(tmp_path):
    picture = Image.new("RGB", (100, 100), "red")
    pictures.save_grid(tmp_path / "grid.png", [[(picture, "\U00012000\U00013000: S = 1.0", "black")]])
    title = np.asarray(Image.open(tmp_path / "grid.png"))[:24]
    assert title.min() < 100


@pytest.fixture(scope="module", params=["average", "max"])
def network(request):
    """A LeNet of 64 units and three classes, and 40 images of 20 x 24 pixels."""
    keras.utils.set_random_seed(3)
    model = lenet(classes=3, pooling=request.param)
    for name in ("conv1", "conv2", "softmax_weights"):
        model.get_layer(name).kernel.assign(10 * model.get_layer(name).kernel)
    images = np.random.default_rng(4).integers(0, 256, (40, 20, 24, 1), dtype=np.uint8)
    return model, images


def test_terms_and_rest_add_up_to_the_map_and_their_contributions_to_the_score(network):
    model, images = network
    outputs = [np.asarray(output) for output in unit_model(model)(images)]
    logits, all_maps = (np.asarray(output) for output in class_activation_model(model)(images))
    weights = model.get_layer("softmax_weights").kernel.numpy()  # (K, C)
    for index, (feature_maps, pooled) in enumerate(zip(*outputs[:2], strict=True)):
        c = index % 3
        units, contributions, maps = largest_terms(feature_maps, pooled, weights[:, c])
        scale = np.abs(all_maps[index]).max()
        np.testing.assert_allclose(maps.sum(axis=2), all_maps[index, :, :, c], atol=1e-5 * scale)
        np.testing.assert_allclose(contributions.sum(), logits[index, c], atol=1e-5 * scale)
        largest = sorted(range(64), key=lambda k: -abs(weights[k, c] * pooled[k]))[:5]
        assert units.tolist() == largest
        for place, k in enumerate(largest):
            np.testing.assert_allclose(contributions[place], weights[k, c] * pooled[k], rtol=1e-6)
            np.testing.assert_allclose(maps[:, :, place], weights[k, c] * feature_maps[:, :, k], rtol=1e-6)


def test_patterns_are_the_images_with_the_highest_scores_of_their_class(tmp_path):
    rng = np.random.default_rng(5)
    images, labels = rng.integers(0, 256, (30, 20, 24, 1), dtype=np.uint8), np.arange(30) % 2
    logits, maps = rng.normal(size=(30, 2)), rng.normal(size=(30, 5, 6)).astype(np.float32)
    scores = logits[range(30), labels]
    figures.save_patterns(tmp_path / "patterns.png", (images, labels), logits, maps, ["a", "b"])
    picture = np.asarray(Image.open(tmp_path / "patterns.png"))
    height, width = 167, 200  # of an image
    title = picture.shape[0] // 2 - height
    for row in (0, 1):
        best = sorted((i for i in range(30) if labels[i] == row), key=lambda i: -scores[i])[:8]
        for column, index in enumerate(best):
            top, left = row * (title + height) + title, column * (width + 8)
            shown = picture[top : top + height, left : left + width]
            class_map = upsample(maps[index][None], 20, 24)[0]
            expected = Image.fromarray(overlay(images[index], normalize(class_map)))
            expected = np.array(expected.resize((width, height), Image.Resampling.BOX))
            x0, y0, x1, y1 = (edge * width / 24 for edge in bounding_box(class_map))
            y, x = np.mgrid[:height, :width]
            edges = (x > x0 - 4) & (x < x1 + 4) & (y > y0 - 4) & (y < y1 + 4)  # where the frame is
            edges &= ~((x > x0 + 4) & (x < x1 - 4) & (y > y0 + 4) & (y < y1 - 4))
            np.testing.assert_array_equal(shown[~edges], expected[~edges])
            for color in (0, 255):
                assert (shown[edges] == color).all(axis=-1).sum() > x1 - x0 + y1 - y0


def test_units_are_shown_at_their_strongest_place(tmp_path):
    """Two units; patches of 4 x 4 pixels, at the border partly black; eight of ten images."""
    rng = np.random.default_rng(6)
    images = rng.integers(1, 256, (10, 20, 24, 1), dtype=np.uint8)
    responses = rng.uniform(size=(10, 5, 6, 2)).astype(np.float32)
    responses[3, 0, 0, 0], responses[7, 4, 5, 0] = 3, 2
    field = {"start": -2, "stride": 4, "length": 8}
    figures.save_units(tmp_path / "units.png", images, responses, ["unit 1", "unit 2"], field)
    picture = np.asarray(Image.open(tmp_path / "units.png").convert("L"))
    side, cell = 100, picture.shape[1] // 2
    for unit in (0, 1):
        best = sorted(range(10), key=lambda i: -responses[i, :, :, unit].max())[:8]
        assert unit == 1 or best[:2] == [3, 7]
        for column, index in enumerate(best):
            row, across = np.unravel_index(responses[index, :, :, unit].argmax(), (5, 6))
            expected = np.zeros((8, 8), np.uint8)
            for y, x in np.ndindex(8, 8):
                v, u = 4 * row - 2 + y, 4 * across - 2 + x
                if 0 <= v < 20 and 0 <= u < 24:
                    expected[y, x] = images[index, v, u, 0]
            left = unit * cell + column * (side + 2)
            shown = picture[-side:, left : left + side]
            middles = np.rint((np.arange(8) + 0.5) * side / 8).astype(int)
            np.testing.assert_array_equal(shown[np.ix_(middles, middles)], expected)


def test_units_that_see_most_of_the_image_are_shown_as_maps(tmp_path):
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    responses = rng.uniform(size=(3, 5, 5, 1)).astype(np.float32)
    figures.save_units(tmp_path / "units.png", images, responses, ["unit"], None)
    picture = np.asarray(Image.open(tmp_path / "units.png"))
    best = responses[..., 0].max(axis=(1, 2)).argmax()
    expected = overlay(images[best], normalize(upsample(responses[best, :, :, 0][None], 20, 20)[0]))
    np.testing.assert_array_equal(picture[-100:, :100][2::5, 2::5], expected)


def draw(folder, model, split, samples, **options):
    """Draws the figures of a run with two evaluations; its first images are the samples."""
    names = [f"class {c}" for c in range(model.output_shape[1])]
    history = [{"step": step, "predicted": [0] * samples, "images": step, "test_images": 9} for step in (0, 5)]
    history = [row | {"test_accuracy": 0.5} for row in history]
    pictures.save_images(folder, split.images[:samples])
    for step in (0, 5):
        pictures.save_heatmaps(folder, step, split.images[:samples], np.zeros((samples, 20, 24), np.float32))
    figures.save_figures(folder, model, split, names, history, **options)
    figures.save_accuracy(folder / "accuracy.png", history)


def test_the_figures_of_a_run(network, tmp_path):
    model, images = network
    draw(tmp_path, model, Split(images, np.arange(40) % 3, None), 3, receptive_field=RECEPTIVE_FIELD)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert {"accuracy.png", "overview.png", "patterns.png", "units.png"} <= written
    assert {f"img_{k}/{name}.png" for k in range(3) for name in ("classes", "evolution", "procedure")} <= written
    pixels = np.asarray(Image.open(tmp_path / "img_1" / "procedure.png"))
    assert pixels.shape[1] == 6 * 208  # the image and five terms; below them the rest, the map, and the scale


def test_figures_where_the_first_classes_have_no_test_image(tmp_path):
    """Classes 11 and 12 of 13, as with folders train/ and test/."""
    images, labels = np.random.default_rng(5).integers(0, 256, (4, 20, 24, 1), dtype=np.uint8), np.array([11, 12] * 2)
    draw(tmp_path, lenet(classes=13), Split(images, labels, None), 2)
    assert Image.open(tmp_path / "patterns.png").width == 2 * 208  # two images of each class
    assert (tmp_path / "units.png").exists()


def test_many_classes_among_the_samples_need_few_open_files(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    images = np.random.default_rng(5).integers(0, 256, (12, 20, 24, 1), dtype=np.uint8)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 15, hard))
    try:
        draw(tmp_path, lenet(classes=12), Split(images, np.arange(12), None), 12)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "overview.png").exists()


def test_accuracy_of_each_class_and_confusion_matrix(tmp_path, capsys):
    """Class c of three has no image; of four images of class a three are right."""
    figures.report_classes(tmp_path / "new", np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 2, 1]), ["a", "bb", "c"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["    a   3 of 4 (75.0%)", "    bb  1 of 1 (100.0%)"]
    assert len(lines) == 3
    picture = np.asarray(Image.open(tmp_path / "new" / "confusion.png").convert("RGB")).astype(int)
    colors = {tuple(color) for color in picture.reshape(-1, 3)[::7]}
    for share, is_there in ((0, True), (0.25, True), (0.5, False), (0.75, True), (1, True)):
        expected = np.rint(255 * np.array(matplotlib.colormaps["Blues"](share)[:3]))
        assert any(np.abs(expected - color).max() <= 2 for color in colors) == is_there, share
