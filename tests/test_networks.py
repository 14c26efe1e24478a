"""networks.py: saved models, the original's checkpoints, and the networks of Keras, without their weights."""

import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import assert_one_line_error, run, write_data
from keras import layers

from cam import class_activation_model
from experiment.files import UserError
from experiment.networks import keras_application, load_network, to_cam_model
from lenet import lenet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as the original wrote them, and its weights."""
    tf = pytest.importorskip("tensorflow").compat.v1
    rng = np.random.default_rng(0)
    shapes = {
        "LeNet/conv1/weights": (5, 5, 3, 32),
        "LeNet/conv1/biases": (32,),
        "LeNet/conv2/weights": (5, 5, 32, 64),
        "LeNet/conv2/biases": (64,),
        "LeNet/GAP/W": (64, 10),
    }
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    path = str(tmp_path_factory.mktemp("original") / "model.ckpt-100")
    with tf.Graph().as_default(), tf.Session() as session:
        for name, value in weights.items():
            tf.get_variable(name, initializer=value)
        session.run(tf.global_variables_initializer())
        path = tf.train.Saver(write_version=tf.train.SaverDef.V1).save(session, path, write_meta_graph=False)
    return path, weights


def test_the_originals_checkpoint_is_its_network_on_one_channel(checkpoint):
    path, weights = checkpoint
    model = load_network(path)
    images = np.random.default_rng(1).integers(0, 256, (3, 20, 24, 1), dtype=np.uint8)
    rgb = lenet(channels=3)
    rgb.set_weights(list(weights.values()))
    np.testing.assert_allclose(model(images), rgb(images.repeat(3, axis=3)), rtol=1e-4)


def test_evaluate_takes_a_checkpoint_and_a_saved_model(checkpoint, tmp_path, random_images):
    path, _ = checkpoint
    data = write_data(tmp_path / "data", random_images, range(10), boxes=[(2, 3, 12, 11)] * 10)
    load_network(path).save(tmp_path / "model.keras")
    outputs = [run("mnist.py", "--data", data, "--evaluate", file) for file in (path, tmp_path / "model.keras")]
    for process in outputs:
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""
        assert "on all 3 test images" in process.stdout
        assert "GT-known localization" in process.stdout
    assert outputs[0].stdout == outputs[1].stdout
    assert not (tmp_path / "out").exists()


def test_evaluate_takes_a_network_with_max_pooling(tmp_path, random_images):
    data = write_data(tmp_path / "data", random_images, range(10), boxes=[(2, 3, 12, 11)] * 10)
    lenet(pooling="max").save(tmp_path / "model.keras")
    process = run("mnist.py", "--data", data, "--evaluate", tmp_path / "model.keras", "--pooling", "max")
    assert process.returncode == 0, process.stderr
    assert "MaxBoxAcc" in process.stdout


@pytest.mark.parametrize("name", ["missing", "missing.keras", "text", "text.keras", "zip.keras"])
def test_what_is_no_network_is_named(tmp_path, name):
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("nothing")
    elif name.startswith("zip"):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("config.json", "{}")
    with pytest.raises(UserError, match=f"{name} is ") as error:
        load_network(path)
    assert "\n" not in str(error.value)


def test_no_code_of_a_saved_model_is_run(tmp_path):
    images = keras.Input((8, 8, 1))
    maps = layers.Lambda(lambda x: x * 1.0)(images)
    model = keras.Model(images, layers.Dense(2)(layers.GlobalAveragePooling2D()(maps)))
    model.save(tmp_path / "model.keras")
    with pytest.raises(UserError, match="disallowed"):
        load_network(tmp_path / "model.keras")


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


def test_evaluate_wants_a_network_of_ten_digits(tmp_path, random_images):
    data = write_data(tmp_path / "data", random_images, range(10))
    lenet(classes=7).save(tmp_path / "seven.keras")
    process = run("mnist.py", "--data", data, "--evaluate", tmp_path / "seven.keras")
    assert_one_line_error(process, "seven.keras", "10 classes")
    assert_one_line_error(run("mnist.py", "--data", data, "--evaluate", tmp_path / "none"), "none is missing")


@pytest.mark.parametrize(
    "name",
    [
        "ResNet50",
        "ResNet50V2",
        "MobileNetV2",
        "DenseNet121",
        "Xception",
        "InceptionV3",
        "EfficientNetB0",
        "NASNetMobile",
    ],
)
def test_score_is_the_mean_of_the_map_plus_the_bias(name):
    """The identity of section 2 on the real graphs, with random weights."""
    keras.utils.set_random_seed(0)
    model, preprocess, _ = keras_application(name, weights=None)
    height, width = model.input_shape[1:3]
    images = preprocess(np.random.default_rng(0).uniform(0, 255, (1, height, width, 3)).astype(np.float32))
    bias = np.linspace(-1, 1, 1000, dtype=np.float32)
    model.layers[-1].bias.assign(bias)
    cam = class_activation_model(model)
    scores, maps = (np.asarray(output) for output in cam(images))
    np.testing.assert_allclose(scores, maps.mean(axis=(1, 2)) + bias, atol=1e-4)
    # And the scores are the model's own: its probabilities are their softmax.
    np.testing.assert_allclose(keras.ops.softmax(scores), model(images), atol=1e-5)


@pytest.mark.parametrize("name", ["VGG16", "ConvNeXtTiny", "MobileNetV3Small"])
def test_networks_without_an_exact_map_are_refused(name):
    model, _, _ = keras_application(name, weights=None)
    with pytest.raises(UserError, match="it must be convolutions -> GlobalAveragePooling2D"):
        to_cam_model(model)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"ResNet51 is neither .* ResNet50"):
        keras_application("ResNet51")
