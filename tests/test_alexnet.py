"""alexnet.py against convolutions and pooling written out in NumPy, in PyTorch's layout."""

import keras
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from alexnet import CONVOLUTIONS, MEAN, STD, alexnet, set_convolutions, weight_shapes
from cam import class_activation_model
from experiment.files import UserError
from experiment.networks import load_torchvision_convolutions
from lenet import lenet


def convolution(x, weight, bias, stride, padding):
    """torch.nn.functional.conv2d and ReLU: (C, H, W), (O, C, h, w) -> (O, H', W')."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(x, weight.shape[2:], axis=(1, 2))[:, ::stride, ::stride]  # (C, H', W', h, w)
    return np.maximum(np.einsum("cyxhw,ochw->oyx", windows, weight, optimize=True) + bias[:, None, None], 0)


def max_pooling(x):
    """torch.nn.MaxPool2d(kernel_size=3, stride=2): (C, H, W) -> (C, H', W')."""
    return sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(3, 4))


def layers_by_hand(photo, weights):
    """torchvision's AlexNet to conv5, a layer at a time, of a photo (H, W, 3) in 0..255."""
    x = ((photo / 255 - MEAN) / STD).transpose(2, 0, 1)
    for name, stride, padding in (("conv1", 4, 2), ("conv2", 1, 2), ("conv3", 1, 1), ("conv4", 1, 1), ("conv5", 1, 1)):
        if name in ("conv2", "conv3"):
            x = max_pooling(x)
            yield f"pool{int(name[-1]) - 1}", x
        feature = CONVOLUTIONS[name][0]
        x = convolution(x, weights[f"{feature}.weight"], weights[f"{feature}.bias"], stride, padding)
        yield name, x


def random_weights():
    rng = np.random.default_rng(0)
    # The weights of ReLU layers of unit gain, and some bias.
    return {
        name: rng.normal(0, np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.5, shape).astype(np.float32)
        for name, shape in weight_shapes().items()
    }


@pytest.fixture(scope="module", params=["random", "ImageNet"])
def weights(request):
    if request.param == "random":
        return random_weights()
    return load_torchvision_convolutions(request.getfixturevalue("real_data") / "alexnet_imagenet_conv.npz")


@pytest.mark.parametrize("size", [(224, 224), (83, 130)])
def test_each_layer_is_that_of_torchvision(weights, size):
    photo = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    model = alexnet(10)
    set_convolutions(model, weights)
    expected = dict(layers_by_hand(photo, weights))
    layers = keras.Model(model.input, {name: model.get_layer(name).output for name in expected})
    for name, found in layers.predict(photo[None], verbose=0).items():
        wanted = expected[name].transpose(1, 2, 0)
        assert found[0].shape == wanted.shape
        np.testing.assert_allclose(found[0], wanted, atol=2e-4 * wanted.max(), err_msg=name)


def test_shapes_and_maps():
    model = alexnet(7)
    photos = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    scores, maps = class_activation_model(model).predict(photos, verbose=0)
    assert maps.shape == (2, 13, 13, 7)
    np.testing.assert_allclose(scores, maps.mean(axis=(1, 2)), rtol=1e-4, atol=1e-6)
    assert model.get_layer("feature_maps").kernel.shape == (3, 3, 256, 1024)
    assert not model.get_layer("softmax_weights").use_bias


@pytest.mark.parametrize("build", [lambda: alexnet(3), lambda: lenet(location_dropout=0.3)], ids=["alexnet", "lenet"])
def test_whole_locations_are_hidden_in_training(build):
    layer, ones = build().get_layer("location_dropout"), np.ones((2, 9, 12, 4), np.float32)
    found = np.asarray(layer(ones, training=True))
    np.testing.assert_array_equal(found, found[..., :1].repeat(4, axis=-1))  # all units of a location, or none
    assert 0.15 < (found == 0).mean() < 0.45  # 30%, within five standard deviations
    np.testing.assert_array_equal(layer(ones, training=False), ones)


def test_weights_file(tmp_path):
    path, weights = tmp_path / "alexnet.npz", random_weights()
    np.savez(path, **weights, **{"classifier.1.weight": np.zeros(3)})
    for name, values in load_torchvision_convolutions(path).items():
        np.testing.assert_array_equal(values, weights[name])


TRANSPOSED = np.zeros((3, 3, 192, 384), np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"features.3.bias": None}, "cannot be read .*features.3.bias is not a file"),
        ({"features.6.weight": TRANSPOSED}, r"features.6.weight must be an array \(384, 192, 3, 3\)"),
        ({"features.0.bias": np.zeros(64, int)}, "features.0.bias must be .* floating-point"),
        ({"features.0.bias": np.array([{}] * 64)}, "cannot be read .*pickle"),
        ({"features.8.bias": np.full(256, np.nan)}, "features.8.bias must be .* finite"),
        (b"not a zip", "cannot be read"),
        (None, "is missing"),
    ],
)
def test_weights_that_do_not_fit(content, message, tmp_path):
    path = tmp_path / "alexnet.npz"
    if isinstance(content, dict):
        weights = random_weights() | content
        np.savez(path, **{name: values for name, values in weights.items() if values is not None})
    elif content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"alexnet\.npz.* {message}"):
        load_torchvision_convolutions(path)
