"""show.py on the command line, and how it treats images."""

import keras
import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, run
from keras import layers
from PIL import Image

import show
from cam import bounding_box, class_activation_map, upsample
from data.dataset import load_dataset
from lenet import lenet


@pytest.fixture(scope="module")
def lenet_file(tmp_path_factory):
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("model") / "lenet.keras"
    lenet().save(path)
    return path


@pytest.fixture
def color_model(tmp_path):
    """Six classes of RGB images of 32 x 40 pixels, with bias and softmax."""
    keras.utils.set_random_seed(1)
    images = keras.Input((32, 40, 3))
    maps = layers.Conv2D(5, 3, strides=4, activation="relu")(images)
    pooled = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(maps))
    model = keras.Model(images, layers.Dense(6, "softmax", bias_initializer="normal")(pooled), name="mine")
    model.save(tmp_path / "mine.keras")
    return tmp_path / "mine.keras", model


def photo(path, size=(90, 120), mode="RGB"):
    pixels = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def test_scores_boxes_and_maps_are_those_of_the_model(color_model, tmp_path):
    path, model = color_model
    pixels = photo(tmp_path / "a.png", (32, 40))
    process = run("show.py", tmp_path / "a.png", "--model", path, "--top", 6, "--npy", "--out", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    dense, images = model.layers[-1], pixels[None].astype(np.float32)
    features = keras.Model(model.input, model.layers[1].output)(images)
    maps = np.asarray(class_activation_map(features, dense.kernel))[0]
    scores = maps.mean(axis=(0, 1)) + np.asarray(dense.bias)
    order = np.argsort(-scores)
    written = np.load(tmp_path / "out" / "cam_a.npy")
    np.testing.assert_allclose(written, maps[:, :, order].transpose(2, 0, 1), rtol=1e-4, atol=1e-4)
    lines = process.stdout.splitlines()
    assert "cam_a.png" in lines[0]
    probabilities = np.asarray(model(images))[0]
    for line, label, class_map in zip(lines[1:], order, written, strict=True):
        name, *_ = line.split()
        assert name == str(label)
        assert f"S = {scores[label]:8.2f}" in line
        assert f"P = {probabilities[label]:6.1%}" in line
        box = bounding_box(upsample(class_map[None], 32, 40)[0])
        assert line.endswith("nowhere positive" if box is None else "box {} {} {} {}".format(*box))
    # The picture: the image, its six maps, and the scale, in rows of six, at 200 pixels each.
    assert Image.open(tmp_path / "out" / "cam_a.png").size == (6 * 208, 2 * (160 + 50))


def test_many_images_of_many_kinds(lenet_file, tmp_path):
    for name, size, mode in (("a.png", (100, 100), "L"), ("b.jpg", (300, 200), "RGB"), ("c.png", (30, 28), "RGBA")):
        photo(tmp_path / name, size, "RGB" if name.endswith("jpg") else mode)
    paths = [tmp_path / name for name in ("a.png", "b.jpg", "c.png")]
    process = run("show.py", *paths, "--model", lenet_file, "--class", 3, 1, 4, "--npy", "--out", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    classes = [line.split()[0] for line in process.stdout.splitlines() if line.startswith("    ")]
    assert classes == ["3", "1", "4"]
    for name in "abc":
        assert (tmp_path / "out" / f"cam_{name}.png").exists()
        assert np.load(tmp_path / "out" / f"cam_{name}.npy").shape[0] == 1


def test_relu_only_when_asked(lenet_file, tmp_path):
    photo(tmp_path / "a.png")
    for flag in ([], ["--relu"]):
        arguments = ["show.py", tmp_path / "a.png", "--model", lenet_file, "--top", 10, "--npy", "--out", tmp_path]
        assert run(*arguments, *flag).returncode == 0
        assert (np.load(tmp_path / "cam_a.npy").min() < 0) == (not flag)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere.png"], ["nowhere.png is missing"]),
        (["README.md"], ["README.md is not a readable image"]),
        (["GOOD", "GOOD"], ["same name"]),
        (["GOOD", "--model", "nowhere.keras"], ["nowhere.keras is missing"]),
        (["GOOD", "--model", "VGG17"], ["VGG17 is neither a file nor a network"]),
        (["GOOD", "--class", "10"], ["--class", "0..9"]),
        (["GOOD", "--class", "1", "2"], ["--class", "one for each"]),
        (["GOOD", "--top", "0"], ["--top"]),
        (["GOOD", "--preprocess", "resnot"], ["--preprocess resnot"]),
        (["GOOD", "--out", "README.md"], ["README.md"]),
    ],
)
def test_bad_input_is_named_in_one_line(lenet_file, tmp_path, arguments, parts):
    photo(tmp_path / "good.png")
    arguments = [tmp_path / "good.png" if argument == "GOOD" else argument for argument in arguments]
    model = [] if "--model" in arguments else ["--model", lenet_file]
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    process = run("show.py", *arguments, *model, *out)
    assert_one_line_error(process, "show.py: ", *parts)
    assert not (tmp_path / "out").exists()


def test_a_network_of_another_form_is_refused(tmp_path):
    images = keras.Input((8, 8, 1))
    keras.Model(images, layers.Dense(2)(layers.Flatten()(images))).save(tmp_path / "flat.keras")
    photo(tmp_path / "a.png")
    process = run("show.py", tmp_path / "a.png", "--model", tmp_path / "flat.keras", "--out", tmp_path / "out")
    assert_one_line_error(process, "Flatten -> Dense", "it must be convolutions -> GlobalAveragePooling2D")


def test_a_photo_of_a_dark_digit_on_light_paper_becomes_an_mnist_digit():
    """A committed image with its clutter painted over, as a large photo: dim, yellowish, with a shadow."""
    _, test = load_dataset(ROOT / "data")
    x0, y0, x1, y1 = test.boxes[0]
    digit = np.zeros((40, 40), np.uint8)
    digit[8 : 8 + y1 - y0, 12 : 12 + x1 - x0] = test.images[0, y0:y1, x0:x1, 0]
    large = np.asarray(Image.fromarray(digit).resize((600, 600), Image.Resampling.BICUBIC), float)[:, :, None] / 255
    shadow = np.linspace(0.9, 1, 600)[:, None]
    paper = np.array([230, 220, 200]) * shadow
    seen = show.preprocess_digit(np.rint(paper[None] * (1 - 0.7 * large)).astype(np.uint8))
    rows = np.flatnonzero((seen[:, :, 0] > 100).any(axis=1))
    assert abs(rows[-1] - rows[0] + 1 - show.DIGIT_HEIGHT) <= 1
    assert np.median(seen) < 30
    assert seen.max() > 230


def test_small_images_go_to_the_lenet_as_they_are():
    grey = np.random.default_rng(0).integers(0, 100, (28, 30), dtype=np.uint8)
    np.testing.assert_array_equal(show.preprocess_digit(grey[:, :, None].repeat(3, axis=2))[:, :, 0], grey)
    np.testing.assert_array_equal(show.preprocess_digit(255 - grey[:, :, None].repeat(3, axis=2))[:, :, 0], grey)
    assert show.preprocess_digit(np.full((200, 300, 3), 255, np.uint8)).max() == 0


@pytest.mark.parametrize("times", [3, 4, 7])
def test_a_picture_with_repeated_pixels_goes_to_the_lenet_at_its_own_size(times):
    """Such as image_test.png of a run, whose clutter is not to be taken for one large digit."""
    _, test = load_dataset(ROOT / "data")
    image = test.images[0, :, :, 0]
    large = image.repeat(times, axis=0).repeat(times, axis=1)
    np.testing.assert_array_equal(show.preprocess_digit(large[:, :, None].repeat(3, axis=2))[:, :, 0], image)
