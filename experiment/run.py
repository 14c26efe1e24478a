"""The output folder of a training run. A run resumes after any kill, on a CPU bit for bit."""

import contextlib
import csv
import itertools
import json
import shutil
import sys
import time

import keras
import numpy as np
from tqdm import tqdm

from experiment.checkpoint import CHECKPOINT, PREVIOUS, Checkpoint
from experiment.distribution import process_index, share_run
from experiment.figures import FIGURES, SAMPLE_FIGURES, geometric_indices, save_accuracy
from experiment.files import PART, UserError, acquire_lock, atomic_write, checksum
from experiment.metrics import METRIC_TITLES, SHOWN_METRICS, format_metrics
from experiment.networks import class_names_file, save_network
from experiment.pages import PAGES, write_page, write_run_js
from experiment.preprocessing import preprocessing_file
from experiment.process import START

SETTINGS, HISTORY, WEIGHTS, LOCK = "settings.json", "history.csv", "weights", "lock"
LAST = "accuracy.png"  # the last file of a run
NOT_COMPARED = ("out", "fresh", "epochs", "evaluate", "data")  # what a run computes does not depend on these


class RunFolder:
    """The output folder of a run.

    settings.json             settings of the run, and a checksum of its data; it is not resumed with others
    checkpoint.npz            weights, optimizer state and history, see `Checkpoint`
    checkpoint.previous.npz   the checkpoint before
    history.csv               a row per evaluation, see `history`
    weights/STEP.npz          the model's weights at some steps, float32 by name
    index.html, run.js        the page, and what it shows
    lock                      number of the process that uses the folder

    Args:
        settings: Namespace of the settings: out, fresh, steps, eval_every, batch_size, and others.
        model: The compiled model to train. Its weights are restored from the checkpoint, if there is one.
        data: The training and the test data, tuples of arrays or lists. A run is not resumed on others.
        keep_weights: Number of steps whose weights are kept, among them the first and the last; most of them early.

    Attributes:
        history: A dict per evaluation: step, images (seen in training), loss, accuracy, test_images, test_... for each
            metric, predicted (the predicted class of each sample) and boxes (the box of each sample, or None).
        finished: Whether the run is complete.
    """

    def __init__(self, settings, model, data, keep_weights=0):
        self.settings, self.model = settings, model
        self.step, self.history, self.losses = -1, [], []  # losses: loss and accuracy of each batch since the last row
        if process_index() == 0:
            self.open(data)
        # Of several processes, the others have a folder of their own, which begins with these files of the first one.
        share_run(settings, (SETTINGS, CHECKPOINT, PREVIOUS, f"{model.name}.keras", LAST))
        if process_index() > 0:
            self.open(data)
        due = [*range(0, settings.steps, settings.eval_every), settings.steps]
        self.kept = {due[index] for index in geometric_indices(len(due), keep_weights)}
        self.checkpoint = Checkpoint(self.out, model)
        if progress := self.checkpoint.restore():
            self.step, self.history = progress["step"], progress["history"]
        self.finished = self.step == settings.steps and self.model_file.exists() and (self.out / LAST).exists()
        if self.finished:
            print(f"{self.out} already holds this finished run; --fresh deletes it and starts over")
        elif progress:
            print(f"resuming after step {self.step:,}", flush=True)

    def open(self, data):
        """Locks the folder, empties it with --fresh, and compares the settings with those of the run that it holds."""
        self.out, self.model_file = self.settings.out, self.settings.out / f"{self.model.name}.keras"
        self.lock = lock_run_folder(self.out)
        if self.settings.fresh:
            self.clear()
        check_settings(self.out, vars(self.settings), data)

    def clear(self):
        """Deletes what a run writes, and nothing else: checkpoints first and settings last, in case of a kill."""
        beside = (class_names_file(self.model_file), preprocessing_file(self.model_file), self.model_file)
        names = [PREVIOUS, CHECKPOINT, HISTORY, LAST, *FIGURES, *PAGES, *(path.name for path in beside)]
        names += [f"{WEIGHTS}/[0-9]*.npz", *(f"img_[0-9]*/{name}" for name in SAMPLE_FIGURES)]
        for pattern in (*names, SETTINGS):
            for path in self.out.glob(pattern):
                path.unlink()
        for folder in (self.out / WEIGHTS, *self.out.glob("img_[0-9]*")):
            with contextlib.suppress(OSError):  # it is missing, or has other files
                folder.rmdir()

    def open_page(self, samples, class_names):
        """Writes the page of the run; `samples` is the `Split` of the first test images."""
        boxes = [] if samples.boxes is None else samples.boxes
        boxes = [[] if box is None else np.reshape(box, (-1, 4)).tolist() for box in boxes]
        self.samples = {"classes": class_names, "labels": samples.labels.tolist(), "boxes": boxes}
        self.samples["sizes"] = [image.shape[:2] for image in samples.images]
        write_page(self.out)
        write_run_js(self.out, self.samples, self.history, finished=False)
        print(f"follow the run in {self.out / 'index.html'}", flush=True)

    def steps(self):
        """Yields the steps that are still to do, from 0, at which the untrained model is evaluated, to the last.

        Shows the progress. A run that is stopped, in whatever way, resumes after its last evaluation.
        """
        self.first, self.started, last = self.step + 1, time.monotonic(), self.settings.steps
        columns, rows = shutil.get_terminal_size()  # 80 x 24 where the terminal says 0 x 0: tqdm would show nothing
        size = {"ncols": columns, "nrows": rows}
        bar = tqdm(desc="training", total=last, initial=max(self.step, 0), unit=" steps", disable=None, **size)
        with bar as self.bar:
            for step in range(self.first, last + 1):
                self.step = step
                bar.update(step > 0)
                if step == last:
                    bar.close()  # the final evaluation has a bar of its own
                yield step

    def is_due(self, step):
        """Whether a step is to be evaluated: every `eval_every` steps, the first and the last."""
        return step % self.settings.eval_every == 0 or step == self.settings.steps

    def add_loss(self, loss, accuracy):
        """Adds the loss and accuracy of a training batch. A loss that is not finite raises a UserError."""
        if not np.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.step:,}; try --fresh and a smaller --learning-rate")
        self.losses.append((float(loss), float(accuracy)))

    def record(self, metrics, test_images, predicted, boxes):
        """Records an evaluation: metrics on so many test images, and predicted class and box of each sample.

        The checkpoint is saved last, so it never claims what is not on disk.
        """
        if self.step in self.kept:
            (self.out / WEIGHTS).mkdir(exist_ok=True)
            with atomic_write(self.out / WEIGHTS / f"{self.step}.npz") as part, part.open("wb") as file:
                np.savez(file, **{weight.path: np.asarray(weight) for weight in self.model.weights})
        loss, accuracy = np.mean(self.losses, axis=0).tolist() if self.losses else ("", "")
        row = {"step": self.step, "images": self.step * self.settings.batch_size, "loss": loss, "accuracy": accuracy}
        row |= {"test_images": test_images} | {f"test_{name}": value for name, value in metrics.items()}
        self.history.append(row | {"predicted": [int(label) for label in predicted], "boxes": boxes})
        self.losses = []
        with atomic_write(self.out / HISTORY) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, row, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.history)
        write_run_js(self.out, self.samples, self.history, finished=False)
        self.checkpoint.save({"step": self.step, "history": self.history})
        self.report(loss, metrics)

    def report(self, loss, metrics):
        """Shows metrics on test images, and the training loss, in the progress bar; without a terminal on a line."""
        shown = [f"{METRIC_TITLES[name]} {metrics[name]:.1%}" for name in SHOWN_METRICS if name in metrics]
        self.bar.set_postfix_str(f"test {', '.join(shown)}", refresh=False)
        if not sys.stdout.isatty() and self.step > 0:
            seconds = (time.monotonic() - self.started) / (self.step - self.first + 1)
            left = seconds * (self.settings.steps - self.step)
            print(f"step {self.step:,}: loss {loss:.3f}, test {', '.join(shown)}, {left:.0f} s left", flush=True)

    def save_model(self, model, class_names, preprocessing):
        """Saves the trained model, before the figures, so that nothing that fails there can lose it."""
        (self.out / LAST).unlink(missing_ok=True)
        save_network(model, class_names, preprocessing, self.model_file)

    def finish(self):
        """Plots the history, which marks the run as complete, and prints the results."""
        write_run_js(self.out, self.samples, self.history, finished=True)
        save_accuracy(self.out / LAST, self.history)
        last = self.history[-1]
        metrics = {name: last[f"test_{name}"] for name in METRIC_TITLES if f"test_{name}" in last}
        print(format_metrics(metrics, last["test_images"]))
        print(f"{time.monotonic() - START:.0f} s {'since the run was resumed' if self.first > 0 else 'in all'}")
        print(f"open {self.out / 'index.html'}, or look at {self.out / 'overview.png'}")


def lock_run_folder(out):
    """Makes and locks the folder `out`; deletes the partial files of a killed run. Returns the open lock file."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(out / LOCK)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); give another folder") from None
    own = ("lock", "cam_*", "boxes.csv", "confusion.png", "features-*.bin", ".*")  # of show.py, --evaluate, this script
    files = [path for path in sorted(out.iterdir()) if path.is_file() and not any(map(path.match, own))]
    if files and not (out / SETTINGS).exists():
        raise UserError(f"--out {out} has other files, such as {files[0].name}; give an empty folder or a new one")
    for folder in (".", WEIGHTS, "img_[0-9]*"):
        for part in out.glob(f"{folder}/{PART}*"):
            part.unlink()
    return lock


def check_settings(out, settings, data):
    """Writes the settings of a new run, or compares them with those of the run that the folder holds."""
    own = {"KERAS_BACKEND": keras.backend.backend()}  # the first to be compared, for the precision may follow from it
    own |= {name: str(value) for name, value in settings.items() if name not in NOT_COMPARED}
    own["data_checksum"] = str(checksum(itertools.chain(*data)))
    own["steps"] = own.pop("steps")  # the last, for it may follow from the number of images
    if not (out / SETTINGS).exists():
        with atomic_write(out / SETTINGS) as part:
            part.write_text(json.dumps(own, indent=1))
        return
    try:
        earlier = dict(json.loads((out / SETTINGS).read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{out / SETTINGS} is damaged; start over with --fresh") from None
    if earlier.keys() != own.keys():
        raise UserError(f"{out} holds a run of another script or version; use --fresh, or give another --out")
    for name, value in own.items():
        if value == earlier[name]:
            continue
        changed = {"data_checksum": settings["data"], "pretrained_checksum": "the pretrained network"}.get(name)
        if changed:
            raise UserError(f"{changed} has changed since {out} was begun: give another --out, or use --fresh")
        flag = name if name.isupper() else f"--{name.replace('_', '-')}"
        found = f"{out} holds a run with {flag} {earlier[name]}, not {value}"
        raise UserError(f"{found}: resume it with that, give another --out, or start over with --fresh")
