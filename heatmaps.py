"""What a run leaves in its output folder: heatmaps as training goes on, and the figures that sum them up.

img_S/image_test.png    test image S, enlarged
img_S/cmap_STEP.png     its class activation map, true class, after STEP steps, over the inverted image
img_S/evolution.png     some of these maps in one strip, with step and predicted class
img_S/classes.png       at the end, the maps of all classes (of many, the first ten) on one scale, with logits S_c
overview.png            for each class one image, and its maps through the steps
index.html              all of this to browse (page.py)
history.csv             loss and accuracy on the training images since the line before; accuracy and localisation
                        (localization.py) on test images
predictions.csv         predicted class of each test image S at each step
accuracy.png            accuracy and localisation on test images against training images seen
maps/STEP.npy           the maps in cmap_STEP.png as they are, (S, H/4, W/4) float32
"""

import csv
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import keras
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cam import normalize, overlay, upsample
from files import complete_file
from localization import BATCH, NAMES, evaluate, predict
from page import draw_page

HISTORY, PREDICTIONS, ACCURACY = "history.csv", "predictions.csv", "accuracy.png"
PICTURE_SIDE = 400  # pixels, about: pictures are enlarged by a whole number
TEST_PART = 300  # test images to measure on during the run; at its end it is all of them
SHOWN = ("accuracy", "gt_known")  # measures on the progress bar and in accuracy.png
STRIP_LENGTH = 6  # maps in a strip
MOST_CLASSES = 10  # in classes.png
OVERVIEW, PAGE, MAPS = "overview.png", "index.html", "maps"


class Heatmaps(keras.callbacks.Callback):
    """Keras callback: every `every` steps, and after the first and last, measures, draws and saves the state.

    Args:
        folder: Path of the output folder.
        cam: Model made by `class_activation_model` from the one that trains.
        test: The test set: images (N, H, W, 1 or 3) uint8, labels (N,), and boxes (N, 4) or None.
        steps: Steps of the whole run.
        every: Steps between two heatmaps of an image.
        samples: Number of test images to draw, from the first.
        batch_size: Training images per step, for the column `images` of the history.
        state: The `State` of the run, a callback that comes before this one.
    """

    def __init__(self, folder, cam, test, steps, every, samples, batch_size, state):
        super().__init__()
        self.folder, self.cam, self.test = folder, cam, test
        self.steps, self.every, self.batch_size, self.state = steps, every, batch_size, state
        self.first_step = state.step
        self.samples = test.images[:samples]  # (S, H, W, channels)
        self.sample_labels = test.labels[:samples]  # (S,)
        # What came after the saved state comes again.
        self.history = [row for row in read_rows(folder / HISTORY) if row["step"] <= self.first_step > 0]
        self.predictions = [row for row in read_rows(folder / PREDICTIONS) if row["step"] <= self.first_step > 0]

    def on_train_begin(self, logs=None):
        self.start = time.monotonic()
        if self.first_step == 0:
            for index, image in enumerate(self.samples):
                (self.folder / f"img_{index}").mkdir(parents=True, exist_ok=True)
                save_picture(enlarge(as_picture(image)), self.folder / f"img_{index}" / "image_test.png")
            (self.folder / MAPS).mkdir(exist_ok=True)
            self.record(0, {})

    def on_train_batch_end(self, batch, logs=None):
        step = self.state.step
        if step % self.every == 0 or step == self.steps:
            self.record(step, logs)

    def record(self, step, logs):
        """Measures, draws and saves; the state last, so that it never claims what is not there."""
        end = step == self.steps
        part = slice(None if end else TEST_PART)
        test = [None if values is None else values[part] for values in self.test]  # images, labels, boxes
        try:
            measures = evaluate(self.cam, *test, thorough=end)
        except FloatingPointError:
            message = f"the training diverged before step {step:,}; try a smaller --learning-rate"
            raise FloatingPointError(message) from None
        parts = [
            (scores.argmax(axis=1), maps[np.arange(len(maps)), :, :, self.sample_labels[part]])
            for part, scores, maps in predict(self.cam, self.samples)
        ]
        classes, maps = map(np.concatenate, zip(*parts, strict=True))  # (S,), (S, H/4, W/4)
        self.draw(step, maps)
        with complete_file(self.folder / MAPS / f"{step}.npy") as path:
            np.save(path, maps)
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
        self.model.reset_metrics()  # the next loss and accuracy are those of the steps in between
        self.state.save()
        logs |= {f"test_{name}": measures[name] for name in SHOWN if name in measures}  # for the progress bar
        if not sys.stdout.isatty() and step > self.first_step:
            left = (time.monotonic() - self.start) / (step - self.first_step) * (self.steps - step)
            shown = ", ".join(f"{NAMES[name]} {measures[name]:.1%}" for name in SHOWN if name in measures)
            print(f"step {step:,}: loss {logs['loss']:.3f}, test {shown}, {left:.0f} s left", flush=True)

    def draw(self, step, maps):
        """Draws the maps (S, H/4, W/4) of the samples' true classes."""
        heatmaps = normalize(upsample(maps, *self.samples.shape[1:3]))  # (S, H, W)

        def draw_one(index):
            picture = lay_over(self.samples[index], heatmaps[index])
            save_picture(enlarge(picture), self.folder / f"img_{index}" / f"cmap_{step}.png")

        with ThreadPoolExecutor() as pool:  # zlib leaves the interpreter free
            list(pool.map(draw_one, range(len(heatmaps))))


def as_picture(image):
    """(H, W, 1) -> (H, W); (H, W, 3) as it is."""
    return image[:, :, 0] if image.shape[2] == 1 else image


def lay_over(image, heatmap):
    """Lays a heatmap over an image; a grey one is inverted, as in the original, so that its black does not darken."""
    return overlay(image, heatmap, invert=image.shape[2] == 1)


def enlarge(picture, side=PICTURE_SIDE):
    """Repeats each pixel, so that the longer side has about `side`: (H, W, ...) -> (n H, n W, ...)."""
    times = max(1, round(side / max(picture.shape[:2])))
    return picture.repeat(times, axis=1).repeat(times, axis=0)  # the rows last, as they lie in one piece


def draw_figures(folder, cam, test, names, samples):
    """Draws all that sums up a run, from what it left.

    Args:
        folder: Path of the output folder.
        cam: Model made by `class_activation_model` from the trained model.
        test: The test set, as for `Heatmaps`.
        names: Names of the C classes.
        samples: Number of test images that were drawn.
    """
    images, labels, boxes = (None if values is None else values[:samples] for values in test)
    history, predictions = read_rows(folder / HISTORY), read_rows(folder / PREDICTIONS)
    draw_accuracy(folder, history)
    # Most happens early: steps at about equal ratios, the first and the last among them.
    positions = np.unique(np.geomspace(1, len(predictions), STRIP_LENGTH).round().astype(int)) - 1
    rows = [predictions[position] for position in positions]
    strips = [strip(folder, index, label, rows, names) for index, label in enumerate(labels)]
    for index, row in enumerate(strips):
        draw_grid(folder / f"img_{index}" / "evolution.png", [row])
    draw_grid(
        folder / OVERVIEW, [strips[index] for index in np.unique(labels, return_index=True)[1]], PICTURE_SIDE // 2
    )
    draw_classes(folder, cam, images, labels, names)
    predicted = [[row[f"img_{index}"] for index in range(len(labels))] for row in predictions]
    with complete_file(folder / PAGE) as path:
        draw_page(
            path,
            images,
            labels,
            boxes,
            names,
            history,
            predicted,
            maps=lambda step: np.load(folder / MAPS / f"{step}.npy"),
            measures={name: NAMES[name] for name in SHOWN},
        )


def strip(folder, index, label, rows, names):
    """Pictures of test image `index`, for `draw_grid`: itself, and its maps at some steps."""
    pictures = [(folder / f"img_{index}" / "image_test.png", f"test image {index}: {names[label]}", "black")]
    for row in rows:
        predicted = row[f"img_{index}"]
        color = "black" if predicted == label else "firebrick"
        path = folder / f"img_{index}" / f"cmap_{row['step']}.png"
        pictures.append((path, f"step {row['step']:,}: {names[predicted]}", color))
    return pictures


def draw_classes(folder, cam, images, labels, names):
    """Draws `img_S/classes.png` of each image: the maps of all classes on one scale, with their logits S_c.

    Of many classes those with the highest logits are shown.
    """
    all_scores, all_maps = cam.predict(images, batch_size=BATCH, verbose=0)  # S_c (S, C), M_c (S, h, w, C)
    side = PICTURE_SIDE // 2
    for index, (image, true, scores) in enumerate(zip(images, labels, all_scores, strict=True)):
        shown = np.argsort(-scores)[:MOST_CLASSES]
        if len(scores) <= MOST_CLASSES:
            shown.sort()
        maps = all_maps[index : index + 1, :, :, shown]  # (1, h, w, K)
        low, high = maps.min(), maps.max()
        large = np.asarray(upsample(maps, *image.shape[:2]))[0]  # (H, W, K)
        scaled = ((large - low) / max(high - low, np.finfo(np.float32).tiny)).clip(0, 1)
        pictures = [(enlarge(as_picture(image), side), f"test image {index}: {names[true]}", "black")]
        for place, label in enumerate(shown):
            color = "black" if scores[label] < scores.max() else "seagreen" if label == true else "firebrick"
            picture = enlarge(lay_over(image, scaled[:, :, place]), side)
            pictures.append((picture, f"{names[label]}: S = {scores[label]:z.1f}", color))
        pictures.append((color_scale(low, high, *pictures[0][0].shape[:2]), "scale", "black"))
        draw_grid(folder / f"img_{index}" / "classes.png", list(filter(None, [pictures[:6], pictures[6:]])))


def color_scale(low, high, height, width):
    """A picture of the colormap from the lowest value of the maps, below, to the highest."""
    bar = overlay(np.full((height, 1), 255, np.uint8), np.linspace(1, 0, height)[:, None], opacity=1)  # (height, 1, 3)
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[:, : width // 4] = bar
    picture = Image.fromarray(picture)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(8, width // 8))
    for share, value in ((0.08, high), (0.5, (low + high) / 2), (0.92, low)):
        draw.text((width * 0.3, height * share), f"{value:.1f}", "black", font, anchor="lm")
    return np.asarray(picture)


def draw_grid(path, rows, side=None):
    """Draws rows of pictures.

    Args:
        path: File to write.
        rows: Lists of (picture, title, color of the title); a picture is a path or an array.
        side: Pixels of a picture's longer side in the grid; None for as it is.
    """
    rows = [
        [(Image.fromarray(p) if isinstance(p, np.ndarray) else Image.open(p), text, color) for p, text, color in row]
        for row in rows
    ]
    width, height = rows[0][0][0].size
    if side:
        width, height = (round(length * side / max(width, height)) for length in (width, height))
    size = min(28, width // 8)
    longest = max(ImageFont.load_default(size).getlength(text) for row in rows for _, text, _ in row)
    font = ImageFont.load_default(size=min(size, 0.95 * size * width / longest))
    title, gap = 2 * size, 8  # pixels
    grid = Image.new("RGB", (max(map(len, rows)) * (width + gap), len(rows) * (title + height)), "white")
    draw = ImageDraw.Draw(grid)
    for top, row in zip(range(0, grid.height, title + height), rows, strict=True):
        for left, (image, text, color) in zip(range(0, grid.width, width + gap), row, strict=False):
            grid.paste(image.resize((width, height), Image.Resampling.BOX), (left, top + title))
            draw.text((left + width // 2, top + title // 2), text, color, font, anchor="mm")
    save_picture(np.asarray(grid), path)


def draw_accuracy(folder, history):
    """Draws `accuracy.png`: accuracy and localisation on test images against training images seen."""
    *history, last = history
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
    axes.locator_params(axis="x", nbins=5)  # so that millions do not run into each other
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
    shutil.rmtree(folder / MAPS, ignore_errors=True)
    for name in (HISTORY, PREDICTIONS, ACCURACY, OVERVIEW, PAGE):
        (folder / name).unlink(missing_ok=True)


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
