"""How well class activation maps find the object, measured against its ground-truth bounding box.

    gt_known     GT-known localisation: share of images whose box (cam.bounding_box, 20% rule) has IoU >= 0.5 with the
                 true box; the map is that of the true class
    top1         top-1 localisation: the same, and the predicted class is right too
    mean_iou     mean IoU of these boxes; 0 where a map has no positive cell
    pointing     pointing game: share of images whose map has its maximum inside the box (Zhang et al. 2016)
    energy       share of the map's positive mass inside the box, mean over images (Wang et al. 2020)
    max_box_acc  MaxBoxAcc: the best GT-known localisation over all thresholds of the normalised map (Choe et al. 2020)
    pxap         PxAP: average precision of the normalised map's pixels as a score for "inside the box", pixels of all
                 images pooled (Choe et al. 2020, with the box as the region)

IoU is intersection over union. Boxes are x0, y0, x1, y1, half-open, in pixels of the image.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from scipy import sparse

from cam import normalize, upsample
from data.dataset import progress

NAMES = {
    "accuracy": "accuracy",
    "gt_known": "GT-known localisation",
    "top1": "top-1 localisation",
    "mean_iou": "mean IoU",
    "pointing": "pointing game",
    "energy": "energy in the box",
    "max_box_acc": "MaxBoxAcc",
    "pxap": "PxAP",
}
IOU = 0.5  # from which on a box counts as right
LEVELS = 100  # thresholds of MaxBoxAcc: 0, 0.01 ... 0.99
BINS = 1000  # thresholds of PxAP
BATCH = 125  # images at a time
PART = 32  # images that one thread measures at a time


def evaluate(cam, images, labels, boxes=None, thorough=False):
    """Accuracy of a classifier, and localisation of its maps of the true classes.

    Args:
        cam: Model made by `class_activation_model`.
        images: (N, H, W, channels), as the model takes them.
        labels: True classes, (N,).
        boxes: Ground truth, (N, 4); None if unknown: then only the accuracy is measured.
        thorough: Whether to measure MaxBoxAcc and PxAP too, which takes longer.

    Returns:
        Measures by name, each in 0..1.

    Raises:
        FloatingPointError: A score is infinite or NaN.
    """
    right, found = [], []
    batches = predict(cam, images)
    if thorough:
        batches = progress(batches, -(-len(images) // BATCH), "measuring in batches")
    with ThreadPoolExecutor() as pool:
        for part, scores, maps in batches:
            if not np.isfinite(scores).all():
                raise FloatingPointError("the model gives infinite or NaN scores")
            right.append(np.argmax(scores, axis=1) == labels[part])
            if boxes is not None:
                maps = maps[np.arange(len(maps)), :, :, labels[part]]  # (B, h, w)
                maps = np.asarray(upsample(maps, *images.shape[1:3]))  # (B, H, W)
                cuts = range(PART, len(maps), PART)
                parts = np.split(maps, cuts), np.split(boxes[part], cuts)
                found += pool.map(partial(measure, thorough=thorough), *parts)
    right = np.concatenate(right)
    measures = {"accuracy": right.mean()}
    if boxes is not None:
        found = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        measures |= summarize(found, right)
    return {name: float(value) for name, value in measures.items()}


def predict(cam, images):
    """Yields for each batch of images its slice, logits S_c (B, C) and class activation maps M_c (B, h, w, C).

    Keras's own `predict` takes longer to begin than a few hundred images take.
    """
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        yield part, *cam.predict_on_batch(images[part])


def table(measures, count):
    """The measures of `count` test images as lines of text."""
    lines = [f"    {title:<24}{measures[name]:8.2%}" for name, title in NAMES.items() if name in measures]
    return "\n".join([f"on all {count:,} test images", *lines])


def measure(maps, boxes, thorough=False):
    """Measures each map (N, H, W), at the size of the image, against its box (N, 4).

    Returns:
        Arrays by name: "iou" of the box by the 20% rule, "pointing" and "energy", (N,);
        if `thorough` also "ious" at each threshold, (N, LEVELS), and the number of pixels per bin of the normalised
        maps, "inside" and "outside" of the box, (1, BINS + 1), all images together.
    """
    height, width = maps.shape[1:]
    x0, y0, x1, y1 = (edge[:, None] for edge in boxes.T)  # (N, 1)
    rows, columns = np.arange(height), np.arange(width)
    in_box = ((y0 <= rows) & (rows < y1))[:, :, None] & ((x0 <= columns) & (columns < x1))[:, None, :]  # (N, H, W)
    flat, flat_box = maps.reshape(len(maps), -1), in_box.reshape(len(maps), -1)  # (N, H W)

    positive = np.maximum(flat, 0).astype(np.float64)
    total = positive.sum(axis=1)
    found = {
        "iou": intersection_over_union(bounding_boxes(maps), boxes),
        "pointing": np.take_along_axis(flat_box, flat.argmax(axis=1)[:, None], axis=1)[:, 0],
        "energy": (positive * flat_box).sum(axis=1) / np.where(total > 0, total, 1),
    }
    if thorough:
        normalized = normalize(maps)
        found["ious"] = intersection_over_union(boxes_at_levels(normalized), boxes[:, None])
        bins = (normalized.reshape(flat.shape) * BINS).astype(np.int16)
        for name, pixels in (("inside", flat_box), ("outside", ~flat_box)):
            found[name] = np.bincount(bins[pixels], minlength=BINS + 1)[None]
    return found


def summarize(found, right):
    """Sums up what `measure` found for N images, of which `right` (N,) were classified right."""
    localized = found["iou"] >= IOU
    measures = {
        "gt_known": localized.mean(),
        "top1": (localized & right).mean(),
        "mean_iou": found["iou"].mean(),
        "pointing": found["pointing"].mean(),
        "energy": found["energy"].mean(),
    }
    if "ious" in found:
        measures["max_box_acc"] = (found["ious"] >= IOU).mean(axis=0).max()
        measures["pxap"] = average_precision(found["inside"].sum(axis=0), found["outside"].sum(axis=0))
    return measures


def intersection_over_union(boxes, others):
    """IoU of boxes and others, (..., 4) each and broadcast; 0 for an empty box."""
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    intersection = np.maximum(high - low, 0).prod(axis=-1)
    return intersection / (
        (boxes[..., 2:] - boxes[..., :2]).prod(-1) + (others[..., 2:] - others[..., :2]).prod(-1) - intersection
    )


def average_precision(positives, negatives):
    """Area under the curve of precision against recall: sum over thresholds of precision times gain in recall.

    Args:
        positives: Number of pixels inside the boxes per bin of the score, lowest bin first.
        negatives: The same for the pixels outside.
    """
    true, false = positives[::-1].cumsum(), negatives[::-1].cumsum()  # at or above each threshold, highest first
    return np.sum(true / np.maximum(true + false, 1) * positives[::-1]) / true[-1]


def bounding_boxes(maps, threshold=0.2):
    """`cam.bounding_box` of each map (N, H, W) at once: (N, 4) int, zeros where no cell is positive."""
    if not np.isfinite(maps).all():
        raise ValueError("a class activation map is not finite: weights or image have infinite or NaN values")
    maxima = maps.max(axis=(1, 2), keepdims=True)
    return largest_boxes(((maps > threshold * maxima) & (maxima > 0)).astype(np.int8), 1)[:, 0]


def boxes_at_levels(maps):
    """The box around the largest component of map >= t, for t = 0, 1/LEVELS ... of maps (N, H, W) in 0..1.

    Returns:
        (N, LEVELS, 4) int; zeros where there is no such cell.
    """
    return largest_boxes(np.minimum(maps * LEVELS, LEVELS - 1).astype(np.int8) + np.int8(1), LEVELS)


def largest_boxes(levels, count):
    """The box around the largest connected component of each of the masks levels >= 1, levels >= 2 ... levels >= count.

    As in `bounding_box`, cells that touch at a corner are connected, and of equal components the first in reading order
    counts. Here it is found for all masks at once, from runs: cells side by side in a row, of which there are few.

    Args:
        levels: (N, H, W) int8, 0..127.
        count: Number of masks of each image.

    Returns:
        (N, count, 4) int; zeros for a mask without a cell.
    """
    number, height, width = levels.shape
    # All masks in reading order, one behind the other; an empty cell after each row and an empty row after each image
    # keep apart what is apart.
    row = width + 1
    size = number * (height + 1) * row
    cells = np.pad(levels, ((0, 0), (0, 1), (0, 1))).ravel()
    before = np.concatenate([[0], cells[:-1]], dtype=np.int8)
    starts, ends = edges(before, cells, size), edges(cells, before, size)  # of the runs, half-open
    # Runs of the next row that touch a run: those that end after its start and start before its end, or one beyond.
    first, last = np.searchsorted(ends, starts + row, "left"), np.searchsorted(starts, ends + row, "right")
    touching = last - first
    above = np.repeat(np.arange(len(starts)), touching)
    below = np.arange(touching.sum()) - np.repeat(touching.cumsum() - touching - first, touching)
    graph = sparse.coo_array((np.ones(len(above), bool), (above, below)), (len(starts), len(starts)))
    components, component = sparse.csgraph.connected_components(graph, directed=False)

    area = np.bincount(component, ends - starts)
    x0, begin = np.full((2, components), size * count)
    x1, end = np.zeros((2, components), int)
    np.minimum.at(x0, component, starts % row)
    np.maximum.at(x1, component, ends % row)
    np.minimum.at(begin, component, starts)
    np.maximum.at(end, component, ends)
    mask = begin // (row * (height + 1))
    y0, y1 = begin // row - mask * (height + 1), end // row + 1 - mask * (height + 1)
    order = np.lexsort((begin, -area, mask))
    masks, best = np.unique(mask[order], return_index=True)
    boxes = np.zeros((count * number, 4), int)
    boxes[masks] = np.stack([x0, y0, x1, y1], axis=1)[order[best]]
    return boxes.reshape(count, number, 4).swapaxes(0, 1)


def edges(low, high, size):
    """The cells where the level rises from low to high, once for each level that it reaches, `size` cells per level."""
    cells = np.flatnonzero(low < high)
    levels = high[cells] - low[cells]  # how many
    cells = np.repeat(cells, levels)
    reached = np.arange(len(cells)) - np.repeat(levels.cumsum(dtype=int) - levels, levels) + low[cells]  # 0: level 1
    order = np.argsort(reached.astype(np.int8), kind="stable")
    return (reached * size + cells)[order]
