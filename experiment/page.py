"""out/index.html: the test images and their heatmaps through the training, in one self-contained page."""

import base64
import json
from pathlib import Path

import matplotlib
import numpy as np

from cam import bounding_box, normalize, upsample
from experiment.files import atomic_write
from experiment.metrics import METRIC_TITLES, SHOWN_METRICS

TEMPLATE = Path(__file__).with_name("page.html")
MAX_STEPS = 100  # on the slider; of a longer run, as many at even distances


def write_page(out, samples, class_names, history):
    """Writes the page; the arguments are those of `figures.save_figures`. Reads the maps from `out/maps/STEP.npy`."""
    images, labels, boxes = samples
    positions = np.linspace(0, len(history) - 1, min(len(history), MAX_STEPS)).round().astype(int)
    steps, heatmaps = [], []
    for row in [history[position] for position in positions]:
        maps = np.load(out / "maps" / f"{row['step']}.npy")  # of the true classes: (S, h, w)
        found = [bounding_box(class_map) for class_map in upsample(maps, *images.shape[1:3])]
        step = {name: row[name] for name in ("step", "images", "predicted")} | {"boxes": found}
        steps.append(step | {name: row.get(f"test_{name}") for name in SHOWN_METRICS})
        heatmaps.append(np.rint(255 * normalize(maps)).astype(np.uint8))
    colors = np.rint(255 * matplotlib.colormaps["jet"](np.linspace(0, 1, 256))[:, :3]).astype(np.uint8)
    run = {
        "shape": images.shape[1:],  # H, W, channels
        "map_shape": maps.shape[1:],  # h, w
        "metrics": {name: METRIC_TITLES[name] for name in SHOWN_METRICS},
        "classes": class_names,
        "steps": steps,
        "labels": labels.tolist(),
        "boxes": None if boxes is None else boxes.tolist(),
        "images": to_base64(images),
        "heatmaps": to_base64(np.stack(heatmaps)),
        "colors": to_base64(colors),
    }
    run = json.dumps(run, allow_nan=False).replace("</", "<\\/")  # no class name can end the script
    with atomic_write(out / "index.html") as part:
        part.write_text(TEMPLATE.read_text(encoding="utf-8").replace("/*RUN*/null", run), encoding="utf-8")


def to_base64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
