"""Networks that Keras 2 saved, by `keras2/make.py`, give what they gave; what cannot be translated is refused."""

import shutil
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from experiment import networks
from experiment.exact_maps import exact_cam_model
from experiment.files import UserError
from experiment.networks import load_network

FOLDER = Path(__file__).parent / "keras2"


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("transfer.keras", "net.keras"),
        ("transfer.h5", "net.h5"),
        ("sequential.keras", "net.KERAS"),
        ("sequential.h5", "net.keras"),  # as Keras 2.12 did
    ],
)
def test_the_outputs_are_equal(name, copy, tmp_path):
    path = shutil.copy(FOLDER / name, tmp_path / copy)
    with np.load((FOLDER / name).with_suffix(".npz")) as file:
        images, output = file["images"], file["output"]
    model = load_network(path)
    np.testing.assert_allclose(model(images, training=False), output, rtol=1e-4, atol=1e-5)
    exact_cam_model(model)
    model.save(tmp_path / "new.keras")
    np.testing.assert_allclose(load_network(tmp_path / "new.keras")(images), output, rtol=1e-4, atol=1e-5)


def edit(old, new, path):
    """A copy of a network with `old` replaced by `new` in its configuration."""
    shutil.copy(FOLDER / "transfer.h5", path)
    with h5py.File(path, "r+") as file:
        config = file.attrs["model_config"]
        assert old in config
        file.attrs["model_config"] = config.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("math.truediv", "math.pow", " (tf.math.pow is not a part of Keras 3)"),
        ('"y": 127.5', '"y": ["input_2", 0, 0]', " (tf.math.truediv is not a part of Keras 3)"),
        ('"class_name": "Add"', '"class_name": "Lambda"', " (code in a Lambda layer is not run)"),
        ('"class_name": "Add"', '"class_name": "Own"', " (Own is not a part of Keras 3)"),
        ('"RandomRotation"', '"RandomCrop"', " (RandomCrop is computed differently in Keras 3)"),
        ('"activation": "linear"', '"activation": "hard_sigmoid"', " (hard_sigmoid is computed differently in "),
        ('"groups": 1', '"groups": 2', " (SeparableConv2D has no groups in Keras 3)"),
        ('"epsilon": 0.001', '"epsilon": 0.001, "fused": true', " (BatchNormalization has no fused in Keras 3)"),
        ('"units": 3', '"units": 4', " (its weights are not stored as Keras 3 reads them)"),
        ('"inbound_nodes"', '"nodes"', ""),
    ],
)
def test_what_cannot_be_translated_is_refused(old, new, reason, tmp_path):
    path = tmp_path / "net.h5"
    edit(old, new, path)
    with pytest.raises(UserError) as error:
        load_network(path)
    message = str(error.value)
    assert message.startswith(f"{path} was saved by Keras 2.15.0, and Keras 3 cannot load it{reason}")
    assert message.endswith("; build the network with Keras 3, load the weights, and save it as .keras")


def test_an_argument_that_makes_no_difference_is_dropped(tmp_path):
    edit('"epsilon": 0.001', '"epsilon": 0.001, "fused": null', tmp_path / "net.h5")
    load_network(tmp_path / "net.h5")


def test_a_network_of_keras_3_is_left_to_keras_3(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "load_keras2", None)
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.GlobalAveragePooling2D(), layers.Dense(2)])
    for path in tmp_path / "net.keras", tmp_path / "net.h5":
        model.save(path)
        assert load_network(path).output_shape == (None, 2)
