"""out/index.html: the test images and their heatmaps through the training, in one page that needs nothing else."""

import base64
import json
from pathlib import Path

import matplotlib
import numpy as np

from cam import bounding_box, normalize, upsample

TEMPLATE = Path(__file__).with_name("page.html")
MOST_STEPS = 100  # on the slider; of a longer run, as many at even distances


def draw_page(path, images, labels, boxes, names, history, predictions, maps, measures):
    """Writes the page.

    Args:
        path: File to write.
        images: S test images, (S, H, W, 1 or 3) uint8.
        labels: Their true classes, (S,).
        boxes: Their true boxes, (S, 4), or None.
        names: Names of the classes.
        history: A dict per step: "step", "images", and the `measures` of all test images, with "test_" before.
        predictions: Predicted classes at these steps, (T, S).
        maps: Function from a step to the maps of the true classes, (S, h, w).
        measures: Titles of the measures to show, by name.
    """
    chosen = np.unique(np.linspace(0, len(history) - 1, min(len(history), MOST_STEPS)).round().astype(int))
    steps, shades = [], []
    for position in chosen:
        row = history[position]
        step_maps = maps(row["step"])  # (S, h, w)
        found = [bounding_box(class_map) for class_map in np.asarray(upsample(step_maps, *images.shape[1:3]))]
        values = {name: row.get(f"test_{name}", "") for name in measures}
        steps.append(
            {
                "step": row["step"],
                "images": row["images"],
                "predicted": [int(label) for label in predictions[position]],
                "boxes": [box and [int(edge) for edge in box] for box in found],
            }
            | {name: None if value == "" else value for name, value in values.items()}
        )
        shades.append(np.rint(255 * normalize(step_maps)).astype(np.uint8))
    samples = [
        {"label": int(label), "box": None if boxes is None else boxes[index].tolist()}
        for index, label in enumerate(labels)
    ]
    colors = np.rint(255 * matplotlib.colormaps["jet"](np.linspace(0, 1, 256))[:, :3]).astype(np.uint8)
    run = {
        "width": images.shape[2],
        "height": images.shape[1],
        "cells_wide": step_maps.shape[2],
        "cells_high": step_maps.shape[1],
        "channels": images.shape[3],
        "measures": measures,
        "classes": names,
        "steps": steps,
        "samples": samples,
        "pictures": text(images),
        "maps": text(np.stack(shades)),
        "colors": text(colors),
    }
    run = json.dumps(run, allow_nan=False).replace("</", "<\\/")  # no name of a class can end the script
    path.write_text(TEMPLATE.read_text().replace("/*RUN*/null", run))


def text(array):
    """The bytes of an array in base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
