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


def measure_all(maps, boxes, all_metrics=False):
    return [metrics.measure_map(class_map, box, all_metrics) for class_map, box in zip(maps, boxes, strict=True)]


@pytest.mark.parametrize("count", [1, 3])
def test_measures_are_those_of_a_naive_computation(maps, boxes, count):
    """Of several boxes the best IoU, and their union."""
    for index, class_map in enumerate(maps):
        of_image = np.roll(boxes, index, axis=0)[:count]
        found = metrics.measure_map(class_map, of_image[0] if count == 1 else of_image)
        assert found["iou"] == pytest.approx(max(naive_iou(bounding_box(class_map), box) for box in of_image))
        union = {(y, x) for x0, y0, x1, y1 in of_image for y in range(y0, y1) for x in range(x0, x1)}
        assert found["pointing"] == (np.unravel_index(class_map.argmax(), class_map.shape) in union)
        positive = class_map.clip(min=0).astype(float)
        assert found["energy"] == pytest.approx(sum(positive[place] for place in union) / positive.sum())


def test_pixel_average_precision_is_that_of_a_loop_over_thresholds(maps, boxes):
    found = measure_all(maps, boxes, all_metrics=True)
    measured = metrics.summarize(found, np.zeros(10))["pxap"]
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
    found = metrics.summarize(measure_all(maps, boxes, all_metrics=True), np.zeros(10))
    normalized = normalize(maps)
    expected = []
    for level in range(100):
        found_boxes = [box_of_largest(one >= level / 100) for one in normalized]
        ious = [naive_iou(box, other) for box, other in zip(found_boxes, boxes, strict=True)]
        expected.append(np.mean(np.array(ious) >= 0.5))
    assert found["max_box_acc"] == pytest.approx(max(expected))
    assert found["threshold"] == pytest.approx(expected.index(max(expected)) / 100)


def test_ranks_decide_top_1_and_top_5():
    """Boxes of images 0, 1 and 2 are right; their true classes are first, fifth and sixth."""
    class_map = np.zeros((20, 20), np.float32)
    class_map[5:9, 4:10] = 1
    boxes = [(4, 5, 10, 9), [(0, 0, 2, 2), (4, 5, 10, 9)], (4, 5, 10, 9), (0, 0, 2, 2)]
    ranks = metrics.ranks(np.arange(10.0)[None].repeat(4, axis=0), np.array([9, 5, 4, 9]))
    found = metrics.summarize([metrics.measure_map(class_map, box) for box in boxes], ranks)
    assert (found["gt_known"], found["top1"], found["top5"]) == (0.75, 0.25, 0.5)


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
    found = measure_all(maps, boxes, all_metrics=True)
    assert [image["iou"] for image in found] == [1, 0.5, 0, 0]
    assert [image["pointing"] for image in found] == [True, True, False, False]
    assert [image["energy"] for image in found] == [1, 1, 0, 0]
    expected = {"gt_known": 0.5, "top1": 0.25, "top5": 0.5, "mean_iou": 0.375, "pointing": 0.5, "energy": 0.5}
    # At the highest threshold 36 + 4 cells, 36 of them inside, of 96; then all 1,600 cells.
    expected |= {"max_box_acc": 0.5, "threshold": 0.01, "pxap": 36 / 40 * 36 / 96 + 96 / 1600 * 60 / 96}
    assert metrics.summarize(found, ranks=np.array([0, 3, 0, 0])) == pytest.approx(expected)


def test_perfect_maps_measure_one():
    maps = np.zeros((3, 12, 12))
    maps[:, 2:6, 3:9] = 1
    found = metrics.summarize(measure_all(maps, np.tile([3, 2, 9, 6], (3, 1)), all_metrics=True), np.zeros(3))
    assert found.pop("threshold") == 0.01
    assert set(found.values()) == {1.0}


class FixedModel:
    """In the place of a model: its images are indices into given logits and maps."""

    def __init__(self, logits, maps):
        self.logits, self.maps = logits, maps

    def predict_on_batch(self, images):
        indices = images[:, 0, 0, 0]
        return self.logits[indices], self.maps[indices]


def split_of(count, labels, boxes=None):
    return Split(np.broadcast_to(np.arange(count)[:, None, None, None], (count, 24, 20, 1)), labels, boxes)


def test_evaluate_is_the_same_whatever_the_batches(monkeypatch):
    rng = np.random.default_rng(0)
    maps, logits = rng.normal(size=(7, 6, 5, 10)).astype(np.float32), rng.normal(size=(7, 10))
    labels, boxes = rng.integers(0, 10, 7), np.tile([2, 3, 9, 11], (7, 1))
    labels[:3] = logits[:3].argmax(axis=1)
    model, tested = FixedModel(logits, maps), split_of(7, labels, boxes)
    whole, found_logits, found_maps = metrics.evaluate(model, tested, all_metrics=True)
    monkeypatch.setattr(metrics, "EVALUATION_BATCH", 3)
    assert metrics.evaluate(model, tested, all_metrics=True)[0] == pytest.approx(whole, rel=1e-6)
    np.testing.assert_array_equal(found_logits, logits)
    assert whole["accuracy"] == (logits.argmax(axis=1) == labels).mean()
    ranks = np.array([sorted(-scores).index(-scores[label]) for scores, label in zip(logits, labels, strict=True)])
    of_true_class = maps[range(7), :, :, labels]
    np.testing.assert_array_equal(found_maps, of_true_class)
    found = metrics.summarize(measure_all(upsample(of_true_class, 24, 20), boxes, all_metrics=True), ranks)
    assert {name: whole[name] for name in found} == pytest.approx(found, rel=1e-6)
    assert list(metrics.evaluate(model, split_of(7, labels))[0]) == ["accuracy"]


def test_logits_of_a_diverged_model_are_refused():
    model = FixedModel(np.array([[1.0] * 10, [np.nan] * 10]), np.ones((2, 2, 2, 10)))
    with pytest.raises(UserError, match="NaN"):
        metrics.evaluate(model, split_of(2, np.array([1, 2])))
