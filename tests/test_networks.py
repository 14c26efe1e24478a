"""networks.py: saved models, the original's checkpoints, and the networks of Keras, without their weights."""

import sys
from pathlib import Path
from unittest.mock import Mock

import keras
import numpy as np
import pytest
from conftest import assert_one_line_error, call, write_data
from keras import layers

import mnist
from experiment.exact_maps import exact_cam_model
from experiment.files import UserError
from experiment.networks import keras_application, load_network, load_preprocessing
from lenet import lenet

# What refuses the others: the layer that is not affine, or takes the place of pooling.
REFUSED = {"ConvNeXt": "head_layernorm", "MobileNetV3": "activation", "VGG": "flatten"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as the original wrote them, and its network."""
    tf = pytest.importorskip("tensorflow")
    rgb, rng = lenet(channels=3), np.random.default_rng(0)
    rgb.set_weights([rng.normal(size=weights.shape) for weights in rgb.get_weights()])
    names = ("conv1/weights", "conv1/biases", "conv2/weights", "conv2/biases", "GAP/W")
    path = str(tmp_path_factory.mktemp("original") / "model.ckpt-100")
    # In TensorFlow's V1 format.
    tf.raw_ops.Save(filename=path, tensor_names=[f"LeNet/{name}" for name in names], data=rgb.get_weights())
    return path, rgb


def test_the_originals_checkpoint_is_its_network_on_one_channel(checkpoint):
    path, rgb = checkpoint
    model = load_network(path)
    images = np.random.default_rng(1).integers(0, 256, (3, 20, 24, 1), dtype=np.uint8)
    np.testing.assert_allclose(model(images), rgb(images.repeat(3, axis=3)), rtol=1e-4)
    assert load_preprocessing(path).digit


@pytest.fixture
def evaluate(tmp_path, random_images):
    """Runs mnist.py --evaluate on ten small images; a model is saved first."""
    data = write_data(tmp_path / "data", random_images, range(10), boxes=[(2, 3, 12, 11)] * 10)

    def run(model, name="model.keras"):
        path = model
        if isinstance(model, keras.Model):
            path = tmp_path / name
            model.save(path)
        return call(mnist, "--data", data, "--evaluate", path, "--out", tmp_path / "out")

    return run


def test_evaluate_takes_a_checkpoint_and_a_saved_model(checkpoint, evaluate, tmp_path):
    path, _ = checkpoint
    outputs = [evaluate(path), evaluate(load_network(path)), evaluate(lenet(pooling="max"))]
    for process in outputs:
        assert (process.returncode, process.stderr) == (0, "")
        assert "on all 3 test images" in process.stdout
        assert "GT-known localization" in process.stdout
        assert "MaxBoxAcc" in process.stdout
    assert outputs[0].stdout == outputs[1].stdout
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["confusion.png"]


@pytest.mark.parametrize("name", ["missing", "missing.keras", "text", "text.keras", "text.KERAS"])
def test_missing_or_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("nothing")
    with pytest.raises(UserError, match=f"{name} is ") as error:
        load_network(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["keras", "h5", "hdf5", "KERAS", "H5"])
def test_files_of_keras(tmp_path, suffix):
    model = lenet()
    lower = tmp_path / f"lower.{suffix.lower()}"
    model.save(lower)
    lower.rename(tmp_path / f"model.{suffix}")
    loaded = load_network(tmp_path / f"model.{suffix}")
    np.testing.assert_equal(loaded.get_weights(), model.get_weights())


class OwnLayer(layers.Layer):
    def call(self, inputs):
        return 2 * inputs


@pytest.mark.parametrize(
    ("name", "save", "text"),
    [
        ("mine.weights.h5", "save_weights", "holds weights without their network"),
        ("mine.h5", "save_weights", "holds weights without their network"),
        ("mine.keras", "save", "needs OwnLayer, which is not a part of Keras"),
        ("mine.h5", "save", "needs OwnLayer, which is not a part of Keras"),
        ("mine", "export", "is a TensorFlow SavedModel"),
        ("lambda.keras", "save", "has a Lambda layer, and code in a file is not run"),
        ("lambda.h5", "save", "has a Lambda layer, and code in a file is not run"),
    ],
)
def test_unloadable_file_is_named(tmp_path, name, save, text):
    layer = layers.Lambda(lambda x: x * 1.0) if name.startswith("lambda") else OwnLayer()
    images = keras.Input((8, 8, 1))
    model = keras.Model(images, layers.Dense(2)(layers.GlobalAveragePooling2D()(layer(images))))
    written = tmp_path / ("model.weights.h5" if save == "save_weights" else name)
    getattr(model, save)(written, **({"verbose": False} if save == "export" else {}))
    written.rename(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} {text}") as error:
        load_network(tmp_path / name)
    assert "\n" not in str(error.value)


def test_damaged_preprocessing_file_is_named(tmp_path):
    wrong_values = '{"pixel_range": [1, 0]}', '{"pixel_range": 1}', '{"short_side": 0}', '{"digit": "false"}'
    for text in ("{", "[]", '{"digits": true}', *wrong_values):
        (tmp_path / "mine_images.json").write_text(text)
        with pytest.raises(UserError, match=r"mine_images\.json must be like"):
            load_preprocessing(tmp_path / "mine.keras")


@pytest.mark.parametrize("name", ["model.npz", "model.keras", "model"])
def test_no_pickle_is_loaded(tmp_path, name):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "code was run",)

    np.savez(tmp_path / "payload.npz", **{"conv1/weights": np.array([Payload()], dtype=object)})
    (tmp_path / "payload.npz").rename(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is "):
        load_network(tmp_path / name)
    assert not (tmp_path / "code was run").exists()


def pooled(*shape):
    parts = [keras.Input(shape)] if shape else []
    return keras.Sequential([*parts, layers.GlobalAveragePooling2D(), layers.Dense(10, use_bias=False)])


@pytest.mark.filterwarnings("ignore:You are saving a model that has not yet been built")
def test_evaluate_wants_a_network_of_ten_digits(evaluate, tmp_path):
    assert evaluate(pooled(20, 30, 1)).returncode == 0
    (tmp_path / "ranged_images.json").write_text('{"pixel_range": [0, 1]}')
    wanted = "images of 30 x 20 pixels and 1 channel(s), and have 10 classes"
    for name, model, text in (
        ("seven.keras", lenet(classes=7), f"seven.keras must take {wanted.replace('30', '32')}"),  # they are padded
        ("fixed.keras", pooled(28, 28, 1), f"fixed.keras must take {wanted}"),
        ("unbuilt.keras", pooled(), "must be functional or Sequential, and built"),
        ("ranged.keras", lenet(), 'ranged_images.json is not {"pixel_range": [0, 255]}, which'),
    ):
        assert_one_line_error(evaluate(model, name), text)
    assert_one_line_error(evaluate(tmp_path / "none"), "none is missing")


def test_a_network_of_keras_applications(application):
    """Nine of them, or all with --all-networks, with random weights: their logits, and the identity of section 2."""
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, application)(weights=None, classifier_activation=None)
    for family, layer in REFUSED.items():
        if application.startswith(family):
            with pytest.raises(UserError, match=f"has no exact class activation map: layer '[a-z_]*{layer}"):
                exact_cam_model(model)
            return
    height, width = model.input_shape[1:3]
    images = np.random.default_rng(0).uniform(0, 255, (1, height, width, 3)).astype(np.float32)
    last = next(layer for layer in reversed(model.layers) if layer.weights)
    last.bias.assign(np.random.default_rng(1).normal(0, min(1, np.std(model(images))), last.bias.shape))
    expected, cam_model = np.asarray(model(images)), exact_cam_model(model)
    scores, maps = (np.asarray(output) for output in cam_model(images))
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores, maps.mean(axis=(1, 2)) + np.asarray(last.bias), rtol=0, atol=tolerance)


def test_a_network_without_exact_maps_is_refused_before_its_weights_are_downloaded(monkeypatch):
    monkeypatch.setattr(keras.utils, "get_file", pytest.fail)
    with pytest.raises(UserError, match=r"MobileNetV3Small.*activation"):
        keras_application("MobileNetV3Small")


def test_without_network(monkeypatch, capsys):
    """First the weights cannot be downloaded, then only the class names; the network is made without any before."""
    model, error = pooled(8, 8, 3), Exception("URL fetch failure on https://...: None\n[Errno -3]")  # as Keras does
    make = Mock(side_effect=[model, error, model, model], __module__="keras.applications.resnet50")
    monkeypatch.setattr(keras.applications, "ResNet50", make)
    monkeypatch.setattr(sys.modules[make.__module__], "decode_predictions", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"the weights of ResNet50 cannot be loaded .*fetch failure") as refused:
        keras_application("ResNet50")
    assert "\n" not in str(refused.value)
    assert keras_application("ResNet50")[2] is None  # the class names
    says = "the class names cannot be loaded, so numbers are shown: URL fetch failure on https://...: None [Errno -3]\n"
    assert capsys.readouterr().err == says
