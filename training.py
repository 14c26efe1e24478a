"""What the experiments share: training that can be stopped, continued and looked at, and how their programs end."""

import signal
import sys
import time
from functools import lru_cache

import keras
import numpy as np
from keras import ops

import heatmaps
from cam import class_activation_model
from data.dataset import DataError
from localization import NAMES, table
from networks import NetworkError, names_file, save_network
from state import SettingError, State, claim, received

START = time.monotonic()  # of the program, about


def train(settings, steps, model, optimizer, portable, batch, test, names, pooling="average"):
    """Trains a model, or goes on where its training stopped: batches -> feature maps -> heatmaps in `settings.out`.

    Args:
        settings: Namespace of the run's settings: out, fresh, every, samples, batch_size, label_smoothing, precision,
            recipe, and others. A run is continued only with the same settings.
        steps: Steps of the whole run.
        model: The model, at its start.
        optimizer: Of the cross-entropy loss.
        portable: The same network in float32, which takes over the weights at the end and is saved under its name.
        batch: Function from a step to its images and one-hot labels, for `Batches`.
        test: The test set: images (N, H, W, channels) uint8, labels (N,), and boxes (N, 4) or None.
        names: Names of the C classes.
        pooling: As for `class_activation_model`.
    """
    trained = settings.out / f"{portable.name}.keras"

    def clear(out):
        trained.unlink(missing_ok=True)
        names_file(trained).unlink(missing_ok=True)
        heatmaps.clear(out)

    _lock = claim(settings.out, vars(settings) | {"steps": steps}, clear if settings.fresh else None)
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing),
        metrics=["accuracy"],
        # XLA's convolutions on a CPU are several times slower than TensorFlow's own.
        jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
    )
    state = State(settings.out, model)
    if state.step == steps and trained.exists():
        print(f"{settings.out} holds this run, finished; --fresh deletes it and starts over")
        return
    print(f"{steps:,} steps of {settings.batch_size} images, {settings.recipe} recipe, {settings.precision}")

    cam = class_activation_model(model, pooling)
    recorder = heatmaps.Heatmaps(
        settings.out, cam, test, steps, settings.every, settings.samples, settings.batch_size, state
    )
    if state.step < steps:
        if state.step:
            print(f"continuing after step {state.step:,}")
        batches = Batches(batch, state.step, steps)  # one epoch to Keras: its bar shows the time left of the run
        bar = 1 if sys.stdout.isatty() else 0
        try:
            model.fit(batches, shuffle=False, callbacks=[state, recorder], verbose=bar)
        except Exception as error:
            raise batches.error or error from None
    if state.signal:
        stop(state.signal)

    # What the run leaves
    portable.set_weights(model.get_weights())
    cam = class_activation_model(portable, pooling)
    heatmaps.draw_figures(settings.out, cam, test, names, settings.samples)
    # The model last: where it is, the run is finished and all else is there.
    save_network(portable, names, trained)
    last = recorder.history[-1]
    print(table({name: last[f"test_{name}"] for name in NAMES if f"test_{name}" in last}, len(test.labels)))
    print(f"{time.monotonic() - START:.0f} s in all")
    print(f"open {settings.out / heatmaps.PAGE}, or look at {settings.out / heatmaps.OVERVIEW}")


class Batches(keras.utils.PyDataset):
    """The batches of training steps; threads prepare the next ones while the network trains.

    Args:
        make: Function from a step, 0, 1, 2 ..., to its images and one-hot labels. It depends on nothing else, so that a
            run can continue at any step.
        first_step: The step to begin with.
        steps: Steps of the whole run.
    """

    def __init__(self, make, first_step, steps):
        super().__init__(workers=2)
        self.make, self.first_step, self.steps = make, first_step, steps
        self.error = None  # that a batch could not be made for: out of a thread Keras raises another one

    def __len__(self):
        return self.steps - self.first_step

    def __getitem__(self, index):
        try:
            return self.make(self.first_step + index)
        except Exception as error:
            self.error = error
            raise


def centre_on_classes(model):
    """Keeps the mean over the classes of each unit's softmax weights at zero, during training too.

    Softmax, and so prediction and loss, stays the same when one map is added to the maps of all classes. Gradient
    descent leaves that common part as it was; Adam, whose steps do not add up to zero over the classes, makes it drift.
    Without it M_c shows the evidence for class c against the other classes.

    Args:
        model: A model with a layer "softmax_weights", made by `lenet` or `alexnet`; it is changed in place.
    """
    kernel = model.get_layer("softmax_weights").kernel  # w_k^c: (K, C)
    kernel.constraint = lambda weights: weights - ops.mean(weights, axis=1, keepdims=True)  # after each step
    kernel.assign(kernel.constraint(kernel))


def warm_up_then_cosine(peak, steps, warm_up):
    """Learning rate that rises to its peak in a share of the steps, `warm_up`, then falls to 0 along a cosine."""
    first = max(1, round(warm_up * steps))
    return keras.optimizers.schedules.CosineDecay(0.0, max(1, steps - first), warmup_target=peak, warmup_steps=first)


class Order:
    """The order in which the training images come: each once in an epoch.

    Args:
        kind: "stratified": every epoch in another random order, in which the images of a class are spread evenly over
            the epoch, so that each batch has about the classes of the whole set. "shuffled": every epoch in another
            random order. "file": always in the order of the arrays.
        labels: Classes of the N images, (N,).
        seed: Integer.
    """

    def __init__(self, kind, labels, seed):
        self.kind, self.labels, self.seed = kind, labels, seed
        self.epoch = lru_cache(maxsize=4)(self.epoch)  # the batches of an epoch follow each other

    def batch(self, step, size):
        """Which images make up the batch of a step: indices (size,)."""
        epochs, places = np.divmod(np.arange(size) + step * size, len(self.labels))
        return np.array([self.epoch(epoch)[place] for epoch, place in zip(epochs, places, strict=True)])

    def epoch(self, epoch):
        """All images in the order of an epoch: indices (N,)."""
        if self.kind == "file":
            return np.arange(len(self.labels))
        rng = np.random.default_rng((self.seed, 0, epoch))
        groups = self.labels if self.kind == "stratified" else np.zeros_like(self.labels)
        places = np.empty(len(groups))  # 0 is the start of the epoch, 1 its end
        for group in np.unique(groups):
            images = rng.permutation(np.flatnonzero(groups == group))
            places[images] = (np.arange(len(images)) + rng.random(len(images))) / len(images)
        return places.argsort()


def stop(number, frame=None):
    """Ends the program after signal `number`."""
    received.append(number)
    print("\nstopped; the same command continues", file=sys.stderr)
    sys.exit(128 + number)


def end_in_good_order(script, run, settings):
    """Runs `run(settings)`; what a user can mend ends it with one line and exit code 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        run(settings)
    except (SettingError, DataError, NetworkError, OSError, FloatingPointError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
