"""What a run leaves in its output folder: heatmaps as training goes on, and the figures that sum them up.

img_S/image_test.png    test image S, enlarged
img_S/cmap_STEP.png     its class activation map, true class, after STEP steps, over the inverted image
img_S/evolution.png     some of these maps in one strip, with step and predicted class
history.csv             loss and accuracy on the training images since the line before; accuracy and localisation
                        (localization.py) on test images
predictions.csv         predicted class of each test image S at each step
accuracy.png            accuracy and localisation on test images against training images seen
checkpoint.weights.h5   state of the training after the last line of history.csv
"""

import csv
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import keras
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cam import class_activation_model, normalize, overlay, upsample
from localization import NAMES, evaluate

HISTORY, PREDICTIONS, ACCURACY, CHECKPOINT = "history.csv", "predictions.csv", "accuracy.png", "checkpoint.weights.h5"
PICTURE_SIDE = 400  # pixels, about: pictures are enlarged by a whole number
TEST_PART = 500  # test images to measure on during the run; at its end it is all of them
SHOWN = ("accuracy", "gt_known")  # measures on the progress bar and in accuracy.png
STRIP_LENGTH = 6  # maps in a strip


class Heatmaps(keras.callbacks.Callback):
    """Keras callback: every `every` steps, and after the first and last, measures, draws and saves the state.

    Args:
        folder: Path of the output folder.
        test: The test set: images (N, H, W, channels) uint8, labels (N,), and boxes (N, 4) or None.
        steps: Steps of the whole run.
        every: Steps between two heatmaps of an image.
        samples: Number of test images to draw, from the first.
        batch_size: Training images per step, for the column `images` of the history.
        first_step: Steps that earlier, interrupted runs have done.
    """

    def __init__(self, folder, test, steps, every, samples, batch_size, first_step=0):
        super().__init__()
        self.folder, self.test = folder, test
        self.steps, self.every, self.batch_size, self.first_step = steps, every, batch_size, first_step
        self.samples = test.images[:samples]  # (S, H, W, channels)
        self.sample_labels = test.labels[:samples]  # (S,)
        self.history = [row for row in read_rows(folder / HISTORY) if row["step"] <= first_step]
        self.predictions = [row for row in read_rows(folder / PREDICTIONS) if row["step"] <= first_step]

    def on_train_begin(self, logs=None):
        self.cam = class_activation_model(self.model)
        self.start = time.monotonic()
        if self.first_step == 0:
            for index, image in enumerate(self.samples):
                (self.folder / f"img_{index}").mkdir(parents=True, exist_ok=True)
                save_picture(enlarge(image[:, :, 0]), self.folder / f"img_{index}" / "image_test.png")
            self.record(0, {})

    def on_train_batch_end(self, batch, logs=None):
        step = self.first_step + batch + 1
        if step % self.every == 0 or step == self.steps:
            self.record(step, logs)

    def record(self, step, logs):
        """Measures, draws and saves; the state last, so that it never claims what is not there."""
        end = step == self.steps
        part = slice(None if end else TEST_PART)
        test = [None if values is None else values[part] for values in self.test]  # images, labels, boxes
        try:
            measures, _ = evaluate(self.cam, *test, thorough=end)
        except FloatingPointError:
            message = f"the training diverged before step {step:,}; try a smaller --learning-rate"
            raise FloatingPointError(message) from None
        scores, maps = self.cam.predict_on_batch(self.samples)  # S_c (S, C), M_c (S, H/4, W/4, C)
        self.draw(step, maps[np.arange(len(self.samples)), :, :, self.sample_labels])
        classes = scores.argmax(axis=1)  # (S,)
        self.predictions.append({"step": step} | {f"img_{index}": classes[index] for index in range(len(self.samples))})
        self.history.append(
            {
                "step": step,
                "images": step * self.batch_size,
                "loss": logs.get("loss", ""),
                "accuracy": logs.get("accuracy", ""),
                "test_images": len(test[0]),
            }
            | {f"test_{name}": value for name, value in measures.items()}
        )
        write_rows(self.folder / PREDICTIONS, self.predictions)
        write_rows(self.folder / HISTORY, self.history)
        with complete_file(self.folder / CHECKPOINT) as path:
            self.model.save_weights(path)
        self.model.reset_metrics()  # the next loss and accuracy are those of the steps in between
        logs |= {f"test_{name}": measures[name] for name in SHOWN if name in measures}  # for the progress bar
        if not sys.stdout.isatty() and step > self.first_step:
            left = (time.monotonic() - self.start) / (step - self.first_step) * (self.steps - step)
            shown = ", ".join(f"{NAMES[name]} {measures[name]:.1%}" for name in SHOWN if name in measures)
            print(f"step {step:,}: loss {logs['loss']:.3f}, test {shown}, {left:.0f} s left", flush=True)

    def draw(self, step, maps):
        """Draws the maps (S, H/4, W/4) of the samples' true classes."""
        heatmaps = normalize(upsample(maps, *self.samples.shape[1:3]))  # (S, H, W)

        def draw_one(index):
            picture = overlay(self.samples[index], heatmaps[index])
            save_picture(enlarge(picture), self.folder / f"img_{index}" / f"cmap_{step}.png")

        with ThreadPoolExecutor() as pool:  # zlib leaves the interpreter free
            list(pool.map(draw_one, range(len(heatmaps))))


def enlarge(picture):
    """Repeats each pixel, so that the longer side is about PICTURE_SIDE: (H, W, ...) -> (n H, n W, ...)."""
    times = max(1, round(PICTURE_SIDE / max(picture.shape[:2])))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def draw_evolution(folder, labels):
    """Draws `img_S/evolution.png` for each test image S from the pictures that the run left.

    Args:
        folder: Path of the output folder.
        labels: True classes of the images, (S,).
    """
    predictions = read_rows(folder / PREDICTIONS)
    # Most happens early: steps at about equal ratios, the first and the last among them.
    positions = np.unique(np.geomspace(1, len(predictions), STRIP_LENGTH).round().astype(int)) - 1
    rows = [predictions[position] for position in positions]
    for index, label in enumerate(labels):
        pictures = [("image_test.png", f"test image {index}: {label}", "black")]
        for row in rows:
            predicted = row[f"img_{index}"]
            color = "black" if predicted == label else "firebrick"
            pictures.append((f"cmap_{row['step']}.png", f"step {row['step']:,}: {predicted}", color))
        draw_strip(folder / f"img_{index}", pictures)


def draw_strip(folder, pictures):
    """Draws the pictures (file, title, color of the title) side by side as `folder`/evolution.png."""
    images = [Image.open(folder / name) for name, _, _ in pictures]
    width, height = images[0].size
    title, gap = 48, 8  # pixels
    strip = Image.new("RGB", (len(images) * (width + gap), title + height), "white")
    draw = ImageDraw.Draw(strip)
    for place, (image, (_, text, color)) in enumerate(zip(images, pictures, strict=True)):
        left = place * (width + gap)
        strip.paste(image, (left, title))
        font = ImageFont.load_default(size=min(28, width // 8))
        draw.text((left + width // 2, title // 2), text, color, font, anchor="mm")
    save_picture(np.asarray(strip), folder / "evolution.png")


def draw_accuracy(folder):
    """Draws `accuracy.png`: accuracy and localisation on test images against training images seen."""
    *history, last = read_rows(folder / HISTORY)
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120, layout="constrained")
    for name in SHOWN:
        column = f"test_{name}"
        if column in last:
            final = 100 * last[column]
            points = axes.plot(
                last["images"], final, "D", label=f"{NAMES[name]}, all {last['test_images']:,} images: {final:.2f}%"
            )
            if history:
                axes.plot(
                    [row["images"] for row in history],
                    [100 * row[column] for row in history],
                    ".-",
                    color=points[0].get_color(),
                    label=f"{NAMES[name]}, the first {history[0]['test_images']:,}",
                )
    axes.set(xlabel="training images seen", ylabel="share of test images (%)", ylim=(0, 100))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with complete_file(folder / ACCURACY) as path:
        figure.savefig(path)
    plt.close(figure)


def clear(folder):
    """Deletes what a run writes, and nothing else."""
    for directory in folder.glob("img_*"):
        if directory.name.removeprefix("img_").isdecimal():
            shutil.rmtree(directory)
    for name in (HISTORY, PREDICTIONS, ACCURACY, CHECKPOINT):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def complete_file(path):
    """Gives a path to write to; what is written there gets the name `path` at the end, or never."""
    part = path.with_name(f"part.{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_picture(picture, path):
    with complete_file(path) as part:
        Image.fromarray(picture).save(part, compress_level=1)  # level 6 takes three times as long for a tenth less


def read_rows(path):
    """Rows of a CSV file of numbers as dicts, an empty field as ""; no rows if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: json.loads(text or '""') for name, text in row.items()} for row in csv.DictReader(file)]


def write_rows(path, rows):
    with complete_file(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1].keys())
        writer.writeheader()
        writer.writerows(rows)
