"""lenet.py: the network, layer by layer, and its two initializations."""

import keras
import numpy as np
import pytest

from experiment.training import keep_zero_mean_over_classes
from lenet import RECEPTIVE_FIELD, lenet, scale_to_unit_logits


def naive_lenet(images, conv1, bias1, conv2, bias2, weights):
    """The network in NumPy and float64, ReLU before pooling: images (N, H, W, C) in 0..255, H and W multiples of 4."""

    def convolution(x, kernel, bias):
        padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))  # (N, H, W, C, 5, 5)
        return np.einsum("nhwcyx,yxck->nhwk", windows, kernel) + bias

    def pool(x):
        n, h, w, k = x.shape
        return x.reshape(n, h // 2, 2, w // 2, 2, k).max(axis=(2, 4))

    x = images.astype(np.float64) / 255
    x = pool(np.maximum(convolution(x, conv1, bias1), 0))
    feature_maps = pool(np.maximum(convolution(x, conv2, bias2), 0))
    return feature_maps, feature_maps.mean(axis=(1, 2)) @ weights


@pytest.mark.parametrize(
    ("channels", "precision", "tolerance"),
    [(1, "float32", 1e-5), (3, "float32", 1e-5), (1, "mixed_bfloat16", 0.01)],
)
def test_the_network_equals_the_naive_one(channels, precision, tolerance):
    """With float32 logits, whatever the precision."""
    keras.utils.set_random_seed(0)
    model = lenet(channels, precision=precision)
    assert precision.endswith(model.get_layer("conv2").compute_dtype)
    rng = np.random.default_rng(0)
    # Biases are zero at the start: give them a part in the test.
    model.set_weights([value + rng.normal(0, 0.05, value.shape) for value in model.get_weights()])
    images = rng.integers(0, 256, (2, 12, 16, channels), dtype=np.uint8)
    feature_maps, logits = naive_lenet(images, *model.get_weights())
    both = keras.Model(model.input, [model.get_layer("feature_maps").output, model.output])
    found_maps, found_logits = both(images)
    assert keras.backend.standardize_dtype(found_logits.dtype) == "float32"
    np.testing.assert_allclose(found_logits, logits, rtol=1e-4, atol=tolerance)
    np.testing.assert_allclose(keras.ops.cast(found_maps, "float32"), feature_maps, rtol=1e-4, atol=tolerance)


def test_the_originals_initialization():
    keras.utils.set_random_seed(0)
    conv1, bias1, conv2, bias2, weights = lenet().get_weights()
    # Xavier uniform: within sqrt(6 / (inputs + outputs)), and filling that range.
    for kernel, inputs, outputs in (conv1, 25, 25 * 32), (conv2, 25 * 32, 25 * 64):
        bound = (6 / (inputs + outputs)) ** 0.5
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert weights.std() == pytest.approx(0.01, rel=0.1)
    assert not bias1.any() | bias2.any()


@pytest.mark.parametrize("seed", range(3))
def test_logits_of_unit_variance(seed):
    keras.utils.set_random_seed(seed)
    model = lenet()
    before = model.get_weights()
    images = np.random.default_rng(seed).integers(0, 256, (16, 40, 40, 1), dtype=np.uint8)
    scale_to_unit_logits(model, images)
    assert np.std(np.asarray(model(images))) == pytest.approx(1, rel=1e-3)
    deviations = [value.std() for value in model.get_weights() if value.ndim > 1]
    np.testing.assert_allclose(deviations, deviations[0], rtol=1e-4)
    # Only the scale of each kernel has changed.
    for value, old in zip(model.get_weights(), before, strict=True):
        if old.any():
            np.testing.assert_allclose(value / value.std(), old / old.std(), rtol=1e-4)
        else:
            assert not value.any()


def test_centred_weights_predict_the_same_and_stay_centred():
    keras.utils.set_random_seed(0)
    free, centred = lenet(), lenet()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (32, 20, 20, 1), dtype=np.uint8), rng.integers(0, 10, 32)
    scale_to_unit_logits(free, images)
    centred.set_weights(free.get_weights())
    keep_zero_mean_over_classes(centred.get_layer("softmax_weights"))
    probabilities = [np.asarray(keras.ops.softmax(model(images))) for model in (free, centred)]
    np.testing.assert_allclose(*probabilities, rtol=1e-5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for model, is_centred in ((free, False), (centred, True)):
        means = [model.get_weights()[-1].mean(axis=1)]
        model.compile(keras.optimizers.Adam(0.01), loss, run_eagerly=True)
        for _ in range(5):
            model.train_on_batch(images, labels)
        means.append(model.get_weights()[-1].mean(axis=1))
        assert is_centred or np.abs(means[1] - means[0]).max() > 1e-3  # the drift of Adam
        assert (np.abs(means).max() < 1e-6) == is_centred


@pytest.mark.parametrize("size", [(100, 100), (41, 30)])
def test_a_location_depends_on_its_receptive_field_and_on_nothing_else(size):
    """Found by changing each row and each column of an image."""
    keras.utils.set_random_seed(0)
    model = lenet()
    for layer in ("conv1", "conv2"):  # positive, so that nothing hides behind a ReLU
        model.get_layer(layer).kernel.assign(np.abs(model.get_layer(layer).kernel) + 1e-3)
    feature_maps = keras.Model(model.input, model.get_layer("feature_maps").output)
    image = np.random.default_rng(0).uniform(200, 201, (*size, 1)).astype(np.float32)
    start, stride, length = (RECEPTIVE_FIELD[name] for name in ("start", "stride", "length"))
    for axis in (0, 1):
        changed = np.stack([image] * (size[axis] + 1))  # the last stays as it is
        for pixel in range(size[axis]):
            changed[pixel].swapaxes(0, axis)[pixel] += 50
        *found, plain = np.asarray(feature_maps(changed)).sum(axis=-1)
        depends = (np.array(found) != plain).any(axis=2 - axis)  # (pixels, locations)
        for location in range(depends.shape[1]):
            first, last = start + stride * location, start + stride * location + length
            expected = np.arange(max(first, 0), min(last, size[axis]))
            np.testing.assert_array_equal(np.flatnonzero(depends[:, location]), expected)
