"""Inputs that other people have: each gives the right result, or one line that says what to do, and loses nothing."""

import errno
import fcntl
import json
import shutil
import threading
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import SMALL, assert_one_line_error, call, contents, rows, write_data
from keras import layers
from PIL import Image

import cam
import mnist
import show
from data.dataset import Split, load_dataset
from experiment import metrics
from experiment.digits import preprocess_digit
from experiment.exact_maps import exact_cam_model
from experiment.figures import report_classes
from experiment.files import UserError, acquire_lock
from experiment.images import read_picture
from experiment.predict import Network, predict_cams
from lenet import lenet


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A LeNet that takes images as they are."""
    path = tmp_path_factory.mktemp("network") / "net.keras"
    lenet().save(path)
    return path


def save_image(path, seed=0):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40), dtype=np.uint8)).save(path)
    return path


def test_show_does_not_replace_boxes_of_the_user(network, tmp_path):
    image = save_image(tmp_path / "photos" / "1.png")
    (tmp_path / "photos" / "boxes.csv").write_text("file,x0,y0,x1,y1\n1.png,1,2,3,4\n")
    before = contents(tmp_path)
    process = call(show, image, "--model", network, "--out", tmp_path / "photos")
    assert_one_line_error(process, "boxes.csv was not written by show.py")
    assert contents(tmp_path) == before
    for _ in range(2):  # its own may be replaced
        assert call(show, image, "--model", network, "--out", tmp_path / "out").returncode == 0


def test_show_does_not_replace_an_image(network, tmp_path):
    images = [save_image(tmp_path / name, seed) for seed, name in enumerate(["1.png", "cam_1.png"])]
    before = contents(tmp_path)
    process = call(show, *images, "--model", network, "--out", tmp_path)
    assert_one_line_error(process, "cam_1.png would replace an image")
    assert contents(tmp_path) == before


def test_a_folder_a_pattern_and_a_damaged_image(network, tmp_path, monkeypatch):
    for index in range(4):
        save_image(tmp_path / "photos" / f"{index}.png")
    damaged = tmp_path / "photos" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (tmp_path / "photos" / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    for images in ("photos", "photos/*.png"):
        process = call(show, images, "--model", network, "--out", tmp_path / "out", "--top", 1)
        assert process.returncode == 2
        first, last = process.stderr.splitlines()
        assert "2.png is not a readable image" in first
        assert last == "show.py: 1 of 4 images cannot be used"
        assert [row["file"][-5:] for row in rows(tmp_path / "out" / "boxes.csv")] == ["0.png", "1.png", "3.png"]
        shutil.rmtree(tmp_path / "out")
    assert_one_line_error(call(show, "none/*.png", "--model", network), "none/*.png is missing")


def test_a_long_name(network, tmp_path):
    image = save_image(tmp_path / f"{'n' * 247}.png")
    process = call(show, image, "--model", network, "--top", 1, "--out", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert len(list((tmp_path / "out").glob("cam_n*.png"))) == 1


@pytest.mark.parametrize("file", ["index.html", "holiday.jpg"])
def test_a_run_does_not_write_into_a_folder_of_the_user(file, small_data, tmp_path):
    (tmp_path / file).write_text("mine")
    for flags in [], ["--fresh"]:
        process = call(mnist, "--data", small_data, "--out", tmp_path, "--steps", 2, *SMALL, *flags)
        assert_one_line_error(process, f"--out {tmp_path} has other files, such as {file}")
    assert contents(tmp_path) == {file: b"mine"}


def test_fresh_deletes_what_a_run_wrote_by_name(small_data, tmp_path):
    arguments = ["--data", small_data, "--out", tmp_path, *SMALL]
    (tmp_path / "cam_7.png").write_text("of show.py")
    assert call(mnist, *arguments, "--steps", 4).returncode == 0
    (tmp_path / "img_1" / "holiday.png").write_text("mine")
    assert call(mnist, *arguments, "--steps", 2, "--fresh").returncode == 0
    assert (tmp_path / "img_1" / "holiday.png").read_text() == "mine"
    assert not (tmp_path / "img_1" / "cmap_4.png").exists()


@pytest.mark.parametrize(
    ("image", "heatmap"),
    [
        (np.zeros((4, 5), np.float32), np.zeros((4, 5))),
        (np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.uint8)),
        (np.zeros((4, 5), np.uint8), np.full((4, 5), 1.5)),
        (np.zeros((4, 5), np.uint8), np.full((4, 5), -0.1)),
        (np.zeros((4, 5), np.uint8), np.full((4, 5), np.nan)),
    ],
)
def test_an_overlay_of_other_values_is_refused(image, heatmap):
    with pytest.raises(ValueError, match="must"):
        cam.overlay(image, heatmap)


def test_an_image_without_a_digit_gets_no_figure(tmp_path):
    lenet().save(tmp_path / "net.keras")
    (tmp_path / "net_images.json").write_text('{"digit": true}')
    ink = np.zeros((60, 60, 4), np.uint8)
    ink[20:40, 25:35] = 255  # white on a transparent ground
    for pixels in np.full((60, 60), 255, np.uint8), ink:
        Image.fromarray(pixels).save(tmp_path / "page.png")
        process = call(show, tmp_path / "page.png", "--model", tmp_path / "net.keras", "--out", tmp_path / "out")
        assert_one_line_error(process, "page.png: no digit is found")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [64, 200, 333, 512, 1024])
@pytest.mark.parametrize("ground", [255, 245, 130])
def test_a_drawing_on_a_plain_ground_of_any_size(size, ground):
    drawing = np.full((size, size, 3), ground, np.uint8)
    drawing[size // 4 : 3 * size // 4, size // 2 : size // 2 + max(3, size // 20)] = 20
    assert preprocess_digit(drawing).max() > 200


def test_dollars_in_class_names(tmp_path):
    report_classes(tmp_path, np.array([0, 1]), np.array([0, 1]), ["$5_and_$10", r"$\frac{"])
    assert (tmp_path / "confusion.png").exists()


def test_what_python_takes(network):
    pixels = np.random.default_rng(0).integers(0, 200, (30, 40), dtype=np.uint8)
    wanted = predict_cams(pixels, Network(network), classes=[1])
    for classes in 1, np.int64(1), np.array([1]):
        assert predict_cams(pixels, Network(network), classes=classes).names == ["1"]
    for classes in [], ["1"], 10, -1, [1.5]:
        with pytest.raises(UserError, match=r"classes must be whole numbers in 0\.\.9"):
            predict_cams(pixels, Network(network), classes=classes)
    found = predict_cams(Image.fromarray(pixels), Network(network), classes=1)
    np.testing.assert_array_equal(found.maps, wanted.maps)
    for model in None, object():
        with pytest.raises(UserError, match="is not a model of Keras 3, nor a path"):
            Network(model)
    with pytest.raises(UserError, match="the array is not a readable image"):
        read_picture(np.empty((0, 3), np.uint8))


@pytest.mark.parametrize("kind", [np.int64, np.float16, np.float32, np.uint16, bool])
def test_grey_arrays_are_scaled_by_their_own_range(kind):
    ramp = np.linspace(0, 1, 12).reshape(3, 4) * (1 if kind in (np.float16, np.float32) else 200)
    ramp = ramp > 0.5 if kind is bool else ramp.astype(kind)
    found = read_picture(ramp).pixels[:, :, 0]
    np.testing.assert_allclose(found, (ramp - ramp.min()) / (ramp.max() - ramp.min() + 0.0) * 255, atol=1) if (
        kind is not bool
    ) else np.testing.assert_array_equal(found, 255 * ramp)


@pytest.mark.parametrize(
    "layer",
    [
        layers.CenterCrop(20, 20, name="crop"),
        layers.RandomCrop(20, 20, name="crop"),
        layers.Cropping2D(4, name="crop"),
        layers.Resizing(20, 20, crop_to_aspect_ratio=True, name="crop"),
        layers.Resizing(20, 20, pad_to_aspect_ratio=True, name="crop"),
        layers.Resizing(20, 20, name="crop"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_network_that_crops_the_image(layer, nested):
    images = keras.Input((32, 48, 3))
    cropped = keras.Sequential([keras.Input((32, 48, 3)), layer])(images) if nested else layer(images)
    f = layers.Conv2D(8, 3, padding="same")(cropped)
    f = layers.Cropping2D(1)(layers.ZeroPadding2D(1)(f))  # of feature maps, as in NASNet
    model = keras.Model(images, layers.Dense(4)(layers.GlobalAveragePooling2D()(f)))
    if isinstance(layer, layers.Resizing) and not (layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio):
        exact_cam_model(model)
        return
    with pytest.raises(UserError, match="layer 'crop' crops or pads the image"):
        exact_cam_model(model)


@pytest.mark.parametrize(("height", "width"), [(40, 44), (97, 97), (45, 50), (28, 30)])
def test_an_impulse_is_where_its_peak_in_the_map_is(height, width, tmp_path):
    """In images of data/, and of a digit in a photo: the peak covers the impulse, at whatever place it is."""
    model = lenet()
    for name in "conv1", "conv2":  # which pass the pixel in the middle on
        kernel = np.zeros(model.get_layer(name).kernel.shape)
        kernel[2, 2] = 1
        model.get_layer(name).kernel.assign(kernel)
    model.get_layer("softmax_weights").kernel.assign(np.ones((64, 10)))
    cam_model = cam.class_activation_model(model)
    places = [(1, 1), (1, width - 2), (height - 2, 1), (height - 2, width - 2), (height // 2, width // 3)]
    images = np.zeros((10, height, width), np.uint8)
    for index, (y, x) in enumerate(places):
        images[index, y, x] = 255
    train, _ = load_dataset(write_data(tmp_path, images, range(10)), 4)
    assert train.images.shape[1:3] == (-(-height // 4) * 4, -(-width // 4) * 4)
    _, maps = cam_model.predict_on_batch(train.images)
    for class_map, (y, x) in zip(cam.upsample(maps[..., 0], *train.images.shape[1:3]), places, strict=False):
        assert_peak(class_map, (y, x))

    model.save(tmp_path / "net.keras")
    (tmp_path / "net_images.json").write_text('{"digit": true}')
    network = Network(tmp_path / "net.keras")
    for y, x in places:
        pixels = np.zeros((height, width), np.uint8)
        pixels[y, x] = 255
        assert_peak(cam.upsample(predict_cams(pixels, network, 1).maps, height, width)[0], (y, x))


def assert_peak(class_map, place):
    peak = np.unravel_index(class_map.argmax(), class_map.shape)
    assert np.abs(np.subtract(peak, place)).max() <= 2, (peak, place)


OTHER_FILES = ("pth", "onnx", "tflite", "pb", "json", "pkl", "npz")


@pytest.mark.parametrize("suffix", OTHER_FILES)
def test_networks_of_other_libraries(suffix, tmp_path):
    (tmp_path / f"net.{suffix}").write_bytes(b"\x08\x07\x12\x07pytorch" * 30)
    with pytest.raises(
        UserError, match=r"net\..* is neither a saved Keras model \(\.keras, \.h5, \.hdf5\) nor a checkpoint"
    ):
        Network(tmp_path / f"net.{suffix}")


@pytest.mark.parametrize("name", ["a.heic", "a.npy", "a.dcm", "a.svg"])
def test_pictures_of_other_formats(name, tmp_path):
    (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(UserError, match=r"a\..* is not a readable image \(unknown format; convert it to PNG\)"):
        read_picture(tmp_path / name)


def test_feature_maps_of_one_location():
    with pytest.raises(UserError, match="feature maps are 1 x 1, so there is nothing to map"):
        exact_cam_model(keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), include_top=True))


def test_of_equal_logits_the_first_wins_everywhere():
    logits, labels = np.zeros((3, 4)), np.array([0, 1, 3])
    np.testing.assert_array_equal(metrics.ranks(logits, labels), [0, 1, 3])
    np.testing.assert_array_equal(metrics.ranks(np.array([[1.0, 2, 2, 0]] * 4), np.arange(4)), [2, 0, 1, 3])


def test_localization_says_of_how_many_images():
    images, maps = np.zeros((3, 8, 8, 1), np.uint8), np.ones((3, 2, 2, 2))
    split = Split(images, np.zeros(3, int), [None, np.array([[0, 0, 8, 8]]), None])
    model = SimpleNamespace(predict_on_batch=lambda images: (np.zeros((3, 2)), maps))
    found, _, _ = metrics.evaluate(model, split)
    assert (found["boxed"], found["gt_known"]) == (1, 1)
    lines = metrics.format_metrics(found, 3).splitlines()
    assert lines[0] == "on all 3 test images"
    assert lines[2].split() == ["images", "with", "true", "boxes", "1"]
    assert "boxed" not in metrics.evaluate(model, split._replace(boxes=np.tile([0, 0, 8, 8], (3, 1))))[0]


def test_a_box_that_is_narrower_than_a_pixel():
    class_map = np.zeros((8, 8))
    class_map[3, 5] = 1
    for box in [5.1, 3.1, 5.3, 3.2], [5.4, 2.6, 5.45, 3.4]:
        measured = metrics.measure_map(class_map, np.array(box), all_metrics=True)
        assert measured["pointing"]
        assert measured["energy"] == 1
        assert measured["inside"].sum() == 1
    assert metrics.measure_map(class_map, np.array([7.8, 7.8, 8, 8]))["energy"] == 0


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def flock(file, flags):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    acquire_lock(tmp_path / "lock").close()
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_a_data_folder_that_cannot_be_written(tmp_path, random_images, monkeypatch):
    folder = write_data(tmp_path / "data", random_images, range(10))

    def read_only(path, wait):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("data.dataset.acquire_lock", read_only)
    with pytest.raises(
        UserError, match=r"data cannot be written \(Read-only file system\).*copy it, and give the copy"
    ):
        load_dataset(folder)


def test_two_first_starts_at_once(tmp_path, random_images, monkeypatch):
    """The second waits for the first, and extracts nothing."""
    folder, extracted = write_data(tmp_path / "data", random_images, range(10)), []
    lock = acquire_lock(folder / "img.lock")
    with monkeypatch.context() as patched:
        patched.setattr("data.dataset.acquire_lock", lambda path, wait: (tmp_path / "unlocked").open("w"))
        load_dataset(folder)
    cached, hidden = folder / "img", folder / "hidden"
    cached.rename(hidden)
    thread = threading.Thread(target=lambda: extracted.append(load_dataset(folder)))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    monkeypatch.setattr("data.dataset.extract", None)
    hidden.rename(cached)
    lock.close()
    thread.join(20)
    np.testing.assert_array_equal(extracted[0][0].images[:, :, :, 0], random_images[:7])


def test_the_model_exists_even_if_a_figure_fails(small_data, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "overview.png")

    arguments = ["--data", small_data, "--out", tmp_path, "--steps", 2, *SMALL]
    with monkeypatch.context() as patched:
        patched.setattr(mnist, "save_figures", fail)
        assert_one_line_error(call(mnist, *arguments), "No space left on device", "overview.png")
    model = keras.models.load_model(tmp_path / "lenet.keras")
    assert not (tmp_path / "accuracy.png").exists()
    process = call(mnist, *arguments)  # makes the figures, and trains nothing
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "accuracy.png").exists()
    for found, wanted in zip(keras.models.load_model(tmp_path / "lenet.keras").weights, model.weights, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_kept_weights_give_the_predictions_and_boxes_of_their_step(small_data, tmp_path):
    arguments = ["--data", small_data, "--out", tmp_path, "--steps", 4, "--precision", "float32", *SMALL]
    assert call(mnist, *arguments).returncode == 0
    page = json.loads((tmp_path / "run.js").read_text().removeprefix("run = ").removesuffix(";\n"))
    _, test = load_dataset(small_data)
    for step in page["steps"]:
        model = lenet()
        with np.load(tmp_path / "weights" / f"{step['step']}.npz") as weights:
            model.set_weights([weights[weight.path] for weight in model.weights])
        logits, maps = cam.class_activation_model(model).predict_on_batch(test.images[:4])
        np.testing.assert_array_equal(logits.argmax(axis=1), step["predicted"])
        for index, box in enumerate(step["boxes"]):
            class_map = cam.upsample(maps[index : index + 1, :, :, test.labels[index]], *test.images.shape[1:3])[0]
            assert cam.bounding_box(class_map) == (box and tuple(box))
