"""Metrics of localization: class activation maps against ground-truth bounding boxes.

    gt_known     GT-known localization: share of images whose box (cam.bounding_box, 20% rule) for the true class has
                 an IoU (intersection over union) of at least 0.5 with the ground-truth box
    top1         top-1 localization: the same, and the predicted class is correct
    top5         top-5 localization: the same, and the true class is one of the five with the highest scores
    mean_iou     mean IoU of these boxes; 0 if a map is nowhere positive
    pointing     pointing game: share of images whose map has its maximum inside the box (Zhang et al. 2016)
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
from experiment.files import UserError

METRIC_TITLES = {
    "accuracy": "accuracy",
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
        tested: The `Split` of images (N, H, W, channels), labels (N,) and boxes. Without boxes only the accuracy is
            measured.
        all_metrics: Whether to measure MaxBoxAcc and PxAP, too, which takes longer.

    Returns:
        Metrics by name, each in 0..1.

    Raises:
        UserError: A logit is infinite or NaN.
    """
    if not np.isfinite(logits).all():
        raise UserError("the logits are infinite or NaN; train again, with --fresh and a smaller --learning-rate")
    metrics = {"accuracy": float((logits.argmax(axis=1) == tested.labels).mean())}
    if tested.boxes is not None:
        chunks = (maps[start : start + CHUNK] for start in range(0, len(maps), CHUNK))
        class_maps = (one for chunk in chunks for one in upsample(chunk, *tested.images.shape[1:3]))
        metrics |= localize(zip(logits, tested.labels, class_maps, tested.boxes, strict=True), len(maps), all_metrics)
    return metrics


def localize(predictions, count, all_metrics=False):
    """Metrics of localization.

    Args:
        predictions: Of each image its logits S_c (C,), its label, M_c of its true class, upsampled to the image (H, W),
            and its true boxes, (4,) or (n, 4).
        count: Number of images.
        all_metrics: Whether to measure MaxBoxAcc and PxAP, too, which takes longer.

    Returns:
        Metrics by name, each in 0..1.
    """
    measured, ranks = [], []
    hidden = None if all_metrics else True  # None: the progress bar is shown on a terminal only
    for logits, label, class_map, boxes in tqdm(predictions, "measuring", count, leave=False, disable=hidden):
        ranks.append((logits > logits[label]).sum())  # number of classes with a higher score
        measured.append(measure(class_map, boxes, all_metrics))
    return summarize(measured, np.array(ranks))


def format_metrics(metrics, count):
    """The metrics of `count` test images as lines of text, the accuracy with its standard error."""
    shown = {name: f"{value:.2f}" if name == "threshold" else f"{value:.2%}" for name, value in metrics.items()}
    lines = [f"    {title:<24}{shown[name]:>8}" for name, title in METRIC_TITLES.items() if name in metrics]
    lines[0] += f" +- {(metrics['accuracy'] * (1 - metrics['accuracy']) / count) ** 0.5:.2%}"
    return "\n".join([f"on all {count:,} test images", *lines])


def measure(class_map, boxes, all_metrics=False):
    """Measures a map (H, W), upsampled to the size of the image, against the true boxes, (4,) or (n, 4).

    Returns:
        By name: "iou" of the box by the 20% rule, "pointing" and "energy". With `all_metrics` also "ious" at each
        threshold of MaxBoxAcc, (100,), and the number of pixels in each bin of the normalized map, "inside" and
        "outside" of the boxes, (PIXEL_BINS + 1,).
    """
    boxes, mask = np.reshape(boxes, (-1, 4)), np.zeros(class_map.shape, bool)
    for x0, y0, x1, y1 in np.rint(boxes).astype(int):
        mask[y0:y1, x0:x1] = True
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
        measured["inside"] = np.bincount(bins[mask], minlength=PIXEL_BINS + 1)
        measured["outside"] = np.bincount(bins[~mask], minlength=PIXEL_BINS + 1)
    return measured


def summarize(measured, ranks):
    """Metrics of N images.

    Args:
        measured: What `measure` returns for each image.
        ranks: Rank of each image's true class by its score, (N,): 0 for the predicted class.
    """
    measured = {name: np.array([image[name] for image in measured]) for name in measured[0]}  # name -> (N, ...)
    localized = measured["iou"] >= IOU_THRESHOLD
    metrics = {
        "gt_known": localized.mean(),
        "top1": (localized & (ranks < 1)).mean(),
        "top5": (localized & (ranks < 5)).mean(),
        "mean_iou": measured["iou"].mean(),
        "pointing": measured["pointing"].mean(),
        "energy": measured["energy"].mean(),
    }
    if "ious" in measured:
        shares = (measured["ious"] >= IOU_THRESHOLD).mean(axis=0)  # at each threshold
        metrics |= {"max_box_acc": shares.max(), "threshold": BOX_THRESHOLDS[shares.argmax()]}
        metrics["pxap"] = average_precision(measured["inside"].sum(axis=0), measured["outside"].sum(axis=0))
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

    Args:
        positives: Number of pixels inside the boxes in each bin of the score, lowest bin first.
        negatives: The same for the pixels outside.
    """
    true, false = positives[::-1].cumsum(), negatives[::-1].cumsum()  # at or above each threshold, highest first
    return np.sum(true / np.maximum(true + false, 1) * positives[::-1]) / true[-1]
