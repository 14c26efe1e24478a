"""Metrics of localization: class activation maps against ground-truth bounding boxes.

    gt_known     GT-known localization: share of images whose box (cam.bounding_box, 20% rule) for the true class has
                 an IoU (intersection over union) of at least 0.5 with the ground-truth box
    top1         top-1 localization: the same, and the predicted class is correct
    mean_iou     mean IoU of these boxes; 0 if a map is nowhere positive
    pointing     pointing game: share of images whose map has its maximum inside the box (Zhang et al. 2016)
    energy       energy-based pointing game: share of the map's positive mass inside the box, mean over images
                 (Wang et al. 2020)
    max_box_acc  MaxBoxAcc: the best GT-known localization over all thresholds of the normalized map (Choe et al. 2020)
    pxap         PxAP: pixel average precision of the normalized map as a score for "inside the box", pixels of all
                 images pooled (Choe et al. 2020)

Boxes are x0, y0, x1, y1, half-open, in pixels of the image.
"""

import numpy as np
from tqdm import tqdm

from cam import bounding_box, largest_component_box, normalize, upsample
from experiment.files import UserError

METRIC_TITLES = {
    "accuracy": "accuracy",
    "gt_known": "GT-known localization",
    "top1": "top-1 localization",
    "mean_iou": "mean IoU",
    "pointing": "pointing game",
    "energy": "energy in the box",
    "max_box_acc": "MaxBoxAcc",
    "pxap": "PxAP",
}
SHOWN_METRICS = ("accuracy", "gt_known")  # in progress, curve and page
IOU_THRESHOLD = 0.5  # a box is correct at this IoU or more
BOX_THRESHOLDS = np.arange(100) / 100  # of MaxBoxAcc
PIXEL_BINS = 1000  # of PxAP
CHUNK = 50  # maps upsampled at a time


def predict_class_maps(cam_model, images, classes, batch_size=50):
    """Logits of images, and the class activation map of one class for each of them.

    Args:
        cam_model: Model made by `cam.class_activation_model`.
        images: (N, h, w, channels), as the model takes them.
        classes: One class per image, (N,), 0..C-1.
        batch_size: Images per forward pass.

    Returns:
        S_c (N, C) and M_c of the given classes (N, H, W), float32.
    """
    classes, logits, maps = np.asarray(classes), [], []
    hidden = len(images) < 8 * batch_size or None  # of the progress bar; None: shown on a terminal only
    for start in tqdm(range(0, len(images), batch_size), "predicting", leave=False, disable=hidden):
        batch = slice(start, start + batch_size)
        batch_logits, batch_maps = cam_model.predict_on_batch(images[batch])
        logits.append(batch_logits)
        maps.append(batch_maps[np.arange(len(batch_maps)), :, :, classes[batch]])
    return np.concatenate(logits), np.concatenate(maps)


def evaluate(logits, maps, tested, all_metrics=False):
    """Accuracy of a classifier, and localization by its maps of the true classes.

    Args:
        logits: S_c of the tested images, (N, C).
        maps: M_c of the true classes, (N, h, w), as `predict_class_maps` returns them.
        tested: The `Split` of images (N, H, W, channels), labels (N,) and boxes (N, 4). Without boxes only the accuracy
            is measured.
        all_metrics: Whether to measure MaxBoxAcc and PxAP, too, which takes longer.

    Returns:
        Metrics by name, each in 0..1.

    Raises:
        UserError: A logit is infinite or NaN.
    """
    if not np.isfinite(logits).all():
        raise UserError("the logits are infinite or NaN; train again, with --fresh and a smaller --learning-rate")
    correct = logits.argmax(axis=1) == tested.labels
    metrics = {"accuracy": correct.mean()}
    if tested.boxes is not None:
        size, measured = tested.images.shape[1:3], []
        hidden = None if all_metrics else True  # None: shown on a terminal only
        for start in tqdm(range(0, len(maps), CHUNK), "measuring", leave=False, disable=hidden):
            chunk = slice(start, start + CHUNK)
            measured.append(measure(upsample(maps[chunk], *size), tested.boxes[chunk], all_metrics))
        metrics |= summarize({name: np.concatenate([m[name] for m in measured]) for name in measured[0]}, correct)
    return {name: float(value) for name, value in metrics.items()}


def format_metrics(metrics, count):
    """The metrics of `count` test images as lines of text."""
    lines = [f"    {title:<24}{metrics[name]:8.2%}" for name, title in METRIC_TITLES.items() if name in metrics]
    return "\n".join([f"on all {count:,} test images", *lines])


def measure(maps, boxes, all_metrics=False):
    """Measures each map (N, H, W), at the size of the image, against its box (N, 4).

    Returns:
        Arrays by name: "iou" of the box by the 20% rule, "pointing" and "energy", (N,). With `all_metrics` also "ious"
        at each threshold of MaxBoxAcc, (N, 100), and the number of pixels in each bin of the normalized map, "inside"
        and "outside" of the box, (N, PIXEL_BINS + 1).
    """
    found = [bounding_box(class_map) or (0, 0, 0, 0) for class_map in maps]
    masks = np.zeros(maps.shape, bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    peaks = maps.reshape(len(maps), -1).argmax(axis=1)
    positive = np.maximum(maps, 0, dtype=np.float64)
    total = positive.sum(axis=(1, 2))
    measured = {
        "iou": intersection_over_union(np.array(found), boxes),
        "pointing": masks.reshape(len(maps), -1)[np.arange(len(maps)), peaks],
        "energy": (positive * masks).sum(axis=(1, 2)) / np.where(total > 0, total, 1),
    }
    if all_metrics:
        normalized = normalize(maps)
        found = [
            [largest_component_box(class_map >= threshold) or (0, 0, 0, 0) for threshold in BOX_THRESHOLDS]
            for class_map in normalized
        ]  # (N, 100, 4)
        measured["ious"] = intersection_over_union(np.array(found), boxes[:, None])
        bins = (normalized * PIXEL_BINS).astype(int)
        for name, part in ("inside", masks), ("outside", ~masks):
            counts = [np.bincount(b[p], minlength=PIXEL_BINS + 1) for b, p in zip(bins, part, strict=True)]
            measured[name] = np.array(counts)
    return measured


def summarize(measured, correct):
    """Metrics of N images from what `measure` found, and whether each was classified correctly, (N,)."""
    localized = measured["iou"] >= IOU_THRESHOLD
    metrics = {
        "gt_known": localized.mean(),
        "top1": (localized & correct).mean(),
        "mean_iou": measured["iou"].mean(),
        "pointing": measured["pointing"].mean(),
        "energy": measured["energy"].mean(),
    }
    if "ious" in measured:
        metrics["max_box_acc"] = (measured["ious"] >= IOU_THRESHOLD).mean(axis=0).max()
        metrics["pxap"] = average_precision(measured["inside"].sum(axis=0), measured["outside"].sum(axis=0))
    return metrics


def intersection_over_union(boxes, others):
    """IoU of boxes and others, (..., 4) each and broadcast; 0 for an empty box."""
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    intersection = np.maximum(high - low, 0).prod(axis=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(axis=-1) for b in (boxes, others)]
    return intersection / (areas[0] + areas[1] - intersection)


def average_precision(positives, negatives):
    """Area under the precision-recall curve: sum over thresholds of precision times gain in recall.

    Args:
        positives: Number of pixels inside the boxes in each bin of the score, lowest bin first.
        negatives: The same for the pixels outside.
    """
    true, false = positives[::-1].cumsum(), negatives[::-1].cumsum()  # at or above each threshold, highest first
    return np.sum(true / np.maximum(true + false, 1) * positives[::-1]) / true[-1]
