"""mnist.py, run as a user runs it."""

import importlib.util
import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, SMALL, assert_one_line_error, assert_same_run, call, contents, rows, run, write_data
from PIL import Image

import cam
import mnist
from data.dataset import load_dataset
from experiment import training
from experiment.training import batch_indices, shrink, warmup_cosine

FIVE_STEPS = ["--steps", 5, "--precision", "float32", *SMALL]


@pytest.fixture(scope="module")
def small_run(small_data):
    out = small_data / "out"
    process = run("mnist.py", "--data", small_data, "--out", out, *FIVE_STEPS)
    assert process.returncode == 0, process.stderr
    return out, process


def pixels(path):
    return np.asarray(Image.open(path))


def test_what_a_run_writes(small_run):
    out, process = small_run
    assert process.stderr == ""
    assert len(process.stdout.splitlines()) < 15
    for text in ("21 training images, 9 test images", "boxes.txt is missing", "on all 9 test images", "s in all"):
        assert text in process.stdout
    maps = {f"cmap_{step}.png" for step in (0, 2, 4, 5)}
    for sample in range(4):
        found = {path.name for path in (out / f"img_{sample}").iterdir()}
        assert found == {*maps, "classes.png", "evolution.png", "image_test.png", "procedure.png"}
    wanted = {"accuracy.png", "draw.html", "history.csv", "index.html", "lenet.keras", "overview.png", "patterns.png"}
    assert wanted | {"run.js", "units.png"} <= {path.name for path in out.iterdir()}
    assert {path.stem for path in out.glob("weights/*.npz")} == {"0", "2", "4", "5"}
    history = rows(out / "history.csv")
    assert [row["step"] for row in history] == ["0", "2", "4", "5"]
    assert [row["images"] for row in history] == ["0", "16", "32", "40"]
    assert history[0]["loss"] == ""
    assert float(history[-1]["loss"]) > 0


def test_the_map_is_that_of_the_true_class(small_run, small_data):
    """Images 0, 1 and 2 are equal; 0 and 2 have one label, 1 another."""
    out, _ = small_run
    first, other, same = (pixels(out / f"img_{sample}" / "cmap_5.png") for sample in range(3))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first.astype(int) - other).max() > 20
    # And it is what the saved model gives, in float32, with the accuracy of the history.
    _, test = load_dataset(small_data)
    model = keras.models.load_model(out / "lenet.keras")
    assert model.count_params() == 52_736
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    logits, maps = cam.class_activation_model(model).predict(test.images, verbose=0)
    accuracy = (logits.argmax(axis=1) == test.labels).mean()
    assert accuracy == pytest.approx(float(rows(out / "history.csv")[-1]["test_accuracy"]))
    heatmap = cam.normalize(cam.upsample(maps[:1, :, :, test.labels[0]], 40, 44))[0]
    assert first.shape == (360, 396, 3)
    difference = cam.overlay(test.images[0], heatmap).astype(int) - first[::9, ::9]
    assert np.abs(difference).max() <= 1
    picture = pixels(out / "img_0" / "image_test.png")
    assert picture.shape == (360, 396)
    np.testing.assert_array_equal(picture[::9, ::9], test.images[0, :, :, 0])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(small_run, small_data, tmp_path):
    arguments = ["--data", small_data, *FIVE_STEPS]
    assert call(mnist, *arguments, "--out", tmp_path / "same").returncode == 0
    assert call(mnist, *arguments, "--out", tmp_path / "other", "--seed", 1).returncode == 0
    assert_same_run(tmp_path / "same", small_run[0])
    for name in "history.csv", "img_0/cmap_0.png", "img_0/cmap_5.png":
        assert (tmp_path / "other" / name).read_bytes() != (small_run[0] / name).read_bytes(), name


def test_a_run_continues_bit_for_bit(small_run, small_data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(small_run[0], out)
    (out / "lenet.keras").unlink()
    (out / "checkpoint.previous.npz").replace(out / "checkpoint.npz")
    arguments = ["--data", small_data, "--out", out, *FIVE_STEPS]
    process = call(mnist, *arguments)
    assert "resuming after step 4" in process.stdout, process.stderr
    assert_same_run(out, small_run[0])
    assert_one_line_error(call(mnist, *arguments, "--steps", 6), "--steps 5, not 6", "--fresh")


@pytest.mark.slow
def test_a_console_that_cannot_show_the_name_of_the_folder(small_data, tmp_path):
    out = tmp_path / "\u6570\u5b57"
    arguments = ["--data", small_data, "--out", out, "--steps", 1, *SMALL]
    process = run("mnist.py", *arguments, PYTHONIOENCODING="cp1252")
    assert process.returncode == 0, process.stderr
    assert "open " in process.stdout
    assert "\\u6570\\u5b57" in process.stdout
    assert (out / "lenet.keras").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--precision", "mixed_bfloat16"), ("--recipe", "original")], ids=" ".join)
def test_other_precisions_and_optimizers_continue_bit_for_bit(options, small_data, tmp_path):
    arguments = ["--data", small_data, *FIVE_STEPS, *options]
    out, copy = tmp_path / "out", tmp_path / "copy"
    assert call(mnist, *arguments, "--out", out).returncode == 0
    shutil.copytree(out, copy)
    (copy / "lenet.keras").unlink()
    (copy / "checkpoint.previous.npz").replace(copy / "checkpoint.npz")
    process = call(mnist, *arguments, "--out", copy)
    assert "resuming after step 4" in process.stdout, process.stderr
    assert_same_run(copy, out)


def test_a_run_is_not_resumed_on_other_data_or_another_backend(tmp_path, monkeypatch):
    """Other images, labels or boxes, and more images; a folder that was moved holds the same data."""
    images, labels = np.random.default_rng(0).integers(0, 256, (31, 20, 24), dtype=np.uint8), np.arange(31) % 10
    boxes, out = np.array([[1, 2, 9, 9]] * 31), tmp_path / "out"
    names = iter(range(9))

    def start(images, labels, boxes, *flags):
        data = write_data(tmp_path / str(next(names)), images, labels, boxes)
        return call(mnist, "--data", data, "--out", out, "--epochs", 1, *SMALL, *flags)

    first = images[:30], labels[:30], boxes[:30]
    assert start(*first).returncode == 0
    before = contents(out)
    assert "already holds this finished run; --fresh" in start(*first).stdout
    for other in (
        (np.roll(images[:30], 1, axis=0), labels[:30], boxes[:30]),
        (images[:30], np.roll(labels[:30], 1), boxes[:30]),
        (images[:30], labels[:30], boxes[:30] + 1),
        (images, labels, boxes),
    ):
        assert_one_line_error(start(*other), f"has changed since {out} was begun", "--fresh")
    assert_one_line_error(start(*first, "--learning-rate", 0.5), "--learning-rate 0.03, not 0.5", "--fresh")
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    monkeypatch.setattr(mnist, "set_seed", lambda seed: None)
    assert_one_line_error(start(*first), "KERAS_BACKEND tensorflow, not torch")
    assert before == contents(out)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"recipe": "default", "steps": "5", "rotation": "10.0"}', "holds a run of another script or version"),
        ("{", "settings.json is damaged"),
    ],
)
def test_settings_of_another_version_or_damaged_ones_are_refused(small_data, tmp_path, content, part):
    (tmp_path / "settings.json").write_text(content)
    process = call(mnist, "--data", small_data, "--out", tmp_path, *FIVE_STEPS)
    assert_one_line_error(process, str(tmp_path), part, "--fresh")


@pytest.mark.slow
def test_what_a_notebook_or_service_has_in_its_environment(small_data, tmp_path):
    arguments = ["mnist.py", "--data", small_data, "--steps", 1, *SMALL, "--out"]
    process = run(*arguments, tmp_path / "a", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert process.returncode == 0, process.stderr
    (tmp_path / "keras.json").write_text('{"image_data_format": "channels_first", "backend": "tensorflow"}')
    process = run(*arguments, tmp_path / "b", KERAS_HOME=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    for name in "img_0/cmap_1.png", "history.csv":
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("script", ["mnist.py", "photos.py", "show.py"])
@pytest.mark.parametrize("backend", ["nonsense", "torch"])
def test_a_keras_backend_that_is_not_installed(script, backend):
    if importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is installed")
    assert_one_line_error(run(script, "--help", KERAS_BACKEND=backend), "KERAS_BACKEND", backend)


def test_fresh_starts_over(small_data, tmp_path):
    out = tmp_path / "out"
    arguments = ["--data", small_data, "--out", out, *SMALL]
    assert call(mnist, *arguments, "--steps", 2).returncode == 0
    (out / "notes.txt").write_text("mine")
    process = call(mnist, *arguments, "--steps", 1, "--recipe", "original", "--pooling", "max", "--fresh")
    assert process.returncode == 0, process.stderr
    assert [row["step"] for row in rows(out / "history.csv")] == ["0", "1"]
    assert not (out / "img_0" / "cmap_2.png").exists()
    assert json.loads((out / "settings.json").read_text())["recipe"] == "original"
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data", "nowhere"], ["nowhere/labels.txt is missing"]),
        (["--data", "BROKEN"], ["mnist_cluttered.tar.gz is not a complete .tar.gz"]),
        (
            ["--data", "data/mnist_cluttered.tar.gz"],
            ["mnist_cluttered.tar.gz/labels.txt is missing; --data takes a folder"],
        ),
        (["--rotation", "10"], ["unrecognized arguments: --rotation 10"]),
        (["--batch-size", "22"], ["--batch-size 22", "21 training images"]),
        (["--learning-rate", "nan"], ["--learning-rate", "nan"]),
        (["--seed", "4294967296"], ["--seed", "4294967296 is not in 0 to"]),
        (["--steps", "0"], ["--steps", "0 is not in 1 to"]),
        (["--epochs", "2", "--steps", "3"], ["--steps", "--epochs"]),
        (["--recipe", "original", "--beta-2", "0.9"], ["--beta-2 is not a setting of the original recipe"]),
        (["--precision", "float8"], ["--precision", "float8"]),
        (["--out", "requirements.txt"], ["--out requirements.txt cannot be written", "give another folder"]),
        (["--out", "/proc"], ["--out /proc cannot be written"]),
    ],
)
def test_bad_settings(small_data, tmp_path, arguments, parts):
    broken = write_data(tmp_path / "broken", [], range(10))
    (broken / "mnist_cluttered.tar.gz").write_bytes((small_data / "mnist_cluttered.tar.gz").read_bytes()[:1000])
    arguments = [broken if argument == "BROKEN" else argument for argument in arguments]
    process = call(mnist, "--data", small_data, "--out", tmp_path / "out", *SMALL, *arguments)
    assert_one_line_error(process, "mnist.py:", *parts)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("backend", "flags", "prefers"),
    [("tensorflow", "amx_bf16", True), ("tensorflow", "avx512_bf16", False), ("jax", "amx_bf16", False)],
)
def test_bfloat16_is_the_default_only_where_it_was_measured_to_be_faster(monkeypatch, backend, flags, prefers):
    monkeypatch.setattr(training.keras.backend, "backend", lambda: backend)
    monkeypatch.setattr(training.platform, "system", lambda: "Linux")
    monkeypatch.setattr(training.Path, "read_text", lambda path: f"GenuineIntel {flags}")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    assert training.prefers_bfloat16() == prefers


def batches(steps, batch_size, count, order, seed=0):
    return [batch_indices(step, batch_size, count, order, seed) for step in range(steps)]


@pytest.mark.parametrize("batch_size", [3, 7, 30])
def test_shuffled_images_come_once_an_epoch_in_another_order(batch_size):
    epochs = np.concatenate(batches(40, batch_size, 20, "shuffled"))[: 3 * 20].reshape(3, 20)
    np.testing.assert_array_equal(np.sort(epochs), [np.arange(20)] * 3)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = np.concatenate(batches(40, batch_size, 20, "shuffled", seed=1))
    assert (other[:20] != epochs[0]).any()


def test_the_originals_batches_come_in_file_order():
    assert np.concatenate(batches(4, 4, 10, "file")).tolist() == [*range(10), *range(6)]


def test_the_learning_rate_rises_and_falls():
    rates = [float(warmup_cosine(0.5, 100, 0.2)(step)) for step in range(101)]
    assert rates[0] == 0
    assert rates[10] == pytest.approx(0.25)
    assert rates[20] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.25)  # half of the cosine
    assert rates[100] == pytest.approx(0)


@pytest.mark.slow
def test_learning(tmp_path):
    """A few hundred steps on committed images at half their size: digits that it has never seen, and where they are."""
    parts = [part.first(count) for part, count in zip(load_dataset(ROOT / "data"), (4200, 1800), strict=True)]
    images, labels, boxes = (np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[:3])
    images = images.reshape(-1, 50, 2, 50, 2).mean(axis=(2, 4)).round().astype(np.uint8)
    boxes = np.concatenate([boxes[:, :2] // 2, -(-boxes[:, 2:] // 2)], axis=1)
    data = write_data(tmp_path / "data", images, labels, boxes)
    # So short a run wants a larger share of warm-up.
    short = ["--steps", 300, "--batch-size", 32, "--warmup", 0.3, "--eval-every", 300, "--samples", 10]
    process = run("mnist.py", "--data", data, "--out", tmp_path / "out", *short)
    assert process.returncode == 0, process.stderr
    # Chance is 10%, and the maximum of a map that knows nothing is in the digit's box, 5% of an image, that often.
    measured = rows(tmp_path / "out" / "history.csv")[-1]
    assert float(measured["test_accuracy"]) > 0.6
    assert float(measured["test_pointing"]) > 0.5


def test_small_images():
    y, x = np.mgrid[:100, :80]
    images = np.stack([2 * y, 3 * x], axis=-1)[None].astype(np.uint8)  # (1, 100, 80, 2)
    small = shrink(images)
    assert small.shape == (1, 72, 56, 2)
    for axis, scale in enumerate([2 * 100 / 72, 3 * 80 / 56]):
        differences = np.diff(small[..., axis], axis=axis + 1)
        np.testing.assert_allclose(differences, scale, rtol=1e-4)  # a ramp stays one, from edge to edge
        assert small[..., axis].mean() == pytest.approx(images[..., axis].mean(), abs=0.1)


@pytest.mark.parametrize(("recipe", "small"), [("default", [1, 2, 3]), ("original", [])])
def test_the_first_steps_see_small_images(recipe, small, small_data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(mnist, "shrink", lambda images: seen.append(images) or shrink(images))
    mnist.main(["--data", str(small_data), "--out", str(tmp_path), "--recipe", recipe, *map(str, FIVE_STEPS)])
    assert len(seen) == len(small)
    assert "loss" in (tmp_path / "history.csv").read_text()
