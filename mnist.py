"""Trains LeNet on cluttered MNIST and shows where it looks, as training goes on.

    python mnist.py                      the default recipe: about 97% of unseen digits; heatmaps in out/
    python mnist.py --recipe original    the training of 2017: 100,000 steps of plain gradient descent

tarball -> array of images -> batches -> LeNet -> feature maps -> class activation maps -> heatmaps
"""

from quiet import keras  # first, to keep TensorFlow's start-up log off the console

# isort: split
import signal
import sys
import time
from functools import lru_cache

import numpy as np

import heatmaps
from cam import class_activation_model
from data.dataset import BOXES, CLASSES, DataError, load_dataset
from distortion import distort
from files import complete_file
from lenet import centre_on_classes, lenet, unit_variance_start
from localization import NAMES, evaluate, table
from networks import NetworkError, load_network
from settings import parse_settings
from state import MODEL, SettingError, State, claim, make_repeatable

# Settings: defaults of the two recipes. Every one is a flag (settings.py), see `python mnist.py --help`.
RECIPES = {
    "default": dict(
        steps=5250,  # 84,000 images, however many there are: 6 epochs of the 14,000
        batch_size=16,  # images per step
        learning_rate=0.02,  # of Adam, at its peak
        warm_up=0.2,  # share of the steps in which it rises to the peak; then it falls to 0 along a cosine
        beta_2=0.99,  # of Adam: squared gradients averaged over about 100 steps, for a run has few thousand
        label_smoothing=0.1,  # share of the probability that the loss spreads evenly over the classes
        rotation=10.0,  # degrees by which it turns a training image, at most, at the start; it fades out
        zoom=0.12,  # share by which it zooms a training image, the same
        bend=1.5,  # pixels by which it displaces parts of a training image, standard deviation, the same
        precision="auto",
    ),
    "original": dict(
        steps=100_000,  # 366 epochs of 70,000 images
        batch_size=256,
        learning_rate=0.5,  # of plain gradient descent, constant
        label_smoothing=0.0,
        rotation=0.0,
        zoom=0.0,
        bend=0.0,
        precision="float32",
    ),
}


def run(settings):
    """The experiment: from the tarball to the heatmaps."""
    start = time.monotonic()
    make_repeatable(settings.seed)
    original = settings.recipe == "original"

    # Tarball -> arrays: images (N, 100, 100, 1) uint8, labels (N,)
    train, test = load_dataset(settings.data)
    if settings.batch_size > len(train.labels):
        raise SettingError(f"--batch-size {settings.batch_size} is more than the {len(train.labels)} training images")
    steps = settings.steps or settings.epochs * len(train.labels) // settings.batch_size
    print(f"{settings.data}: {len(train.labels):,} training images, {len(test.labels):,} test images")
    if test.boxes is None:
        print(f"{settings.data / BOXES} is missing, so localisation is not measured")

    # Model
    model = lenet(precision=settings.precision, pooling=settings.pooling)
    if original:
        optimizer = keras.optimizers.SGD(settings.learning_rate)
    else:
        unit_variance_start(model, train.images[:256])
        centre_on_classes(model)
        warm_up = max(1, round(settings.warm_up * steps))
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0, max(1, steps - warm_up), warmup_target=settings.learning_rate, warmup_steps=warm_up
        )
        optimizer = keras.optimizers.Adam(schedule, beta_2=settings.beta_2)
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing),
        metrics=["accuracy"],
        # XLA's convolutions on a CPU are several times slower than TensorFlow's own.
        jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
    )
    _lock = claim(settings.out, vars(settings) | {"steps": steps}, heatmaps.clear if settings.fresh else None)
    state = State(settings.out, model)
    if state.step == steps and (settings.out / MODEL).exists():
        print(f"{settings.out} holds this run, finished; --fresh deletes it and starts over")
        return
    print(f"{steps:,} steps of {settings.batch_size} images, {settings.recipe} recipe, {settings.precision}")

    # Batches -> training; on the way, feature maps -> class activation maps -> heatmaps
    cam = class_activation_model(model, settings.pooling)
    recorder = heatmaps.Heatmaps(
        settings.out, cam, test, steps, settings.every, settings.samples, settings.batch_size, state
    )
    if state.step < steps:
        if state.step:
            print(f"continuing after step {state.step:,}")
        model.fit(
            Batches(train, settings, steps, state.step),  # one epoch to Keras: its bar shows the time left of the run
            callbacks=[state, recorder],
            shuffle=False,  # the batches are
            verbose=1 if sys.stdout.isatty() else 0,
        )
    if state.signal:
        stop(state.signal)

    # What the run leaves
    portable = lenet(pooling=settings.pooling)  # the same weights in float32, for any machine
    portable.set_weights(model.get_weights())
    heatmaps.draw_figures(settings.out, class_activation_model(portable, settings.pooling), test, settings.samples)
    # The model last: where it is, the run is finished and all else is there.
    with complete_file(settings.out / MODEL) as path:
        portable.save(path)
    last = recorder.history[-1]
    print(table({name: last[f"test_{name}"] for name in NAMES if f"test_{name}" in last}, len(test.labels)))
    print(f"{time.monotonic() - start:.0f} s in all")
    print(f"open {settings.out / heatmaps.PAGE}, or look at {settings.out / heatmaps.OVERVIEW}")


def evaluate_only(settings):
    """Measures a trained network on the test images."""
    _, test = load_dataset(settings.data)
    model = load_network(settings.evaluate)
    if model.input_shape[-1] != 1 or model.output_shape != (None, CLASSES):
        raise NetworkError(f"{settings.evaluate} is no network of grey images and {CLASSES} classes")
    measures = evaluate(class_activation_model(model, settings.pooling), *test, thorough=True)
    print(table(measures, len(test.labels)))


class Batches(keras.utils.PyDataset):
    """The batches of training steps: images (batch_size, H, W, 1) uint8, labels (batch_size, C), one-hot.

    Distortions fade out evenly over the run, so that it ends on images like those of the test. The batch of a step
    depends on the settings and the step alone, so that a run can continue at any step, and threads can prepare the
    next ones while the network trains.
    """

    def __init__(self, train, settings, steps, first_step):
        super().__init__(workers=2)
        self.train, self.settings, self.steps, self.first_step = train, settings, steps, first_step

    def __len__(self):
        return self.steps - self.first_step

    def __getitem__(self, index):
        settings, step, total = self.settings, self.first_step + index, len(self.train.labels)
        epochs, places = np.divmod(np.arange(settings.batch_size) + step * settings.batch_size, total)
        if settings.recipe == "original":
            chosen = places  # file order
        else:
            chosen = [shuffled(total, settings.seed, epoch)[place] for epoch, place in zip(epochs, places, strict=True)]
        images = self.train.images[chosen]
        if settings.rotation or settings.zoom or settings.bend:
            rng, strength = np.random.default_rng((settings.seed, 1, step)), 1 - step / self.steps
            images = distort(images, rng, *(strength * x for x in (settings.rotation, settings.zoom, settings.bend)))
        return images, keras.utils.to_categorical(self.train.labels[chosen], CLASSES)


@lru_cache(maxsize=4)
def shuffled(total, seed, epoch):
    """The order of the training images in an epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(total)


def stop(number, frame=None):
    """Ends the program after signal `number`."""
    print("\nstopped; the same command continues", file=sys.stderr)
    sys.exit(128 + number)


def main():
    settings = parse_settings(__doc__, RECIPES)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        evaluate_only(settings) if settings.evaluate else run(settings)
    except (SettingError, DataError, NetworkError, OSError, FloatingPointError) as error:
        print(f"mnist.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
