"""The pages of a run: index.html, a viewer of its files, and draw.html, to draw a digit of your own."""

import base64
import json
from pathlib import Path

import matplotlib
import numpy as np

from experiment.files import atomic_write
from experiment.metrics import METRIC_TITLES, SHOWN_METRICS

HERE = Path(__file__).parent
PAGES = ("index.html", "run.js", "draw.html")
COLORMAPS = ("jet", "viridis")  # of draw.html


def write_page(out):
    """Writes out/index.html, which shows what out/run.js says and the images in out/img_S; it needs no server."""
    with atomic_write(out / "index.html") as part:
        part.write_bytes((HERE / "index.html").read_bytes())


def write_run_js(out, samples, history, finished):
    """Writes out/run.js: a script, since a page that was opened from disk cannot read a JSON file.

    `samples` and `history` are those of `RunFolder`; once the run is `finished`, an open page does not look again.
    """
    steps = []
    for row in history:
        step = {name: row[name] for name in ("step", "images", "predicted", "boxes")}
        steps.append(step | {name: row.get(f"test_{name}") for name in SHOWN_METRICS})
    metrics = {name: METRIC_TITLES[name] for name in SHOWN_METRICS}
    draw = (out / "draw.html").exists()
    run = samples | {"metrics": metrics, "steps": steps, "draw": draw, "finished": finished}
    with atomic_write(out / "run.js") as part:
        part.write_text(f"run = {json.dumps(run, allow_nan=False)};\n", encoding="utf-8")


def write_draw_page(out, model, samples):
    """Writes out/draw.html, in which the network itself runs, at the steps whose weights the run has kept.

    The page has the first of the samples of each class.
    """
    layers = [model.get_layer(name) for name in ("conv1", "conv2", "softmax_weights")]
    shapes = {weight.path: list(weight.shape) for layer in layers for weight in layer.weights}
    steps = []
    for path in sorted((out / "weights").glob("[0-9]*.npz"), key=lambda path: int(path.stem)):
        with np.load(path) as kept:
            weights = np.concatenate([kept[name].ravel() for name in shapes]).astype("<f2")  # half precision
        steps.append({"step": int(path.stem), "weights": to_base64(weights)})
    first_of_class = np.unique(samples.labels, return_index=True)[1]
    height, width = samples.images.shape[1:3]
    colors = {name: matplotlib.colormaps[name](np.linspace(0, 1, 256), bytes=True)[:, :3] for name in COLORMAPS}
    run = {
        "shape": (height, width),
        "map_shape": (-(-height // 4), -(-width // 4)),
        "classes": [str(digit) for digit in range(model.output_shape[-1])],
        "pooling": "average" if any(layer.name == "gap" for layer in model.layers) else "max",
        "weights": shapes,
        "steps": steps,
        "examples": [to_base64(image) for image in samples.images[np.sort(first_of_class)]],
        "colors": {name: to_base64(table) for name, table in colors.items()},
    }
    page = (HERE / "draw.html").read_text(encoding="utf-8")
    with atomic_write(out / "draw.html") as part:
        part.write_text(page.replace("/*RUN*/null", json.dumps(run, allow_nan=False)), encoding="utf-8")


def to_base64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
