"""photos.py, run as a user runs it: on a small archive of coloured shapes, and a little on real photos."""

import csv
import json
import re
import shutil
import sys
import tarfile
import zlib
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import assert_one_line_error, call, encoded, rows, run, write_tar
from keras import layers
from PIL import Image
from skimage import draw

import photos
import show
from cam import class_activation_model, normalize, overlay, upsample
from data import photo_folders
from data.photo_folders import load_photos, read_photo
from experiment.features import load_pooled_features, prefetch
from experiment.files import UserError
from experiment.predict import Network, predict_cams
from experiment.preprocessing import Preprocessing

SHAPES = {"001.disc": (220, 40, 40), "002.square": (40, 60, 220), "003.stripes": (30, 200, 60)}
SIZE = ["--short-side", 64]
SMALL = ["--eval-every", 20, "--samples", 4, *SIZE, "--learning-rate", 0.01]
GAP = ["--network", "alexnet", "--weights", "none", "--batch-size", 4, "--eval-every", 2, "--samples", 4]


def shape(category, rng):
    """A photo of a shape somewhere on noise, of a size of its own, and the box of the shape."""
    height, width = rng.integers(60, 110, 2)
    pixels = rng.integers(90, 160, (height, width, 3)).astype(np.uint8)
    y, x, side = rng.integers(20, height - 20), rng.integers(20, width - 20), 14
    rows, columns = np.mgrid[y - side : y + side, x - side : x + side]
    if category == "001.disc":
        rows, columns = draw.disk((y, x), side)
    elif category == "003.stripes":
        rows, columns = rows[::4], columns[::4]
    pixels[rows, columns] = SHAPES[category]
    return pixels, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    rng = np.random.default_rng(0)
    files, lines = {}, ["file,x0,y0,x1,y1"]
    for category in SHAPES:
        for index in range(1, 33):
            name = f"{category}/{category[:3]}_{index:04}.jpg"
            pixels, box = shape(category, rng)
            files[f"256_ObjectCategories/{name}"] = encoded(pixels)
            if index % 4:  # some photos have no boxes, and some have two
                lines += [",".join(map(str, [name, *box]))] + index % 2 * [f"{name},1,1,9,9"]
    files["256_ObjectCategories/boxes.csv"] = "\n".join(lines).encode()
    return write_tar(tmp_path_factory.mktemp("photos") / "shapes.tar", files)


def small_network(size=(None, None), channels=3):
    """A network with random weights, of five classes, which takes pixels of -1..1."""
    keras.utils.set_random_seed(1)
    images = keras.Input((*size, channels))
    x = layers.Conv2D(32, 5, 4, activation="relu", padding="same")(images)
    x = layers.Conv2D(64, 3, 2, activation="relu", padding="same")(x)
    return keras.Model(images, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "Small.keras"
    small_network().save(path)
    path.with_name("Small_images.json").write_text('{"pixel_range": [-1, 1]}')
    return path


@pytest.fixture(scope="module")
def small_run(archive, network):
    out = archive.parent / "out"
    process = run("photos.py", "--data", archive, "--network", network, "--out", out, "--steps", 50, *SMALL)
    assert process.returncode == 0, process.stderr
    return out, process


@pytest.mark.slow
def test_what_a_run_writes(small_run, archive, network):
    out, process = small_run
    assert "66 training photos, 30 test photos of 3 classes" in process.stdout
    assert "21 test photos with boxes" in process.stdout
    assert "on all 30 test images" in process.stdout
    assert "GT-known localization" in process.stdout
    assert "WARNING" not in process.stderr
    for sample in range(4):
        names = {path.name for path in (out / f"img_{sample}").glob("cmap_*")}
        assert names == {f"cmap_{step}.png" for step in (0, 20, 40, 50)}
    for name in "accuracy.png", "index.html", "overview.png", "patterns.png", "run.js", "units.png":
        assert (out / name).exists(), name
    assert (out / "small_classes.txt").read_text() == "disc\nsquare\nstripes\n"
    assert json.loads((out / "small_images.json").read_text()) == {"short_side": 64, "pixel_range": [-1, 1]}
    history = rows(out / "history.csv")
    assert [row["images"] for row in history] == ["0", "1280", "2560", "3200"]
    assert float(history[-1]["test_accuracy"]) > 0.6  # by chance 0.33
    page = json.loads((out / "run.js").read_text().removeprefix("run = ").removesuffix(";\n"))
    assert page["classes"] == ["disc", "square", "stripes"]
    assert page["labels"] == [0, 1, 2, 0]
    assert [len(boxes) for boxes in page["boxes"]] == [2, 2, 2, 0]
    assert page["steps"][-1]["gt_known"] == float(history[-1]["test_gt_known"])
    # The picture is that of the whole photo; the map over it is that of the saved network.
    model = keras.models.load_model(out / "small.keras")
    _, test, _, _ = load_photos(archive)
    photo = np.asarray(Image.fromarray(read_photo(test.files[1]).pixels))
    cams = predict_cams(photo, Network(out / "small.keras"), classes=[1])
    picture = np.asarray(Image.open(out / "img_1" / "image_test.png"))
    height, width = page["sizes"][1]
    assert min(height, width) == 64
    times = picture.shape[0] // height
    assert np.abs(picture[::times, ::times].mean() - photo.mean()) < 1
    heatmap = normalize(upsample(cams.maps, height, width))[0]
    shown = np.asarray(Image.open(out / "img_1" / "cmap_50.png"))[::times, ::times]
    assert np.abs(overlay(picture[::times, ::times], heatmap) - shown.astype(int)).max() <= 1
    # It is the network with other softmax weights, whose mean over the classes is zero.
    _, maps = class_activation_model(model).predict_on_batch(Network(out / "small.keras").preprocess(photo)[None])
    np.testing.assert_allclose(maps[0, :, :, 1], cams.maps[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.get_layer("softmax_weights").kernel.numpy().mean(axis=1), 0, atol=1e-6)
    kernels = [keras.models.load_model(path).get_weights()[0] for path in (network, out / "small.keras")]
    np.testing.assert_array_equal(*kernels)


@pytest.mark.slow
def test_a_network_is_measured_as_show_py_sees_the_photos(small_run, archive, tmp_path):
    """Against boxes that show.py finds for each photo, compared with the true ones."""
    model = small_run[0] / "small.keras"
    process = call(photos, "--evaluate", model, "--data", archive, "--out", tmp_path / "measured")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "measured" / "confusion.png").exists()
    found = dict(re.findall(r"^ {4,}(\S.*?) +([\d.]+)%", process.stdout, re.MULTILINE))

    with tarfile.open(archive) as members:
        members.extractall(tmp_path, filter="data")
    boxes = {}
    for name, *box in list(csv.reader((tmp_path / "256_ObjectCategories" / "boxes.csv").open()))[1:]:
        boxes.setdefault(name, []).append(tuple(map(int, box)))
    network, correct, overlaps, is_correct = Network(model), 0, [], []
    paths = sorted((tmp_path / "256_ObjectCategories").glob("*/*.jpg"))
    for path in paths:
        label = list(SHAPES).index(path.parent.name)
        best = predict_cams(path, network, top=1).classes[0] == label
        correct += best
        if true := boxes.get(f"{path.parent.name}/{path.name}"):
            x0, y0, x1, y1 = predict_cams(path, network, classes=[label]).boxes[0] or (0, 0, 0, 0)
            pixels = {(x, y) for x in range(x0, x1) for y in range(y0, y1)}
            others = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in true]
            overlaps.append(max(len(pixels & other) / len(pixels | other) for other in others))
            is_correct.append(best)
    assert len(paths) == 96
    assert len(overlaps) == 72
    assert float(found["accuracy"]) == pytest.approx(100 * correct / 96, abs=0.01)
    assert float(found["mean IoU"]) == pytest.approx(100 * np.mean(overlaps), abs=1)  # boxes are rounded elsewhere
    sure = [overlap for overlap in overlaps if abs(overlap - 0.5) > 0.05]
    hits = sum(overlap > 0.5 for overlap in sure)
    assert 100 * hits / 72 <= float(found["GT-known localization"]) + 0.01
    assert float(found["GT-known localization"]) - 0.01 <= 100 * (hits + 72 - len(sure)) / 72
    assert found["top-5 localization"] == found["GT-known localization"]  # of three classes
    assert float(found["top-1 localization"]) <= 100 * np.mean(is_correct) + 0.01
    assert {"pointing game", "energy in the box", "MaxBoxAcc", "PxAP"} < set(found)


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is(small_run, archive, network):
    out, _ = small_run
    before = (out / "small.keras").read_bytes()
    process = call(photos, "--data", archive, "--network", network, "--out", out, "--steps", 50, *SMALL)
    assert process.returncode == 0
    assert "finished run; --fresh deletes it" in process.stdout
    assert (out / "small.keras").read_bytes() == before


@pytest.mark.slow
def test_a_run_continues_bit_for_bit_and_its_features_are_used_again(small_run, archive, network, tmp_path):
    out, copy = small_run[0], tmp_path / "out"
    shutil.copytree(out, copy)
    (features,) = copy.glob("features-*.bin")
    whole = features.read_bytes()
    row = 2 * 64 * 4 + 4  # F_k of a photo and of its mirror image, and a checksum
    assert len(whole) == 66 * row
    features.write_bytes(whole[:-700])  # as if the run had been killed in the middle of a photo
    (copy / "small.keras").unlink()
    (copy / "checkpoint.previous.npz").replace(copy / "checkpoint.npz")
    process = call(photos, "--data", archive, "--network", network, "--out", copy, "--steps", 50, *SMALL)
    assert "resuming after step 40" in process.stdout, process.stderr
    models = [keras.models.load_model(folder / "small.keras") for folder in (out, copy)]
    for found, wanted in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert features.read_bytes()[: 65 * row] == whole[: 65 * row]
    # They are kept by --fresh, used with other settings, and computed again for another network or size.
    marked = bytearray(whole)
    marked[: row - 4] = bytes(row - 4)
    marked[row - 4 : row] = zlib.crc32(bytes(row - 4)).to_bytes(4, sys.byteorder)
    features.write_bytes(marked)
    arguments = ["--data", archive, "--out", copy, "--steps", 1, "--samples", 1, "--fresh"]
    assert call(photos, *arguments, "--network", network, "--short-side", 64, "--seed", 3).returncode == 0
    assert features.read_bytes() == marked
    assert call(photos, *arguments, "--network", network, "--short-side", 48).returncode == 0
    assert [path.name for path in copy.glob("features-*")] != [features.name]


def test_pooled_features_are_those_of_the_network(tmp_path):
    model = keras.Sequential([small_network(), layers.Softmax()])
    images = [np.random.default_rng(index).normal(size=(2, 20 + index, 30, 3)) for index in range(5)]

    def load(read):
        return load_pooled_features(tmp_path, model, read, [0, 1, 2, 3, 4], ["a", np.arange(3)])

    def read_again(index):
        computed.append(index)
        return images[index]

    found = load(images.__getitem__)
    for pooled, batch in zip(found, images, strict=True):
        np.testing.assert_allclose(pooled, model(batch), rtol=1e-5)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    zeros = whole[: len(whole) // 2] + bytes(9) + whole[len(whole) // 2 + 9 :]
    for content, wanted in (
        (whole, []),
        (zeros, [0, 1, 2, 3]),
        (whole[:-1], [4]),
        (whole + whole, []),
        (b"1", [*range(5)]),
    ):
        computed = []
        file.write_bytes(content)
        np.testing.assert_allclose(load(read_again), found, rtol=1e-5)
        assert sorted(computed[1:]) == wanted  # the first is read for its shape
        assert file.read_bytes()[: len(whole)] == whole


def linear(network, images_json="{}", short_side=None):
    """`photos.Linear` on a saved network, with the file beside it."""
    network.with_name(f"{network.stem}_images.json").write_text(images_json)
    return photos.Linear(linear_settings(network, short_side), ["a", "b"])


def linear_settings(network, short_side=None):
    return SimpleNamespace(network=str(network), short_side=short_side, learning_rate=0.1, label_smoothing=0)


def test_how_a_network_takes_photos(tmp_path, capsys):
    small_network().save(tmp_path / "any.keras")
    small_network((48, 64)).save(tmp_path / "fixed.keras")
    any_size, fixed = tmp_path / "any.keras", tmp_path / "fixed.keras"
    assert linear(any_size).preprocessing == Preprocessing(short_side=256, pixel_range=(0, 255))
    assert "any.keras gets pixels of 0..255; if it was trained on others, say so in" in capsys.readouterr().out
    recorded = '{"short_side": 90, "pixel_range": [0, 1]}'
    assert linear(any_size, recorded).preprocessing == Preprocessing(short_side=90, pixel_range=(0, 1))
    assert linear(any_size, recorded, 64).preprocessing == Preprocessing(short_side=64, pixel_range=(0, 1))
    assert linear(fixed, '{"preprocess": "resnet"}').preprocessing == Preprocessing(preprocess="resnet")
    assert linear(any_size, '{"digit": true}').preprocessing == Preprocessing(digit=True, pixel_range=(0, 255))
    assert capsys.readouterr().out.count("pixels of 0..255") == 1


def test_networks_and_settings_that_do_not_fit(tmp_path):
    two = [keras.Input((32, 32, 3)), keras.Input((32, 32, 3))]
    pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3)(layers.Add()(two)))
    cropped = layers.Conv2D(8, 3)(layers.CenterCrop(16, 16)(two[0]))
    networks = {
        "two": (keras.Model(two, layers.Dense(2)(pooled)), "{}", None, "one image of 1 or 3 channels"),
        "deep": (small_network(channels=4), "{}", None, "one image of 1 or 3 channels"),
        "grey": (small_network(channels=1), '{"preprocess": "resnet"}', None, "takes grey images"),
        "fixed": (small_network((48, 64)), "{}", 64, "takes images of a fixed size; short_side"),
        "digit": (small_network(), '{"digit": true}', 64, "takes digits, which are scaled by their own size"),
        "crop": (
            keras.Model(two[0], layers.Dense(2)(layers.GlobalAveragePooling2D()(cropped))),
            "{}",
            None,
            "center_crop",
        ),
    }
    for name, (network, images_json, short_side, message) in networks.items():
        network.save(tmp_path / f"{name}.keras")
        with pytest.raises(UserError, match=message):
            linear(tmp_path / f"{name}.keras", images_json, short_side)


def test_features_depend_on_all_of_the_network(tmp_path):
    """Two networks of equal weights, but another rescaling."""
    found = set()
    for scale in 1 / 255, 1 / 127.5:
        images = keras.Input((None, None, 3))
        keras.Model(images, small_network()(layers.Rescaling(scale)(images))).save(tmp_path / "net.keras")
        settings = linear_settings(tmp_path / "net.keras")
        photos.Linear(settings, ["a", "b"])
        found.add(settings.pretrained_checksum)
    assert len(found) == 2


def test_photos_that_are_evaluated_again_are_read_once(archive, monkeypatch):
    _, test, *_ = load_photos(archive)
    files = []
    monkeypatch.setattr(photo_folders, "read_photo", lambda file: files.append(file) or read_photo(file))
    split = photo_folders.make_split(test, 64, lambda file: None, cached=len(test.files))
    first, second = list(split.images), list(split.images)
    assert files == test.files
    assert all(map(np.array_equal, first, second))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(48, 64), None])
def test_any_network(size, archive, tmp_path, monkeypatch):
    """One of a fixed size, and one of keras.applications with its own preprocessing."""
    if size:
        small_network(size).save(tmp_path / "net.keras")
        name = tmp_path / "net.keras"
    else:

        def make(weights, include_top):
            assert weights == "imagenet"
            assert not include_top
            images = keras.Input((None, None, 3))
            return keras.Model(images, small_network().layers[1](images))

        make.__module__ = "keras.applications.resnet50"
        monkeypatch.setattr(keras.applications, "ResNet50", make)
        name = "ResNet50"
    out = tmp_path / "out"
    arguments = ["--data", archive, "--network", name, "--out", out, "--steps", 3, "--samples", 4]
    process = call(photos, *arguments, *([] if size else SIZE))
    assert process.returncode == 0, process.stderr
    wanted = {"pixel_range": [0, 255]} if size else {"short_side": 64, "preprocess": "resnet50"}
    (file,) = out.glob("*_images.json")
    assert json.loads(file.read_text()) == wanted
    network = Network(next(out.glob("*.keras")))
    _, test, _, _ = load_photos(archive)
    predicted = [network.predict(read_photo(photo).pixels)[0].argmax() for photo in test.files[:4]]
    page = json.loads((out / "run.js").read_text().removeprefix("run = ").removesuffix(";\n"))
    assert page["steps"][-1]["predicted"] == predicted


@pytest.mark.slow
def test_folders_are_matched_by_wordnet_id(archive, tmp_path, monkeypatch):
    """As in ILSVRC: python photos.py --evaluate ResNet50 --data ILSVRC/val."""
    classes = [("n01", "disc"), ("n02", "crane"), ("n03", "crane"), *((f"n1{k}", f"other_{k}") for k in range(4))]

    def make(weights):
        keras.utils.set_random_seed(2)
        images = keras.Input((64, 64, 3))
        return keras.Model(images, layers.Dense(7)(layers.GlobalAveragePooling2D()(layers.Conv2D(8, 5)(images))))

    make.__module__ = "keras.applications.resnet50"
    monkeypatch.setattr(keras.applications, "ResNet50", make)
    names = SimpleNamespace(decode_predictions=lambda codes, top: [[(*classes[code.argmax()], 1.0)] for code in codes])
    monkeypatch.setattr(sys.modules[make.__module__], "decode_predictions", names.decode_predictions)
    with tarfile.open(archive) as tar:
        files = {member.name.split("/", 1)[1]: tar.extractfile(member).read() for member in tar}
    renamed = {"001.disc": "disc", "002.square": "n02", "003.stripes": "n03"}
    data = {re.sub(r"^[^/]+", lambda found: renamed.get(found[0], found[0]), name): files[name] for name in files}
    del data["boxes.csv"]
    process = call(photos, "--evaluate", "ResNet50", "--data", write_tar(tmp_path / "val.tar", data), "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    network, labels, ranks = Network("ResNet50"), [], []
    _, test, _, _ = load_photos(archive, test_share=0.9)
    for photo in [*load_photos(archive, test_share=0.9)[0].files, *test.files]:
        labels.append(list(renamed).index(photo.name.split("/")[1]))
        scores = network.predict(read_photo(photo).pixels)[0]
        ranks.append((scores > scores[labels[-1]]).sum())
    found = dict(re.findall(r"^ {4,}(\S.*?) +([\d.]+)%", process.stdout, re.MULTILINE))
    assert float(found["accuracy"]) == pytest.approx(100 * np.mean(np.equal(ranks, 0)), abs=0.01)
    assert float(found["top-5 accuracy"]) == pytest.approx(100 * np.mean(np.less(ranks, 5)), abs=0.01)
    data = {name.replace("n02", "crane"): content for name, content in data.items()}
    process = call(photos, "--evaluate", "ResNet50", "--data", write_tar(tmp_path / "val.tar", data), "--out", tmp_path)
    assert_one_line_error(process, "2 classes are named crane; name the folder n02 or n03")


@pytest.mark.slow
def test_a_folder_of_photos_of_ones_own(network, tmp_path):
    """Any names, a test set of its own, no boxes; and a fifth of the training photos as validation set."""
    rng = np.random.default_rng(3)
    for part, count in (("train", 6), ("val", 2)):
        for name, category in (("discs", "001.disc"), ("squares", "002.square")):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(shape(category, rng)[0]).save(tmp_path / "photos" / part / name / f"photo {index}.jpeg")
    arguments = ["--data", tmp_path / "photos", "--network", network, "--steps", 1, "--batch-size", 4, *SMALL]
    process = call(photos, *arguments, "--out", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert "12 training photos, 4 test photos of 2 classes" in process.stdout
    assert "localization is not measured" in process.stdout
    assert "GT-known" not in process.stdout
    folded = call(photos, *arguments, "--out", tmp_path / "out2", "--fold", 2)
    assert "10 training photos, 2 test photos of 2 classes" in folded.stdout, folded.stderr


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_photos(small_run, archive, network):
    out, _ = small_run
    arguments = ["--out", out, "--steps", 50, "--network", network, *SMALL]
    other = call(photos, *arguments, "--data", archive, "--test-share", 0.2)
    assert_one_line_error(other, "--test-share None, not 0.2")
    whole, trained = archive.read_bytes(), network.read_bytes()
    images_json = network.with_name("Small_images.json")
    images = images_json.read_text()
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    try:
        model = keras.models.load_model(network)
        model.set_weights([2 * weight for weight in model.get_weights()])
        model.save(network)
        process = call(photos, *arguments, "--data", archive)
        assert_one_line_error(process, f"the pretrained network has changed since {out} was begun", "--fresh")
        network.write_bytes(trained)
        images_json.write_text('{"pixel_range": [0, 1]}')
        process = call(photos, *arguments, "--data", archive)
        assert_one_line_error(process, f"the pretrained network has changed since {out} was begun", "--fresh")
        images_json.write_text(images)
        del files["256_ObjectCategories/001.disc/001_0001.jpg"]
        write_tar(archive, files)
        process = call(photos, *arguments, "--data", archive)
        assert_one_line_error(process, f"{archive} has changed since {out} was begun", "--fresh")
    finally:
        archive.write_bytes(whole)
        network.write_bytes(trained)
        images_json.write_text(images)


@pytest.mark.slow
def test_class_names_that_do_not_fit_the_network(small_run, archive, tmp_path):
    for name in "small.keras", "small_images.json":
        shutil.copy(small_run[0] / name, tmp_path)
    (tmp_path / "small_classes.txt").write_text("disc\nsquare\n")
    process = call(photos, "--evaluate", tmp_path / "small.keras", "--data", archive, "--out", tmp_path)
    assert_one_line_error(process, "small_classes.txt has 2 lines; the model has 3 classes")


def test_bad_input(archive, network, tmp_path):
    here = ["--out", tmp_path / "out", *SMALL]
    fixed = tmp_path / "fixed.keras"
    small_network((64, 64)).save(fixed)
    flat = tmp_path / "flat.keras"
    keras.Sequential([keras.Input((3,)), layers.Dense(2)]).save(flat)
    cases = [
        (["--data", tmp_path / "no.tar", *here], ["no.tar is missing"]),
        (
            ["--data", archive, *here, "--network", "alexnet", "--weights", tmp_path / "no.npz", "--short-side", 256],
            ["no.npz is missing"],
        ),
        (["--data", archive, *here, "--network", tmp_path / "no.keras"], ["no.keras is missing"]),
        (["--data", archive, *here, "--network", "ResNet5"], ["ResNet5 is neither a file nor a network of keras"]),
        (["--data", archive, *here, "--network", flat], ["flat.keras: it has no feature maps"]),
        (["--data", archive, *here, "--fold", 6], ["--fold", "6 is not in 1 to 5"]),
        (["--data", archive, "--evaluate", tmp_path / "no.keras"], ["no.keras is missing"]),
        (["--data", archive, "--evaluate", "a.keras", "--fold", 1], ["all photos of --data, without --fold"]),
        (["--data", archive, "--evaluate", "a.keras", "--epochs", 9], ["all photos of --data, without --epochs"]),
        (
            ["--data", archive, "--evaluate", fixed, "--short-side", 9],
            ["images of a fixed size; short_side is for networks"],
        ),
        (
            ["--data", archive, "--evaluate", network],
            ["has no folder with the name of a class of the network: 0, 1, 2"],
        ),
        (["--data", archive, *here, "--network", "alexnet"], ["--short-side must be at least 224 for alexnet"]),
        (["--data", tmp_path, "--out", tmp_path / "out", *SMALL], ["lies in --data"]),
        (["--data", tmp_path, "--out", tmp_path, *SMALL], ["lies in --data"]),
        (["--data", archive, *here, "--out", tmp_path, "--network", fixed], ["fixed.keras lies in --out"]),
        (["--data", archive, *here, "--warmup", 0.5], ["--warmup is not a setting of the linear recipe"]),
    ]
    for arguments, parts in cases:
        assert_one_line_error(call(photos, *arguments), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_alexnet_continues_bit_for_bit(archive, tmp_path):
    """The gap recipe. Dropout, too: what it leaves out is random, and the state of the run says where that was."""
    out, copy = tmp_path / "out", tmp_path / "copy"
    process = call(photos, "--data", archive, "--out", out, "--steps", 3, *GAP)
    assert process.returncode == 0, process.stderr
    assert json.loads((out / "alexnet_images.json").read_text()) == {"short_side": 256, "pixel_range": [0, 255]}
    shutil.copytree(out, copy)
    (copy / "alexnet.keras").unlink()
    (copy / "checkpoint.previous.npz").replace(copy / "checkpoint.npz")
    process = call(photos, "--data", archive, "--out", copy, "--steps", 3, *GAP)
    assert "resuming after step 2" in process.stdout, process.stderr
    models = [keras.models.load_model(folder / "alexnet.keras") for folder in (out, copy)]
    for found, wanted in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(found, wanted)
    # The whole photo is mapped, at 256 pixels on its short side.
    pixels = shape("002.square", np.random.default_rng(1))[0].repeat(8, axis=0).repeat(8, axis=1)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    process = call(show, tmp_path / "photo.png", "--model", out / "alexnet.keras", "--npy", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    cells, (short, long) = sorted(np.load(tmp_path / "cam_photo.npy").shape[1:]), sorted(pixels.shape[:2])
    assert cells[0] == 15
    assert abs(cells[1] - 15 * long / short) <= 1


def test_the_batch_of_a_step_depends_on_nothing_else(archive):
    train, _, _, _ = load_photos(archive)
    settings = {"seed": 3, "batch_size": 6, "short_side": 256, "weights": "none", "precision": "float32"}
    settings |= {"location_dropout": 0.3, "learning_rate": 0.1, "steps": 9, "warmup": 0.1, "label_smoothing": 0}
    gap = photos.Gap(SimpleNamespace(**settings), ["disc", "square", "stripes"])
    batches = list(gap.batches(train, range(12)))
    assert batches[0][0].shape == (6, 224, 224, 3)
    for step, (crops, labels) in zip(range(7, 9), gap.batches(train, range(7, 9)), strict=True):
        np.testing.assert_array_equal(crops, batches[step][0])
        np.testing.assert_array_equal(labels, batches[step][1])
    # An epoch of 66 photos has each once; in the next it is cropped at another place.
    np.testing.assert_array_equal(np.bincount(np.concatenate([labels for _, labels in batches[:11]])), [22, 22, 22])
    assert np.abs(batches[0][0].astype(int) - batches[11][0]).max() > 0
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda step: 1 / (3 - step), range(9)))


@pytest.mark.slow
def test_a_photo_that_vanishes_during_training(archive, tmp_path):
    with tarfile.open(archive) as members:
        members.extractall(tmp_path, filter="data")
    folder = tmp_path / "256_ObjectCategories"
    program = f"""if True:
        from experiment import process
        process.start()
        import pathlib, photos
        def random_crop(*arguments, crop=photos.random_crop, count=[]):
            count.append(1)
            if len(count) == 4 * 8:  # made ahead, while step 4 is trained or later
                for photo in pathlib.Path({str(folder)!r}).glob("*/*.jpg"):
                    photo.unlink()
            return crop(*arguments)
        photos.random_crop = random_crop
        photos.main()
    """
    process = run("-c", program, "--data", folder, "--out", tmp_path / "out", "--steps", 20, *GAP)
    assert_one_line_error(process, "photos.py: ", ".jpg", "No such file")
    assert (tmp_path / "out" / "checkpoint.npz").exists()  # from which the run can go on


@pytest.mark.slow
def test_it_learns_real_photos(real_data, tmp_path):
    """Three categories of Caltech-256, 60 steps: chance is 33%."""
    process = run(
        *("photos.py", "--data", real_data / "256_ObjectCategories_10.tar", "--out", tmp_path / "out"),
        *("--network", real_data / "efficientnet_lite0.keras", "--short-side", 160, "--steps", 60, "--samples", 3),
        *("--categories", "coffee-mug", "touring-bike", "laptop-101"),
    )
    assert process.returncode == 0, process.stderr
    assert float(rows(tmp_path / "out" / "history.csv")[-1]["test_accuracy"]) >= 0.9


@pytest.mark.slow
def test_alexnet_learns_real_photos(real_data, tmp_path):
    """The same categories, 30 steps of 16 photos."""
    process = run(
        *("photos.py", "--data", real_data / "256_ObjectCategories_10.tar", "--out", tmp_path / "out"),
        *("--network", "alexnet", "--weights", real_data / "alexnet_imagenet_conv.npz", "--categories", "coffee-mug"),
        *("touring-bike", "laptop-101", "--steps", 30, "--batch-size", 16, "--eval-every", 30, "--samples", 3),
    )
    assert process.returncode == 0, process.stderr
    assert float(rows(tmp_path / "out" / "history.csv")[-1]["test_accuracy"]) >= 0.8
