"""cam.py against naive computations, the paper's identity, and hand-made maps whose answer is known."""

import keras
import numpy as np
import pytest
from keras import layers
from skimage import transform

import cam
from experiment.metrics import predict_class_maps
from lenet import lenet


def random_features(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def naive_class_activation_map(feature_maps, softmax_weights):
    """Equation (2) as a loop, in float64."""
    images, height, width, units = feature_maps.shape
    classes = softmax_weights.shape[1]
    maps = np.zeros((images, height, width, classes))
    for n, y, x, c in np.ndindex(maps.shape):
        for k in range(units):
            maps[n, y, x, c] += float(softmax_weights[k, c]) * float(feature_maps[n, y, x, k])
    return maps


def test_all_classes_equal_the_loop():
    feature_maps, weights = random_features((2, 3, 4, 5)), random_features((5, 6), 1)
    maps = np.asarray(cam.class_activation_map(feature_maps, weights))
    np.testing.assert_allclose(maps, naive_class_activation_map(feature_maps, weights), rtol=1e-5, atol=1e-6)


def network(channels, units, classes, bias, activation=None, dropout=False):
    images = keras.Input((None, None, channels))
    x = layers.Conv2D(units, 3, strides=2, padding="same", activation="relu")(images)
    x = layers.GlobalAveragePooling2D()(x)
    if dropout:
        x = layers.Dropout(0.5)(x)
    dense = layers.Dense(classes, use_bias=bias, activation=activation, bias_initializer="random_normal")
    return keras.Model(images, dense(x))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("bias", "dropout"), [(False, False), (True, False), (True, True)])
def test_score_is_the_mean_of_the_map(seed, bias, dropout):
    """S_c = mean over the locations of M_c, plus the bias; S_c as the network itself computes it."""
    keras.utils.set_random_seed(seed)
    model = network(channels=3, units=16, classes=7, bias=bias, dropout=dropout)
    images = np.random.default_rng(seed).uniform(0, 1, (4, 19, 30, 3)).astype("float32")
    scores, maps = cam.class_activation_model(model).predict(images, verbose=0)
    assert maps.shape == (4, 10, 15, 7)
    offset = np.asarray(model.layers[-1].bias) if bias else 0
    expected = np.asarray(model(images))
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(maps.mean(axis=(1, 2)) + offset, expected, rtol=1e-5, atol=tolerance)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=tolerance)


def test_score_is_the_logit_where_the_network_ends_in_a_softmax():
    model = network(channels=1, units=8, classes=5, bias=True, activation="softmax")
    images = np.random.default_rng(0).uniform(0, 1, (2, 8, 8, 1)).astype("float32")
    scores, _ = cam.class_activation_model(model).predict(images, verbose=0)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        exponentials / exponentials.sum(axis=1, keepdims=True), np.asarray(model(images)), rtol=1e-5
    )


def test_with_max_pooling_the_scores_are_the_networks_own_and_the_maps_follow_equation_2():
    model = lenet(pooling="max")
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 1), dtype=np.uint8)
    scores, maps = cam.class_activation_model(model).predict(images, verbose=0)
    np.testing.assert_allclose(scores, np.asarray(model(images)), rtol=1e-5)
    features = keras.Model(model.input, model.get_layer("feature_maps").output)(images)
    expected = cam.class_activation_map(features, model.get_layer("softmax_weights").kernel)
    np.testing.assert_allclose(maps, np.asarray(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [(100, 100), (101, 99), (30, 50), (5, 3)])
def test_lenet_of_any_size(size):
    keras.utils.set_random_seed(0)
    model = lenet()
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 1), dtype=np.uint8)
    scores, maps = cam.class_activation_model(model).predict(images, verbose=0)
    assert maps.shape == (2, -(-size[0] // 4), -(-size[1] // 4), 10)
    expected = np.asarray(model(images))
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    first, second = maps[0, :, :, 0], maps[0, :, :, 1]
    assert np.abs(first - second).max() > 1e-3 * np.abs(maps).max(), "two classes have the same map"


def test_dropout_after_the_dense_layer():
    images = keras.Input((8, 8, 1))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(2, 3)(images))
    model = keras.Model(images, layers.Dropout(0.5)(layers.Dense(3)(x)))
    photos = np.random.default_rng(0).uniform(0, 1, (2, 8, 8, 1)).astype("float32")
    scores, maps = cam.class_activation_model(model).predict(photos, verbose=0)
    np.testing.assert_allclose(scores, np.asarray(model(photos)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores, maps.mean(axis=(1, 2)), rtol=1e-4, atol=1e-6)


def test_the_maps_follow_the_training_of_the_model():
    model = network(channels=1, units=4, classes=3, bias=False)
    maps_of = cam.class_activation_model(model)
    images = np.ones((1, 6, 6, 1), "float32")
    _, before = maps_of.predict(images, verbose=0)
    model.layers[-1].kernel.assign(2 * model.layers[-1].kernel)
    _, after = maps_of.predict(images, verbose=0)
    np.testing.assert_allclose(after, 2 * before, rtol=1e-6)


def test_the_maps_of_one_class_per_image():
    keras.utils.set_random_seed(0)
    cam_model = cam.class_activation_model(network(channels=1, units=4, classes=5, bias=True))
    images = np.random.default_rng(0).uniform(0, 1, (5, 9, 8, 1)).astype("float32")
    expected_scores, expected = cam_model.predict(images, verbose=0)
    scores, maps = predict_class_maps(cam_model, images, [4, 0, 3, 3, 1], batch_size=2)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    for index, c in enumerate([4, 0, 3, 3, 1]):
        np.testing.assert_allclose(maps[index], expected[index, :, :, c], rtol=1e-5, atol=1e-7)


def test_zero_mean_over_classes_changes_no_probability():
    weights, features = random_features((6, 5)), random_features((3, 6), 1)
    centred = np.asarray(cam.zero_mean_over_classes(weights))
    np.testing.assert_allclose(centred.sum(axis=1), 0, atol=1e-6)
    probabilities = [np.asarray(keras.ops.softmax(features @ w)) for w in (weights, centred)]
    np.testing.assert_allclose(*probabilities, rtol=1e-5)


def test_upsampling_is_bilinear_with_half_pixel_centres():
    maps = random_features((2, 3, 5))
    upsampled = np.asarray(cam.upsample(maps, 12, 14))
    for n, y, x in np.ndindex(upsampled.shape):
        v, u = (y + 0.5) * 3 / 12 - 0.5, (x + 0.5) * 5 / 14 - 0.5
        v, u = np.clip(v, 0, 2), np.clip(u, 0, 4)
        v0, u0 = min(int(v), 1), min(int(u), 3)
        top = maps[n, v0, u0] * (u0 + 1 - u) + maps[n, v0, u0 + 1] * (u - u0)
        bottom = maps[n, v0 + 1, u0] * (u0 + 1 - u) + maps[n, v0 + 1, u0 + 1] * (u - u0)
        assert upsampled[n, y, x] == pytest.approx(top * (v0 + 1 - v) + bottom * (v - v0), abs=1e-5)


def test_upsampling_equals_that_of_scikit_image():
    maps = random_features((2, 7, 7, 3))
    expected = [transform.resize(one, (100, 90), order=1, mode="edge", anti_aliasing=False) for one in maps]
    np.testing.assert_allclose(np.asarray(cam.upsample(maps, 100, 90)), expected, atol=1e-5)


def test_normalize():
    maps = np.array([[[1, 3], [5, 2]], [[-4, -4], [-4, -4]], [[-2, -1], [-3, -5]]], "float32")
    expected = [[[0, 0.5], [1, 0.25]], [[0, 0], [0, 0]], [[0.75, 1], [0.5, 0]]]
    np.testing.assert_allclose(cam.normalize(maps), expected)
    largest = np.finfo("float32").max
    np.testing.assert_array_equal(cam.normalize(np.array([[-largest, largest]], "float32")), [[0, 1]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_maps_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        cam.normalize(np.array([[1, value]]))
    with pytest.raises(ValueError, match="not finite"):
        cam.bounding_box(np.array([[1, value]]))


def test_overlay_blends_the_inverted_image_with_the_colormap():
    image = np.array([[0, 255, 100]], np.uint8)
    heatmap = np.array([[0, 1, 0.5]])
    # jet begins in half blue and ends in half red; (0, 0, 127.5) is what matplotlib documents for its ends
    picture = cam.overlay(image, heatmap)
    np.testing.assert_array_equal(picture[0, :2], [[128, 128, 191], [64, 0, 0]])
    np.testing.assert_array_equal(cam.overlay(image, heatmap, opacity=0)[0], [[255] * 3, [0] * 3, [155] * 3])
    np.testing.assert_array_equal(cam.overlay(image, heatmap, "gray", opacity=1)[0], [[0] * 3, [255] * 3, [128] * 3])
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(cam.overlay(image[..., None], heatmap), picture)
    np.testing.assert_array_equal(cam.overlay(np.stack([image] * 3, axis=-1), heatmap, invert=True), picture)
    # An image in colour is not inverted unless that is asked for.
    np.testing.assert_array_equal(
        cam.overlay(np.stack([image] * 3, axis=-1), heatmap, opacity=0)[0], [[0] * 3, [255] * 3, [100] * 3]
    )


def test_bounding_box_of_a_known_blob():
    class_map = np.zeros((20, 30))
    class_map[5:9, 10:17] = 1  # the largest component
    class_map[12:14, 3:5] = 4  # the strongest, smaller
    class_map[0, 29] = 0.1
    assert cam.bounding_box(class_map) == (10, 5, 17, 9)
    assert cam.bounding_box(class_map, threshold=0.3) == (3, 12, 5, 14)


def test_bounding_box_threshold_is_exclusive_and_corners_connect():
    class_map = np.array([[10, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 3]])
    assert cam.bounding_box(class_map) == (2, 1, 4, 3)


def test_bounding_box_ignores_negative_evidence_and_needs_positive():
    assert cam.bounding_box(np.full((4, 4), -1.0)) is None
    assert cam.bounding_box(np.zeros((4, 4))) is None
    assert cam.bounding_box(np.full((4, 6), 2.0)) == (0, 0, 6, 4)
    assert cam.bounding_box(np.array([[-9, 1], [-9, -9]])) == (1, 0, 2, 1)
