"""The pages of a run, each one self-contained file: index.html to browse it, draw.html to draw a digit of one's own."""

import base64
import json
import time
from pathlib import Path

import matplotlib
import numpy as np
from keras import ops

from cam import bounding_box, normalize, upsample
from experiment.figures import batches, top_classes
from experiment.files import atomic_write
from experiment.metrics import METRIC_TITLES, SHOWN_METRICS
from experiment.units import get_softmax_weights, largest_terms, unit_model

MAX_STEPS = 100  # on the slider, about; of a longer run every second, fourth, eighth ... evaluation
HERE = Path(__file__).parent
MAX_SHARE = 0.02  # of a run's time for its page
COLORMAPS = ("jet", "viridis")


class Page:
    """out/index.html: the test images and their heatmaps through the training.

    It is renewed while the run goes on, and an open page follows.

    Args:
        out: Folder of the run; the maps of the samples are read from maps/STEP.npy.
        samples: The test images that heatmaps are drawn of, as a `Split`.
        class_names: Names of the C classes.
    """

    def __init__(self, out, samples, class_names):
        self.out, self.samples, self.class_names = out, samples, class_names
        self.steps = {}  # what the page holds of each step
        self.cam_model = self.unit_model = None
        self.last_renewal = self.next_renewal = 0  # seconds, of time.monotonic()

    def renew(self, cam_model, history, finished=False):
        """Writes the page, unless that would take more than 2% of the time.

        Args:
            cam_model: Model made by `class_activation_model`, for the maps of all classes after the last step.
            history: `RunFolder.history`.
            finished: Whether the run is complete. Then the page is written in any case, and does not wait for more.
        """
        start = time.monotonic()
        if start < self.next_renewal and not finished:
            return
        if cam_model is not self.cam_model:
            self.cam_model, self.unit_model = cam_model, unit_model(cam_model)
        history = [row for row in history if self.map_file(row["step"]).exists()]
        stride = 1
        while len(history) > stride * MAX_STEPS:
            stride *= 2
        shown = {row["step"]: row for row in [*history[:-1:stride], history[-1]]}
        self.steps = {step: self.steps.get(step) or self.describe(row) for step, row in shown.items()}
        images, labels, boxes = self.samples
        last = self.describe_last()
        interval = (time.monotonic() - start) / MAX_SHARE  # to the next renewal, about
        if self.last_renewal:
            interval = max(interval, start - self.last_renewal)
        fill_in(
            self.out / "index.html",
            shape=images.shape[1:],  # H, W, channels
            map_shape=np.load(self.map_file(history[-1]["step"])).shape[1:],  # h, w
            metrics={name: METRIC_TITLES[name] for name in SHOWN_METRICS},
            classes=self.class_names,
            labels=labels.tolist(),
            boxes=None if boxes is None else [np.reshape(of_image, (-1, 4)).tolist() for of_image in boxes],
            images=to_base64(images),
            steps=list(self.steps.values()),
            last=last,
            draw=(self.out / "draw.html").exists(),
            running=None if finished else {"written": time.time(), "interval": interval},  # seconds
        )
        self.last_renewal, self.next_renewal = start, start + (time.monotonic() - start) / MAX_SHARE

    def map_file(self, step):
        """The file with M_c of the samples for their true classes, (S, h, w)."""
        return self.out / "maps" / f"{step}.npy"

    def describe(self, row):
        """A row of the history with the heatmaps and boxes of the samples."""
        maps = np.load(self.map_file(row["step"]))
        boxes = [bounding_box(class_map) for class_map in upsample(maps, *self.samples.images.shape[1:3])]
        step = {name: row[name] for name in ("step", "images", "predicted")} | {"boxes": boxes}
        step |= {name: row.get(f"test_{name}") for name in SHOWN_METRICS}
        return step | {"heatmaps": to_base64(np.rint(255 * normalize(maps)).astype(np.uint8))}  # (S, h, w)

    def describe_last(self):
        """Of each sample, the maps of all classes (of many, the top ten) and the terms of equation (2)."""
        softmax_weights, described = get_softmax_weights(self.cam_model), []
        for batch in batches(len(self.samples.labels)):
            outputs = map(ops.convert_to_numpy, self.unit_model(self.samples.images[batch], training=False))
            for label, feature_maps, pooled, logits, maps in zip(self.samples.labels[batch], *outputs, strict=True):
                shown = top_classes(logits)
                terms = largest_terms(feature_maps, pooled, softmax_weights[:, label])
                described.append(
                    {
                        "classes": shown.tolist(),
                        "scores": logits[shown].tolist(),
                        "maps": encode_maps(maps[:, :, shown]),
                        "units": terms.units.tolist(),
                        "weights": terms.weights.tolist(),
                        "parts": terms.parts.tolist(),
                        "terms": encode_maps(np.dstack([terms.maps, terms.maps.sum(axis=2)])),
                    }
                )
        return described


def write_draw_page(out, model, samples, step):
    """Writes out/draw.html, in which the network itself runs, at the steps whose weights the run has kept.

    Args:
        out: Folder of the run; the weights are read from weights/STEP.npz.
        model: The network, made by `lenet`.
        samples: Some test images, as a `Split`. The first of each class is in the page.
        step: The last step, which the weights of `model` are of.
    """
    layers = [model.get_layer(name) for name in ("conv1", "conv2", "softmax_weights")]
    names = {weight.path: list(weight.shape) for layer in layers for weight in layer.weights}
    kept = {step: {weight.path: ops.convert_to_numpy(weight) for layer in layers for weight in layer.weights}}
    for path in (out / "weights").glob("*.npz"):
        if path.stem.isdecimal() and int(path.stem) < step:
            with np.load(path) as weights:
                kept[int(path.stem)] = dict(weights)
    steps = [
        {"step": step, "weights": to_base64(np.concatenate([kept[step][name].ravel() for name in names]))}
        for step in sorted(kept)
    ]
    first_of_class = np.unique(samples.labels, return_index=True)[1]
    height, width = samples.images.shape[1:3]
    fill_in(
        out / "draw.html",
        shape=(height, width),
        map_shape=(-(-height // 4), -(-width // 4)),
        classes=[str(digit) for digit in range(model.output_shape[-1])],
        pooling="average" if any(layer.name == "gap" for layer in model.layers) else "max",
        weights=names,
        steps=steps,
        examples=[to_base64(image) for image in samples.images[np.sort(first_of_class)]],
    )


def encode_maps(maps):
    """Maps (h, w, n) as bytes: 127.5 is zero, and 0 or 255 is the limit, their largest absolute value."""
    limit = max(float(np.abs(maps).max()), float(np.finfo(np.float32).tiny))
    return {
        "limit": limit,
        "maps": to_base64(np.rint(127.5 + 127.5 * maps / limit).astype(np.uint8).transpose(2, 0, 1)),
    }


def to_base64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def fill_in(path, **run):
    """Writes the page `path` from the template of that name, with the data that it shows, and what both pages use."""
    colors = {name: matplotlib.colormaps[name](np.linspace(0, 1, 256), bytes=True)[:, :3] for name in COLORMAPS}
    run["colors"] = {name: to_base64(table) for name, table in colors.items()}
    data = json.dumps(run, allow_nan=False).replace("<", "\\u003c")  # so that no class name is taken for a tag
    page = (HERE / path.name).read_text(encoding="utf-8")
    page = page.replace("/*HEATMAPS*/", (HERE / "heatmaps.js").read_text(encoding="utf-8")).replace("/*RUN*/null", data)
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8")
