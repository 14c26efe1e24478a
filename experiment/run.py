"""A training run on disk: lock, settings, checkpoint and history. It resumes after any kill, on a CPU bit for bit."""

import contextlib
import csv
import itertools
import json
import os
import shutil
import signal
import sys
import time
import zlib

import keras
import numpy as np
from tqdm import tqdm

from experiment.files import PART, UserError, acquire_lock, atomic_write
from experiment.metrics import METRIC_TITLES, SHOWN_METRICS, format_metrics
from experiment.networks import class_names_file, images_file, save_network
from experiment.schedule import spread

SETTINGS, CHECKPOINT, PREVIOUS, LOCK = "settings.json", "checkpoint.npz", "checkpoint.previous.npz", "lock"
FIGURES = ("accuracy.png", "overview.png", "patterns.png", "units.png", "confusion.png", "index.html", "draw.html")
OUTPUTS = (PREVIOUS, CHECKPOINT, "history.csv", *FIGURES)
NOT_COMPARED = ("out", "fresh", "epochs", "evaluate")  # settings that do not change what a run computes
START = time.monotonic()


def set_seed(seed):
    """Makes all results depend on the seed alone, bit for bit, on one CPU and with one precision."""
    keras.utils.set_random_seed(seed)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


class RunFolder:
    """The output folder of a run.

    settings.json             settings of the run, and a checksum of its data; it is not resumed with others
    checkpoint.npz            weights, optimizer state and history, with checksums
    checkpoint.previous.npz   the checkpoint before
    history.csv               a row per evaluation, see `history`
    maps/STEP.npy             class activation maps of the samples for their true classes, (S, H, W) float32
    weights/STEP.npz          the model's weights at some steps, float32 by name
    lock                      number of the process that uses the folder

    Args:
        settings: Namespace of the settings: out, fresh, steps, every, batch_size, and others.
        model: The compiled model to train. Its weights are restored from the checkpoint, if there is one.
        data: The training and the test `Split`. A run is not resumed on others.
        keep_weights: Number of steps whose weights are kept, among them the first and the last; most of them early.

    Attributes:
        step: Training steps done, those before an interruption included.
        history: A dict per evaluation: step, images (seen in training), loss, accuracy, test_images, test_... for each
            metric, and predicted, the predicted class of each sample.
        finished: Whether the run is complete.

    Raises:
        UserError: The folder cannot be written, another process uses it, or it holds a run that cannot be resumed.
    """

    def __init__(self, settings, model, data, keep_weights=0):
        self.settings, self.model, self.out = settings, model, settings.out
        self.step, self.history, self.losses = -1, [], []  # losses: loss and accuracy of each batch since the last row
        self.model_file = self.out / f"{model.name}.keras"
        due = [*range(0, settings.steps, settings.every), settings.steps]
        self.kept = {due[position] for position in spread(len(due), keep_weights)}
        self.lock = lock_run_folder(self.out)
        exit_on_signals("stopped; run the same command again, without --fresh, to continue")
        if settings.fresh:
            self.clear()
        check_settings(self.out, vars(settings), data)
        model.optimizer.build(model.trainable_variables)
        self.restore()
        self.finished = self.step == settings.steps and self.model_file.exists()
        if self.finished:
            print(f"{self.out} holds this run, finished; --fresh deletes it and starts over")
        elif self.step >= 0:
            print(f"resuming after step {self.step:,}", flush=True)

    def clear(self):
        """Deletes what a run writes, and nothing else: checkpoints first and settings last, in case of a kill."""
        beside = (class_names_file(self.model_file), images_file(self.model_file))
        for path in *(self.out / name for name in OUTPUTS), self.model_file, *beside:
            path.unlink(missing_ok=True)
        for folder in self.out.glob("img_*"):
            if folder.name.removeprefix("img_").isdecimal():
                shutil.rmtree(folder)
        for path in [*self.out.glob("maps/*.npy"), *self.out.glob("weights/*.npz")]:
            if path.stem.isdecimal():
                path.unlink()
        for name in "maps", "weights":
            with contextlib.suppress(OSError):  # it is missing, or has other files
                (self.out / name).rmdir()
        (self.out / SETTINGS).unlink(missing_ok=True)

    def steps(self):
        """Yields the steps that are still to do, up to the last. Step 0 comes before training.

        Shows the progress. On Ctrl-C or SIGTERM the step is completed, its state is saved, and the process exits.
        """
        stop = []
        handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
        first, last = self.step + 1, self.settings.steps
        self.started, self.first = time.monotonic(), first
        with tqdm(desc="training", total=last, initial=max(first - 1, 0), unit=" steps", disable=None) as self.bar:
            for step in range(first, last + 1):
                self.step = step
                self.bar.update(1 if step > 0 else 0)
                if step == last:
                    self.bar.close()  # the final evaluation has a bar of its own
                yield step
                if stop:
                    self.save_checkpoint()
                    self.bar.close()
                    handlers[stop[0]](stop[0])
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def is_due(self, step):
        """Whether maps and metrics of a step are to be recorded: every `every` steps, the first and the last."""
        return step % self.settings.every == 0 or step == self.settings.steps

    def add_loss(self, loss, accuracy):
        """Adds the loss and accuracy of a training batch. A loss that is not finite raises a UserError."""
        if not np.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.step:,}; try --fresh and a smaller --learning-rate")
        self.losses.append((float(loss), float(accuracy)))

    def record(self, metrics, test_images, predicted, maps):
        """Records an evaluation: metrics on so many test images; predicted classes (S,) and maps (S, H, W) of samples.

        The checkpoint is saved last, so it never claims what is not on disk.
        """
        (self.out / "maps").mkdir(exist_ok=True)
        with atomic_write(self.out / "maps" / f"{self.step}.npy") as part, part.open("wb") as file:
            np.save(file, maps)
        if self.step in self.kept:
            (self.out / "weights").mkdir(exist_ok=True)
            with atomic_write(self.out / "weights" / f"{self.step}.npz") as part, part.open("wb") as file:
                np.savez(file, **{weight.path: np.asarray(weight) for weight in self.model.weights})
        loss, accuracy = np.mean(self.losses, axis=0).tolist() if self.losses else ("", "")
        row = {"step": self.step, "images": self.step * self.settings.batch_size, "loss": loss, "accuracy": accuracy}
        row |= {"test_images": test_images} | {f"test_{name}": value for name, value in metrics.items()}
        self.history.append(row | {"predicted": [int(label) for label in predicted]})
        self.losses = []
        with atomic_write(self.out / "history.csv") as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, row, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.history)
        self.save_checkpoint()

        shown = [f"{METRIC_TITLES[name]} {metrics[name]:.1%}" for name in SHOWN_METRICS if name in metrics]
        self.bar.set_postfix_str(f"test {', '.join(shown)}", refresh=False)
        if not sys.stdout.isatty() and self.step > 0:
            left = (time.monotonic() - self.started) / (self.step - self.first + 1) * (self.settings.steps - self.step)
            tqdm.write(f"step {self.step:,}: loss {loss:.3f}, test {', '.join(shown)}, {left:.0f} s left")
            sys.stdout.flush()

    # Not keras.callbacks.BackupAndRestore: its HDF5 files have no checksums, so a flipped bit becomes another weight.
    def save_checkpoint(self):
        path = self.out / CHECKPOINT
        progress = json.dumps({"step": self.step, "history": self.history, "losses": self.losses})
        with atomic_write(path) as part:
            with part.open("wb") as file:
                np.savez(file, np.array(progress), *(np.asarray(variable) for variable in self.variables()))
            if path.exists():
                path.replace(self.out / PREVIOUS)

    def restore(self):
        """Restores the newest checkpoint that is whole, if there is any."""
        found = [self.out / name for name in (CHECKPOINT, PREVIOUS) if (self.out / name).exists()]
        for path in found:
            try:
                with np.load(path, allow_pickle=False) as file:
                    progress, *values = [file[name] for name in file.files]
                for variable, value in zip(self.variables(), values, strict=True):
                    variable.assign(value)
                progress = json.loads(str(progress))
            except Exception:  # zipfile and NumPy raise a dozen kinds for a damaged file
                print(f"{path} is damaged", flush=True)
                continue
            self.step, self.history, self.losses = progress["step"], progress["history"], progress["losses"]
            for damaged in found[: found.index(path)]:
                damaged.unlink()  # or it would become the previous one
            return
        if found:
            raise UserError(f"{self.out} has no checkpoint that can be read; start over with --fresh")

    def variables(self):
        """All that training changes, in a fixed order: weights, dropout's random state, optimizer state."""
        return [*self.model.variables, *self.model.optimizer.variables]

    def finish(self, model, class_names, images):
        """Saves the trained model. It comes last: where it exists, the run is complete.

        Args:
            model: The network in float32, whose weights become those of the trained model.
            class_names: Names of the C classes.
            images: How the model wants its images, as in `networks.load_images_settings`.
        """
        save_network(model, class_names, images, self.model_file)
        last = self.history[-1]
        metrics = {name: last[f"test_{name}"] for name in METRIC_TITLES if f"test_{name}" in last}
        print(format_metrics(metrics, last["test_images"]))
        print(f"{time.monotonic() - START:.0f} s in all")
        print(f"open {self.out / 'index.html'}, or look at {self.out / 'overview.png'}")


def lock_run_folder(out):
    """Makes and locks the folder `out`; deletes the partial files of a killed run. Returns the open lock file."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(out / LOCK)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); give another folder") from None
    folders = [out, *(folder for folder in out.glob("*/") if not (folder / LOCK).exists())]  # not those of other runs
    for folder in folders:
        for part in folder.glob(PART + "*"):
            part.unlink()
    return lock


def checksum(data):
    """A checksum of the images, labels and boxes of several `Split`s; of photos only their names and sizes count."""
    value = 0
    for part in itertools.chain(*data):
        value = zlib.crc32(part if isinstance(part, np.ndarray) else repr(part).encode(), value)
    return value


def check_settings(out, settings, data):
    """Writes the settings of a new run, or compares them with those of the run that the folder holds."""
    own = {name: str(value) for name, value in settings.items() if name not in NOT_COMPARED}
    own["data_checksum"] = str(checksum(data))
    own["steps"] = own.pop("steps")  # the last to be compared, for it may follow from the number of images
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
        if value != earlier[name] and name == "data_checksum":
            raise UserError(f"{own['data']} has changed since {out} was begun: give another --out, or use --fresh")
        if value != earlier[name]:
            found = f"{out} holds a run with --{name.replace('_', '-')} {earlier[name]}, not {value}"
            raise UserError(f"{found}: resume it with that, give another --out, or start over with --fresh")


def exit_on_signals(message):
    """Makes Ctrl-C and SIGTERM end the process at once. An exception in a handler could get lost in a library."""

    def end(number, frame=None):
        os.write(2, f"\n{message}\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def run_main(script, main, settings):
    """Runs `main(settings)`. User errors print one line and exit with code 2."""
    exit_on_signals("stopped")
    try:
        main(settings)
    except (UserError, OSError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
