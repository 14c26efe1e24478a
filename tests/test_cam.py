"""cam.py against naive computations, the paper's identity, and hand-made maps whose answer is known."""

import keras
import numpy as np
import pytest
from keras import layers
from skimage import transform

import cam
from lenet import lenet


def random_features(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def random_images(height, width, count=2):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 1), dtype=np.uint8)


def naive_class_activation_map(feature_maps, softmax_weights):
    """Equation (2) as a loop, in float64."""
    maps = np.zeros((*feature_maps.shape[:3], softmax_weights.shape[1]))
    for n, y, x, c in np.ndindex(maps.shape):
        for k in range(len(softmax_weights)):
            maps[n, y, x, c] += float(softmax_weights[k, c]) * float(feature_maps[n, y, x, k])
    return maps


def random_lenet(**arguments):
    keras.utils.set_random_seed(0)
    model = lenet(**arguments)
    model.get_layer("softmax_weights").kernel.assign(random_features((64, 10)))
    return model


def assert_scores_and_maps(cam_model, model, images):
    """S_c as the network itself computes it, equation (2) by the loop, and S_c = mean over the locations of M_c."""
    scores, maps = cam_model.predict_on_batch(images)
    assert (scores.dtype, maps.dtype) == (np.float32, np.float32)
    feature_maps = keras.Model(model.input, model.get_layer("feature_maps").output).predict_on_batch(images)
    softmax_weights = np.asarray(model.get_layer("softmax_weights").kernel)
    expected = naive_class_activation_map(feature_maps, softmax_weights)
    tolerance = 1e-5 * np.abs(maps).max()
    np.testing.assert_allclose(maps, expected, atol=tolerance)
    np.testing.assert_allclose(cam.class_activation_map(feature_maps, softmax_weights), expected, atol=tolerance)
    np.testing.assert_allclose(scores, model.predict_on_batch(images), atol=tolerance)
    if model.get_layer(index=-2).name == "gap":
        np.testing.assert_allclose(scores, maps.mean(axis=(1, 2)), atol=tolerance)
    return maps


@pytest.mark.parametrize("options", [{}, {"precision": "mixed_bfloat16"}, {"pooling": "max"}], ids=str)
@pytest.mark.parametrize("size", [(12, 16), (13, 10), (5, 3)])
def test_scores_and_maps_of_lenet(options, size):
    model = random_lenet(**options)
    maps = assert_scores_and_maps(cam.class_activation_model(model), model, random_images(*size))
    assert maps.shape == (2, -(-size[0] // 4), -(-size[1] // 4), 10)


def test_the_maps_follow_the_training_of_the_model_and_are_saved(tmp_path):
    model, images = random_lenet(location_dropout=0.3), random_images(12, 16, count=8)
    cam_model = cam.class_activation_model(model)
    before = assert_scores_and_maps(cam_model, model, images)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    for _ in range(2):
        model.train_on_batch(images, np.arange(8))
    maps = assert_scores_and_maps(cam_model, model, images)
    assert np.abs(maps - before).max() > 1e-3 * np.abs(maps).max()
    cam_model.save(tmp_path / "cam.keras")
    assert_scores_and_maps(keras.models.load_model(tmp_path / "cam.keras"), model, images)


def classifier(**dense):
    images = keras.Input((8, 8, 1))
    f = layers.Conv2D(4, 3, name="last_convolution")(images)
    return keras.Model(images, layers.Dense(3, name="logits", **dense)(layers.GlobalAveragePooling2D()(f)))


def test_layers_of_other_names_and_layers_that_do_not_fit():
    cam_model = cam.class_activation_model(classifier(use_bias=False), "last_convolution", "logits")
    scores, maps = cam_model.predict_on_batch(random_images(8, 8).astype(np.float32))
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), scores, rtol=1e-4, atol=1e-4)
    for dense in {}, {"use_bias": False, "activation": "softmax"}:
        with pytest.raises(ValueError, match="'logits' must be Dense"):
            cam.class_activation_model(classifier(**dense), "last_convolution", "logits")
    with pytest.raises(ValueError, match="feature_maps"):
        cam.class_activation_model(classifier(use_bias=False))


@pytest.mark.parametrize(("shape", "size"), [((2, 3, 5), (12, 14)), ((2, 7, 7, 3), (100, 90))])
def test_upsampling_equals_that_of_scikit_image(shape, size):
    """Bilinear, with half-pixel centres, of maps of one class and of several."""
    maps = random_features(shape)
    expected = [transform.resize(one, size, order=1, mode="edge", anti_aliasing=False) for one in maps]
    np.testing.assert_allclose(cam.upsample(maps, *size), expected, atol=1e-5)
    assert cam.upsample(np.array([[[0.0, 4.0]]]), 1, 4).tolist() == [[[0, 1, 3, 4]]]


def test_normalize():
    maps = np.array([[[1, 3], [5, 2]], [[-4, -4], [-4, -4]], [[-2, -1], [-3, -5]]], "float32")
    expected = [[[0, 0.5], [1, 0.25]], [[0, 0], [0, 0]], [[0.75, 1], [0.5, 0]]]
    np.testing.assert_allclose(cam.normalize(maps), expected)
    largest = np.finfo("float32").max
    np.testing.assert_array_equal(cam.normalize(np.array([[-largest, largest]], "float32")), [[0, 1]])


def test_overlay_blends_the_inverted_image_with_the_colormap():
    image, heatmap = np.array([[0, 255, 100]], np.uint8), np.array([[0, 1, 0.5]])
    picture, color = cam.overlay(image, heatmap), np.stack([image] * 3, axis=-1)
    assert picture.dtype == np.uint8
    # jet begins in half blue and ends in half red: matplotlib documents (0, 0, 127.5) and (127.5, 0, 0) for its ends.
    np.testing.assert_array_equal(picture[0, :2], [[128, 128, 191], [64, 0, 0]])
    np.testing.assert_array_equal(cam.overlay(image, heatmap, opacity=0)[0], [[255] * 3, [0] * 3, [155] * 3])
    np.testing.assert_array_equal(cam.overlay(image, heatmap, "gray", opacity=1)[0], [[0] * 3, [255] * 3, [128] * 3])
    np.testing.assert_array_equal(cam.overlay(image[..., None], heatmap), picture)
    # An image in colour is not inverted.
    np.testing.assert_array_equal(cam.overlay(255 - color, heatmap), picture)
    np.testing.assert_array_equal(cam.overlay(color, heatmap, opacity=0)[0], color[0])


BLOBS = np.zeros((20, 30))
BLOBS[5:9, 10:17], BLOBS[12:14, 3:5], BLOBS[0, 29] = 1, 4, 0.1


@pytest.mark.parametrize(
    ("class_map", "threshold", "box"),
    [
        (BLOBS, 0.2, (10, 5, 17, 9)),  # the largest component
        (BLOBS, 0.3, (3, 12, 5, 14)),  # the strongest, smaller
        ([[10, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 3]], 0.2, (2, 1, 4, 3)),  # exclusive; corners connect
        (np.full((4, 6), 2.0), 0.2, (0, 0, 6, 4)),
        ([[-9, 1], [-9, -9]], 0.2, (1, 0, 2, 1)),
        ([[-1, -1], [-1, 0]], 0.2, None),  # nowhere positive
    ],
)
def test_bounding_box(class_map, threshold, box):
    assert cam.bounding_box(class_map, threshold) == box
