"""metrics.py against naive computations, and against cases whose value is known."""

import numpy as np
import pytest
from skimage import measure

from cam import bounding_box, largest_component_box, normalize, upsample
from data.dataset import Split
from experiment import metrics
from experiment.files import UserError


def box_of_largest(mask):
    """The reference: one map, one threshold, scikit-image."""
    regions = measure.regionprops(measure.label(mask, connectivity=2))
    y0, x0, y1, x1 = max(regions, key=lambda region: region.area).bbox
    return x0, y0, x1, y1


def naive_iou(box, other):
    cells, others = ({(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in (box, other))
    return len(cells & others) / len(cells | others)


@pytest.fixture
def maps():
    """Smooth maps with several maxima, and two with many equal values."""
    rng = np.random.default_rng(0)
    smooth = upsample(rng.normal(size=(8, 6, 7)).astype(np.float32), 30, 34)
    coarse = rng.integers(0, 3, (2, 30, 34)).astype(np.float32)
    return np.concatenate([smooth, coarse])


@pytest.fixture
def boxes():
    rng = np.random.default_rng(1)
    x0, y0 = rng.integers(0, 20, (2, 10))
    return np.stack([x0, y0, x0 + rng.integers(1, 15, 10), y0 + rng.integers(1, 11, 10)], axis=1)


def test_measures_are_those_of_a_naive_computation(maps, boxes):
    found = metrics.measure(maps, boxes)
    for index, (class_map, (x0, y0, x1, y1)) in enumerate(zip(maps, boxes, strict=True)):
        assert found["iou"][index] == pytest.approx(naive_iou(bounding_box(class_map), (x0, y0, x1, y1)))
        y, x = np.unravel_index(class_map.argmax(), class_map.shape)
        assert found["pointing"][index] == (x0 <= x < x1 and y0 <= y < y1)
        positive = class_map.clip(min=0).astype(float)
        assert found["energy"][index] == pytest.approx(positive[y0:y1, x0:x1].sum() / positive.sum())


def test_pixel_average_precision_is_that_of_a_loop_over_thresholds(maps, boxes):
    found = metrics.measure(maps, boxes, all_metrics=True)
    measured = metrics.summarize(found, np.ones(10, bool))["pxap"]
    scores = (normalize(maps) * metrics.PIXEL_BINS).astype(int)
    inside = np.zeros(maps.shape, bool)
    for mask, (x0, y0, x1, y1) in zip(inside, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    expected = recall = 0
    for threshold in range(metrics.PIXEL_BINS, -1, -1):
        above = scores >= threshold
        if above.any():
            precision, before, recall = inside[above].mean(), recall, inside[above].sum() / inside.sum()
            expected += precision * (recall - before)
    assert measured == pytest.approx(expected)


def test_max_box_accuracy_is_the_best_over_thresholds(maps, boxes):
    found = metrics.measure(maps, boxes, all_metrics=True)
    measured = metrics.summarize(found, np.ones(10, bool))["max_box_acc"]
    normalized = normalize(maps)
    expected = max(
        np.mean(
            [naive_iou(box_of_largest(m >= level / 100), box) >= 0.5 for m, box in zip(normalized, boxes, strict=True)]
        )
        for level in range(100)
    )
    assert measured == pytest.approx(expected)


def test_boxes_are_those_of_scikit_image(maps):
    for class_map in maps:
        assert bounding_box(class_map) == box_of_largest(class_map > 0.2 * class_map.max())
        for threshold in metrics.BOX_THRESHOLDS:
            mask = normalize(class_map) >= threshold
            assert largest_component_box(mask) == box_of_largest(mask)
    assert largest_component_box(np.zeros((4, 5), bool)) is None


def test_known_cases():
    """A blob that is the box, one that is half of it, one elsewhere, and a map without a positive cell."""
    maps = np.zeros((4, 20, 20), np.float32)
    maps[0, 5:9, 4:10] = 1
    maps[1, 5:9, 4:7] = 1
    maps[2, 12:14, 12:14] = 1
    maps[3] = -1
    boxes = np.tile([4, 5, 10, 9], (4, 1))
    found = metrics.measure(maps, boxes, all_metrics=True)
    assert found["iou"].tolist() == [1, 0.5, 0, 0]
    assert found["pointing"].tolist() == [True, True, False, False]
    assert found["energy"].tolist() == [1, 1, 0, 0]
    found_metrics = metrics.summarize(found, correct=np.array([True, False, True, True]))
    assert found_metrics["gt_known"] == 0.5
    assert found_metrics["top1"] == 0.25
    assert found_metrics["mean_iou"] == 0.375
    assert found_metrics["pointing"] == 0.5
    assert found_metrics["energy"] == 0.5
    assert found_metrics["max_box_acc"] == 0.5
    # At the highest threshold 36 + 4 cells, 36 of them inside, of 96; then all 1,600 cells.
    assert found_metrics["pxap"] == pytest.approx(36 / 40 * 36 / 96 + 96 / 1600 * 60 / 96)


def test_perfect_maps_measure_one():
    maps = np.zeros((3, 12, 12))
    maps[:, 2:6, 3:9] = 1
    found = metrics.measure(maps, np.tile([3, 2, 9, 6], (3, 1)), all_metrics=True)
    assert set(metrics.summarize(found, np.ones(3, bool)).values()) == {1.0}


def test_evaluate_is_the_same_whatever_the_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    maps, logits = rng.normal(size=(7, 6, 5)).astype(np.float32), rng.normal(size=(7, 10))
    images, labels, boxes = np.zeros((7, 24, 20, 1), np.uint8), rng.integers(0, 10, 7), np.tile([2, 3, 9, 11], (7, 1))
    labels[:3] = logits[:3].argmax(axis=1)
    tested = Split(images, labels, boxes)
    whole = metrics.evaluate(logits, maps, tested, all_metrics=True)
    monkeypatch.setattr(metrics, "CHUNK", 3)
    assert metrics.evaluate(logits, maps, tested, all_metrics=True) == pytest.approx(whole, rel=1e-6)
    right = logits.argmax(axis=1) == labels
    assert whole["accuracy"] == right.mean()
    found_metrics = metrics.summarize(metrics.measure(upsample(maps, 24, 20), boxes), right)
    assert {name: whole[name] for name in found_metrics} == pytest.approx(found_metrics, rel=1e-6)
    assert list(metrics.evaluate(logits, maps, tested._replace(boxes=None))) == ["accuracy"]


def test_logits_of_a_diverged_model_are_refused():
    tested = Split(np.zeros((2, 8, 8, 1), np.uint8), np.array([1, 2]), None)
    with pytest.raises(UserError, match="NaN"):
        metrics.evaluate(np.array([[1.0] * 10, [np.nan] * 10]), np.ones((2, 2, 2)), tested)
