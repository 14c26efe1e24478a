"""show.py on the command line, and predict.py, what it does for Python."""

import signal
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, call, rows, run, send_signal, start
from keras import layers
from PIL import Image
from skimage import transform

import show
from cam import bounding_box, class_activation_map, upsample
from data.dataset import load_dataset
from experiment.files import UserError
from experiment.predict import Network, predict_cams
from lenet import lenet


@pytest.fixture(scope="module")
def lenet_file(tmp_path_factory):
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("model") / "lenet.keras"
    lenet().save(path)
    return path


def classifier(activation=None, classes=4, size=(32, 40, 3), **convolution):
    """A network with random weights for `Network`."""
    keras.utils.set_random_seed(1)
    images = keras.Input(size)
    pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(5, 3, activation="relu", **convolution)(images))
    dense = layers.Dense(classes, activation, bias_initializer="normal", kernel_initializer="glorot_normal")
    return keras.Model(images, dense(pooled))


def random_image(*size):
    return np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)


def photo(path, *size, mode="RGB"):
    """Writes a random image, and returns its path."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(random_image(*(size or (90, 120)))).convert(mode).save(path)
    return path


def show_images(*arguments):
    """Runs show.py in this process; returns what it prints."""
    process = call(show, *arguments)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


def test_scores_boxes_and_maps_are_those_of_the_model_on_the_resized_image(tmp_path):
    model, path = classifier("softmax", 6, strides=4), tmp_path / "mine.keras"
    model.save(path)
    images = photo(tmp_path / "a.png", 64, 50), "--model", path, "--out", tmp_path
    _, *lines = show_images(*images, "--top", 5, "--npy").splitlines()
    pixels = transform.resize(random_image(64, 50), (32, 40), preserve_range=True, anti_aliasing=True)[None]
    features = keras.Model(model.input, model.layers[1].output)(pixels)
    dense = model.layers[-1]
    maps = np.asarray(class_activation_map(features, dense.kernel))[0]
    scores, probabilities = maps.mean(axis=(0, 1)) + np.asarray(dense.bias), np.asarray(model(pixels))[0]
    order = np.argsort(-scores)[:5]
    written = np.load(tmp_path / "cam_a.npy")
    np.testing.assert_allclose(written, maps[:, :, order].transpose(2, 0, 1), rtol=1e-4, atol=1e-4)
    assert "cam_a.png" in lines[0]
    for line, label, class_map in zip(lines[1:], order, written, strict=True):
        assert line.split()[0] == str(label)
        assert f"S = {scores[label]:8.2f}  P = {probabilities[label]:6.1%}  " in line
        box = bounding_box(upsample(class_map[None], 64, 50)[0])
        assert line.endswith("nowhere positive" if box is None else "box {} {} {} {}".format(*box))
    # The picture: the image, its five maps, and the scale, in rows of six, at 200 pixels each.
    assert Image.open(tmp_path / "cam_a.png").size == (6 * (156 + 8), 2 * (200 + 38))


@pytest.mark.parametrize(
    ("activation", "classes"), [("softmax", 4), ("sigmoid", 4), ("linear", 4), ("sigmoid", 1), ("linear", 1)]
)
def test_probabilities_are_those_of_the_network(activation, classes):
    """One output is two classes: the other one has the opposite score and map."""
    model, image = classifier(activation, classes), random_image(32, 40)
    cams = predict_cams(image, Network(model, (0, 1)))
    expected = np.asarray(model(image[None] / np.float32(255)))[0]
    if activation == "linear":
        expected = np.asarray(keras.ops.softmax(expected) if classes > 1 else keras.ops.sigmoid(expected))
    if classes == 1:
        assert 0.01 < expected < 0.99
        expected = np.array([1 - expected[0], expected[0]])
        assert cams.scores[0] == -cams.scores[1]
        np.testing.assert_array_equal(cams.maps[0], -cams.maps[1])
    assert len(cams.classes) == len(expected)
    np.testing.assert_allclose(cams.probabilities, expected[cams.classes], atol=1e-5)
    assert list(cams.scores) == sorted(cams.scores, reverse=True)


def test_pixel_range_and_preprocessing():
    image = random_image(32, 40)
    given = {(): image, ((0, 1),): image / 255}
    given |= {((-1, 1),): image / 127.5 - 1, (None, "mobilenet_v2"): image / 127.5 - 1}
    for arguments, expected in given.items():
        network = Network(classifier(), *arguments)
        np.testing.assert_allclose(network.preprocess(image), expected, atol=1e-5)
        assert network.preprocess(image).dtype == np.float32


def test_the_console_states_the_range_that_was_not_given(tmp_path):
    classifier().save(tmp_path / "mine.keras")
    arguments = [photo(tmp_path / "a.png"), "--model", tmp_path / "mine.keras", "--out", tmp_path / "out"]
    assert "mine.keras gets pixels of 0..255" in show_images(*arguments)
    given = show_images(*arguments, "--pixel-range", 0, 1)
    assert "0..255" not in given
    (tmp_path / "mine_images.json").write_text('{"pixel_range": [0, 1]}')
    assert show_images(*arguments) == given


def test_preprocessing_is_read_from_the_file_beside_the_network(tmp_path):
    classifier(size=(None, None, 3)).save(tmp_path / "mine.keras")
    image = random_image(60, 90)
    (tmp_path / "mine_images.json").write_text('{"short_side": 30}')
    network = Network(tmp_path / "mine.keras")
    assert network.preprocess(image).shape == (30, 45, 3)
    with pytest.raises(UserError, match="too elongated"):
        network.preprocess(random_image(10, 90))
    (tmp_path / "mine_images.json").write_text('{"digit": true}')
    image = np.zeros((100, 100, 3), np.uint8)
    image[11:31, 21:25] = 255
    np.testing.assert_array_equal(Network(tmp_path / "mine.keras").preprocess(255 - image), image)


def test_size_of_images():
    """One fixed side keeps the proportions; for any other network that takes any size, images stay as they are."""
    image = random_image(32, 50)
    assert Network(classifier(size=(64, None, 3))).preprocess(image).shape == (64, 100, 3)
    assert Network(classifier(size=(None, 25, 1))).preprocess(image).shape == (16, 25, 1)
    np.testing.assert_array_equal(Network(lenet(channels=3)).preprocess(image), image)
    with pytest.raises(UserError, match="does not take 5 x 2 pixels; too small"):
        predict_cams(random_image(2, 5), classifier(size=(None, None, 3)))


def test_settings_that_do_not_fit_the_network(tmp_path):
    classifier().save(tmp_path / "mine.keras")
    (tmp_path / "mine_images.json").write_text('{"short_side": 30}')
    refused = {
        (tmp_path / "mine.keras",): r"mine\.keras takes images of a fixed size; short_side",
        (classifier(), (0, 1), "resnet"): "pixel range",
        (classifier(size=(32, 40, 1)), None, "resnet"): "grey images",
        (classifier(size=(None, None, 4)),): "it must take one image of 1 or 3 channels",
        (keras.Sequential(),): "must be functional or Sequential, and built",
        (".",): "nor a checkpoint of the original",
    }
    for arguments, text in refused.items():
        with pytest.raises(UserError, match=text):
            Network(*arguments)


def test_a_large_photo_is_scaled_down_and_its_boxes_are_in_its_own_pixels(tmp_path):
    """Of a photo four times as large, decoded in a quarter, the boxes are four times as large."""
    small = np.kron(np.random.default_rng(0).integers(0, 256, (12, 16, 3)), np.ones((50, 50, 1))).astype(np.uint8)
    network = Network(classifier())
    expected = predict_cams(small, network)
    for name in ("large.png", "large.jpg"):
        Image.fromarray(small.repeat(4, axis=0).repeat(4, axis=1)).save(tmp_path / name)
        cams = predict_cams(tmp_path / name, network)
        assert list(cams.classes) == list(expected.classes)
        found, wanted = ([box or (0, 0, 0, 0) for box in one.boxes] for one in (cams, expected))
        np.testing.assert_allclose(found, 4 * np.array(wanted), atol=16)


@pytest.mark.parametrize(("ground", "expected"), [(0, 255), (200, 200)])
def test_a_digit_on_black_is_drawn_on_white_and_a_grey_photo_as_it_is(ground, expected, tmp_path):
    pixels = np.full((40, 40, 3), ground, np.uint8)
    cams = predict_cams(pixels, classifier(size=(40, 40, 3)), top=1)
    show.draw(tmp_path / "figure.png", "grey", cams, 0 * cams.maps)  # no evidence
    assert (np.asarray(Image.open(tmp_path / "figure.png"))[100, 208 + 100] == expected).all()


def test_images_of_the_same_name_are_all_drawn(lenet_file, tmp_path):
    cat, dog = (photo(tmp_path / folder / "1.png") for folder in ("cats", "dogs"))
    show_images(cat, dog, dog, "--model", lenet_file, "--top", 1, "--out", tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"cam_cats_1.png", "cam_dogs_1.png", "cam_dogs_1_2.png", "boxes.csv"}


@pytest.mark.parametrize("is_script", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_boxes_csv(tmp_path, is_script):
    """With class names in any script; also as a user starts show.py, on a console that cannot show them."""
    lenet().save(tmp_path / "lenet.keras")
    names = ["Ziffer", "\u6570\u5b57", "\u0446\u0438\u0444\u0440\u0430", "d,e", *"456789"]
    (tmp_path / "lenet_classes.txt").write_text("\n".join(names), encoding="utf-8-sig")
    image = photo(tmp_path / "a.png")
    arguments = [image, "--model", tmp_path / "lenet.keras", "--top", 10, "--out", tmp_path / "out"]
    process = run("show.py", *arguments, PYTHONIOENCODING="ascii") if is_script else call(show, *arguments)
    assert (process.returncode, process.stderr) == (0, "")
    table = rows(tmp_path / "out" / "boxes.csv")
    assert sorted(row["class"] for row in table) == sorted(names)  # without the byte order mark
    scores = [float(row["score"]) for row in table]
    assert scores == sorted(scores, reverse=True)
    assert sum(float(row["probability"]) for row in table) == pytest.approx(1, abs=1e-4)
    for row, line in zip(table, process.stdout.splitlines()[2:], strict=True):
        box = " ".join(row[edge] for edge in ("x0", "y0", "x1", "y1"))
        assert line.endswith(f"box {box}" if row["x0"] else "nowhere positive")
        assert row["file"] == str(image)


def test_ctrl_c_during_the_imports_leaves_no_traceback(lenet_file, tmp_path):
    images = [photo(tmp_path / "a.png")] * 2000
    with start("show.py", *images, "--model", lenet_file, "--out", tmp_path) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, 1)
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 2


@pytest.mark.slow
def test_after_ctrl_c_boxes_csv_has_the_images_that_were_shown(lenet_file, tmp_path):
    out, images = tmp_path / "out", [photo(tmp_path / "a.png")] * 2000
    with start("show.py", *images, "--model", lenet_file, "--top", 1, "--out", out) as process:
        send_signal(process, signal.SIGINT, out / f"cam_{tmp_path.name}_a_3.png")
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "stopped")
    shown, found = len(list(out.glob("cam_*.png"))), len(rows(out / "boxes.csv"))
    assert 2 <= shown - 1 <= found <= shown  # at most the image at hand is missing


def test_the_library_changes_nothing_in_a_process():
    program = """if True:
        import os, signal, sys, keras, matplotlib
        state = lambda: (dict(os.environ), sys.stderr, sys.stdout, matplotlib.rcParams["backend"],
                         keras.config.image_data_format(), *map(signal.getsignal, signal.Signals))
        before = state()
        import cam, lenet, mnist, show, experiment.predict, experiment.process
        experiment.process.start()
        assert state() == before
    """
    process = run("-c", program)
    assert process.returncode == 0, process.stderr


def test_kinds_of_images_and_flags(lenet_file, tmp_path):
    kinds = {"a.png": ((100, 100), "L"), "b.jpg": ((300, 200), "RGB"), "c.png": ((30, 28), "RGBA")}
    paths = [photo(tmp_path / name, *size, mode=mode) for name, (size, mode) in kinds.items()]
    output = show_images(*paths, "--model", lenet_file, "--class", 3, 1, 4, "--npy", "--out", tmp_path / "out")
    assert [line.split()[0] for line in output.splitlines() if line.startswith("    ")] == ["3", "1", "4"]
    for name in "abc":
        assert (tmp_path / "out" / f"cam_{name}.png").exists()
        assert np.load(tmp_path / "out" / f"cam_{name}.npy").shape[0] == 1
    for flag in ([], ["--relu"]):
        show_images(paths[0], "--model", lenet_file, "--top", 10, "--npy", "--out", tmp_path, *flag)
        assert (np.load(tmp_path / "cam_a.npy").min() < 0) == (not flag)


def test_a_fresh_clone_has_a_lenet_and_the_one_of_a_run_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, test = load_dataset(ROOT / "data")
    Image.fromarray(test.images[3, :, :, 0]).save("digit.png")
    process = call(show, "digit.png", "--top", 1)
    assert process.stdout.splitlines()[0] == f"network: {ROOT / 'data' / 'lenet.keras'}"
    assert process.stdout.splitlines()[2].split()[0] == str(test.labels[3])
    lenet(classes=3).save("out/lenet.keras")
    process = call(show, "digit.png", "--top", 5)
    assert process.stdout.splitlines()[0] == f"network: {Path('out') / 'lenet.keras'}"
    assert len(rows(tmp_path / "out" / "boxes.csv")) == 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere.png"], ["nowhere.png is missing"]),
        (["README.md"], ["README.md is not a readable image"]),
        (["GOOD", "--model", "nowhere.keras"], ["nowhere.keras is missing"]),
        (["GOOD", "--model", "nowhere/lenet.keras"], ["nowhere/lenet.keras is missing; run mnist.py first"]),
        (["GOOD", "--model", "VGG17"], ["VGG17 is neither a file nor a network", "ResNet50"]),
        (["GOOD", "--class", "10"], ["--class", "0..9"]),
        (["GOOD", "--class", "1", "2"], ["--class", "one for each"]),
        (["GOOD", "--top", "0"], ["--top"]),
        (["GOOD", "--preprocess", "resnot"], ["preprocess: resnot is not a module"]),
        (["GOOD", "--pixel-range", "1", "0"], ["pixel range has the lower value first"]),
        (["GOOD", "--out", "README.md"], ["README.md"]),
        (["GOOD", "--model", "MobileNetV3Small"], ["V3Small' has no exact class activation map: layer 'activation"]),
    ],
)
def test_bad_input_is_named_in_one_line(lenet_file, tmp_path, arguments, parts):
    good = photo(tmp_path / "good.png")
    arguments = [good if argument == "GOOD" else argument for argument in arguments]
    model = [] if "--model" in arguments else ["--model", lenet_file]
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    process = call(show, *arguments, *model, *out)
    assert_one_line_error(process, "show.py: ", *parts)
    assert not (tmp_path / "out").exists()
