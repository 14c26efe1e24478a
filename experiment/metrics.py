"""Metrics of localization: class activation maps against ground-truth bounding boxes.

    gt_known     GT-known localization: share of images whose box (cam.bounding_box, 20% rule) for the true class has
                 an IoU (intersection over union) of at least 0.5 with the ground-truth box
    top1         top-1 localization: the same, and the predicted class is correct
    top5         top-5 localization: the same, and the true class is one of the five with the highest scores
    mean_iou     mean IoU of these boxes; 0 if a map is nowhere positive
    pointing     pointing game: share of images whose map has its maximum inside the box (Zhang et al. 2016, who also
                 count a maximum up to 15 pixels outside)
    energy       energy-based pointing game: share of the map's positive mass inside the box, mean over images
                 (Wang et al. 2020)
    max_box_acc  MaxBoxAcc: the best GT-known localization over all thresholds of the normalized map (Choe et al. 2020)
    threshold    the threshold where MaxBoxAcc is reached, 0..1
    pxap         PxAP: pixel average precision of the normalized map as a score for "inside the box", pixels of all
                 images pooled (Choe et al. 2020)

Boxes are x0, y0, x1, y1, half-open, in pixels of the image. Of several true boxes of an image, the one with the best
IoU counts, and for pointing, energy and pxap their union.
"""

import numpy as np
from tqdm import tqdm

from cam import bounding_box, largest_component_box, normalize, upsample
from experiment.distribution import predict_on_batch
from experiment.files import UserError

METRIC_TITLES = {
    "accuracy": "accuracy",
    "top5_accuracy": "top-5 accuracy",
    "boxed": "images with true boxes",  # a number, given if it is not that of all images
    "gt_known": "GT-known localization",
    "top1": "top-1 localization",
    "top5": "top-5 localization",
    "mean_iou": "mean IoU",
    "pointing": "pointing game",
    "energy": "energy in the box",
    "max_box_acc": "MaxBoxAcc",
    "threshold": "  at the threshold",
    "pxap": "PxAP",
}
SHOWN_METRICS = ("accuracy", "gt_known")  # in progress, curve and page
IOU_THRESHOLD = 0.5  # a box is correct at this IoU or more
BOX_THRESHOLDS = np.arange(100) / 100  # of MaxBoxAcc
PIXEL_BINS = 1000  # of PxAP
EVALUATION_BATCH = 50  # images in a forward pass


def evaluate(cam_model, test, all_metrics=False):
    """Measures a classifier, and its class activation maps of the true classes, on test images.

    Args:
        cam_model: Model from images to [S_c (N, C), M_c (N, h, w, C)], or a `Network`.
        test: The `Split` of test images. Without boxes only the accuracy is measured.
        all_metrics: Whether to measure top-5 accuracy, MaxBoxAcc and PxAP, too, which takes longer.

    Returns:
        Metrics by name, each in 0..1, but for "boxed"; S_c (N, C); list of the maps M_c of the true classes, (h, w)
        each.

    Raises:
        UserError: A logit is infinite or NaN.
    """
    logits, maps, measured, boxed = [], [], [], []
    with tqdm(desc="evaluating", total=len(test.labels), leave=False, disable=None, delay=2) as progress:
        for images in batches(test.inputs, EVALUATION_BATCH):
            indices = range(len(maps), len(maps) + len(images))
            batch_logits, class_maps = predict_on_batch(cam_model, images)
            if not np.isfinite(batch_logits).all():
                raise UserError("the logits are infinite or NaN; try --fresh and a smaller --learning-rate")
            logits.append(batch_logits)
            class_maps = class_maps[np.arange(len(images)), :, :, test.labels[indices]]  # (n, h, w)
            maps.extend(class_maps)
            with_boxes = [i for i in indices if test.boxes is not None and test.boxes[i] is not None]
            if with_boxes:
                size = test.images[with_boxes[0]].shape[:2]  # the images of a batch have one size
                upsampled = upsample(class_maps, *size)
                measured += [measure_map(upsampled[i - indices[0]], test.boxes[i], all_metrics) for i in with_boxes]
                boxed += with_boxes
            progress.update(len(images))
    logits = np.concatenate(logits)
    true_ranks = ranks(logits, test.labels)
    metrics = {"accuracy": float((true_ranks < 1).mean())}
    if all_metrics and logits.shape[1] > 5:
        metrics["top5_accuracy"] = float((true_ranks < 5).mean())
    if measured:
        metrics |= {"boxed": len(boxed)} if len(boxed) < len(test.labels) else {}
        metrics |= summarize(measured, true_ranks[boxed])
    return metrics, logits, maps


def batches(images, size):
    """Yields images in batches (n, H, W, channels): of an array `size` at a time, of a list of images each alone."""
    if isinstance(images, np.ndarray):
        for start in range(0, len(images), size):
            yield images[start : start + size]
    else:
        for image in images:
            yield image[None]


def ranks(logits, labels):
    """Rank of the true class of each image, 0 the highest: (N,) of (N, C) and (N,). Of equal logits the first wins."""
    return (np.argsort(-logits, axis=1, kind="stable") == labels[:, None]).argmax(axis=1)


def format_metrics(metrics, count, images="test images"):
    """The metrics of `count` images as lines of text, the accuracy with its standard error."""
    formats = {"threshold": ".2f", "boxed": ","}
    shown = {name: format(value, formats.get(name, ".2%")) for name, value in metrics.items()}
    lines = [f"    {title:<24}{shown[name]:>8}" for name, title in METRIC_TITLES.items() if name in metrics]
    error = (metrics["accuracy"] * (1 - metrics["accuracy"]) / count) ** 0.5
    lines[0] += f" (standard error {error:.2%})"
    return "\n".join([f"on all {count:,} {images}", *lines])


def measure_map(class_map, boxes, all_metrics=False):
    """Measures a map (H, W), upsampled to the size of the image, against the true boxes, (4,) or (n, 4).

    Returns by name: "iou" of the box by the 20% rule, "pointing" and "energy". With `all_metrics` also "ious" at each
    threshold of MaxBoxAcc, (100,), and the number of pixels in each bin of the normalized map, "inside" and "outside"
    of the boxes, (PIXEL_BINS + 1,).
    """
    boxes, mask = np.reshape(boxes, (-1, 4)), np.zeros(class_map.shape, bool)
    for x0, y0, x1, y1 in boxes:  # a box has at least the pixel at its corner
        x, y = min(round(x0), mask.shape[1] - 1), min(round(y0), mask.shape[0] - 1)
        mask[y : max(round(y1), y + 1), x : max(round(x1), x + 1)] = True
    found = np.array(bounding_box(class_map) or (0, 0, 0, 0))
    positive = np.maximum(class_map, 0, dtype=np.float64)
    measured = {
        "iou": intersection_over_union(found, boxes).max(),
        "pointing": mask.flat[class_map.argmax()],
        "energy": positive[mask].sum() / (positive.sum() or 1),
    }
    if all_metrics:
        normalized = normalize(class_map)
        found = np.array([largest_component_box(normalized >= share) or (0, 0, 0, 0) for share in BOX_THRESHOLDS])
        measured["ious"] = intersection_over_union(found[:, None], boxes).max(axis=1)
        bins = (normalized * PIXEL_BINS).astype(int)
        for name, pixels in (("inside", mask), ("outside", ~mask)):
            measured[name] = np.bincount(bins[pixels], minlength=PIXEL_BINS + 1).astype(np.uint32)
    return measured


def summarize(measured, ranks):
    """Metrics of N images, from what `measure_map` returns for each, and the `ranks` of the true classes (N,)."""
    ious = np.array([image["iou"] for image in measured])  # (N,)
    localized = ious >= IOU_THRESHOLD
    metrics = {
        "gt_known": localized.mean(),
        "top1": (localized & (ranks < 1)).mean(),
        "top5": (localized & (ranks < 5)).mean(),
        "mean_iou": ious.mean(),
        "pointing": np.mean([image["pointing"] for image in measured]),
        "energy": np.mean([image["energy"] for image in measured]),
    }
    if "ious" in measured[0]:
        shares = np.mean([image["ious"] >= IOU_THRESHOLD for image in measured], axis=0)  # at each threshold
        metrics |= {"max_box_acc": shares.max(), "threshold": BOX_THRESHOLDS[shares.argmax()]}
        inside, outside = (sum(image[name].astype(int) for image in measured) for name in ("inside", "outside"))
        metrics["pxap"] = average_precision(inside, outside)
    return {name: float(value) for name, value in metrics.items()}


def intersection_over_union(boxes, others):
    """IoU of boxes and others, (..., 4) each and broadcast; 0 for an empty box."""
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    intersection = np.maximum(high - low, 0).prod(axis=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(axis=-1) for b in (boxes, others)]
    return intersection / (areas[0] + areas[1] - intersection)


def average_precision(positives, negatives):
    """Area under the precision-recall curve: sum over thresholds of precision times gain in recall.

    `positives` and `negatives` are the numbers of pixels inside and outside the boxes in each bin of the score, lowest
    bin first.
    """
    true, false = positives[::-1].cumsum(), negatives[::-1].cumsum()  # at or above each threshold, highest first
    return np.sum(true / np.maximum(true + false, 1) * positives[::-1]) / true[-1]
