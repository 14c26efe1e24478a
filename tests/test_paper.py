"""benchmarks/paper.py: what its comparisons rest on."""

import sys

import keras
import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, call

from cam import class_activation_model
from data.dataset import Split
from lenet import lenet

sys.path.insert(0, str(ROOT / "benchmarks"))

import paper


def random_images(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 1), dtype=np.uint8)


def test_with_one_pooling_after_conv2_the_other_network_is_lenet():
    keras.utils.set_random_seed(0)
    other, images = paper.other_network(), random_images(3, 100)
    model = lenet()
    model.set_weights(other.get_weights())
    np.testing.assert_allclose(other(images), model(images), rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*overflow")
def test_the_gradient_is_that_of_finite_differences():
    keras.utils.set_random_seed(0)
    model, images = class_activation_model(lenet()), random_images(1, 20).astype(np.float64)
    logits, class_map, gradient = paper.differentiate(model, images, 3)
    np.testing.assert_allclose(logits[3], class_map.mean(), rtol=1e-4)
    y, x = np.unravel_index(np.abs(gradient[:, :, 0]).argmax(), (20, 20))
    step = np.zeros_like(images)
    step[0, y, x] = 0.5
    high, low = (np.asarray(model(images + sign * step)[0])[0, 3] for sign in (1, -1))
    assert gradient[y, x, 0] == pytest.approx(high - low, rel=0.05)


def test_the_softmax_weights_for_other_classes_fit_the_pooled_features():
    keras.utils.set_random_seed(0)
    images = random_images(60, 12)
    images[::2] //= 4  # two classes: dark and light
    split = Split(images, np.arange(60) % 2, None)
    classifier = paper.classify_features(lenet(), split)
    assert (classifier.predict(images, verbose=0).argmax(axis=1) == split.labels).all()
    np.testing.assert_allclose(classifier.get_weights()[-1].sum(axis=1), 0, atol=1e-3)


def test_a_subset_has_classes_from_zero():
    split = Split(random_images(6, 4), np.array([1, 5, 7, 9, 0, 6]), np.arange(24).reshape(6, 4))
    found = paper.subset(split, 5, 7)
    assert found.labels.tolist() == [0, 2, 1]
    np.testing.assert_array_equal(found.images, split.images[[1, 2, 5]])
    np.testing.assert_array_equal(found.boxes, split.boxes[[1, 2, 5]])


def test_a_crop_is_the_square_around_the_box_with_a_margin():
    image = np.zeros((1, 100, 100, 1), np.uint8)
    image[0, 40:64, 36:60] = 200
    side = paper.CROP_SIDE - 2 * paper.MARGIN
    [crop] = paper.cut_out(image, [(36, 40, 60, 64)])
    expected = np.pad(np.full((side, side, 1), 200), ((paper.MARGIN,) * 2, (paper.MARGIN,) * 2, (0, 0)))
    np.testing.assert_array_equal(crop, expected)
    [crop] = paper.cut_out(image, [(0, 0, 24, 24)])
    assert not crop.any()  # black beyond the image


def test_the_table_has_mean_and_deviation(capsys):
    rows = {"a": [{"accuracy": 0.9}, {"accuracy": 0.8}], "b": [{"accuracy": 0.5}]}
    paper.print_table(rows, 100, ("accuracy",))
    lines = capsys.readouterr().out.splitlines()
    assert "up to 5.0%" in lines[1]
    assert lines[-2:] == ["| a | 2 | 85.0% +- 7.1% |", "| b | 1 | 50.0% |"]


def test_bad_input_is_named_in_one_line(tmp_path, monkeypatch):
    assert_one_line_error(call(paper, "pooling", "--seeds", 0), "--seeds")
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(call(paper, "crops"), "paper.py: data/labels.txt is missing")
