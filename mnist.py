"""Trains LeNet on cluttered MNIST and shows where it looks, as training goes on.

    python mnist.py                      the default recipe: about 97% of unseen digits; heatmaps in out/
    python mnist.py --recipe original    the training of 2017: 100,000 steps of plain gradient descent

tarball -> array of images -> batches -> LeNet -> feature maps -> class activation maps -> heatmaps
"""

from quiet import keras  # first, to keep TensorFlow's start-up log off the console

# isort: split
from functools import partial

import numpy as np

from cam import class_activation_model
from data.dataset import BOXES, CLASSES, load_dataset
from distortion import distort
from lenet import lenet, unit_variance_start
from localization import evaluate, table
from networks import NetworkError, load_network, numbers
from settings import mnist_settings
from state import SettingError, make_repeatable
from training import Order, centre_on_classes, end_in_good_order, train, warm_up_then_cosine

# Settings: defaults of the two recipes. Every one is a flag (settings.py), see `python mnist.py --help`.
RECIPES = {
    "default": dict(
        steps=5250,  # 84,000 images, however many there are: 6 epochs of the 14,000
        batch_size=16,  # images per step
        order="stratified",  # each batch has about the classes of the whole set
        learning_rate=0.03,  # of Adam, at its peak
        warm_up=0.1,  # share of the steps in which it rises to the peak; then it falls to 0 along a cosine
        beta_2=0.99,  # of Adam: squared gradients averaged over about 100 steps, for a run has few thousand
        weight_decay=0.01,  # share of the weights, times the learning rate, that each step takes off them
        label_smoothing=0.1,  # share of the probability that the loss spreads evenly over the classes
        rotation=10.0,  # degrees by which it turns a training image, at most, at the start; it fades out
        zoom=0.12,  # share by which it zooms a training image, the same
        bend=1.5,  # pixels by which it displaces parts of a training image, standard deviation, the same
        precision="auto",
    ),
    "original": dict(
        steps=100_000,  # 366 epochs of 70,000 images
        batch_size=256,
        order="file",
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
    make_repeatable(settings.seed)
    original = settings.recipe == "original"

    # Tarball -> arrays: images (N, 100, 100, 1) uint8, labels (N,)
    training, test = load_dataset(settings.data)
    if settings.batch_size > len(training.labels):
        raise SettingError(
            f"--batch-size {settings.batch_size} is more than the {len(training.labels)} training images"
        )
    steps = settings.steps or settings.epochs * len(training.labels) // settings.batch_size
    print(f"{settings.data}: {len(training.labels):,} training images, {len(test.labels):,} test images")
    if test.boxes is None:
        print(f"{settings.data / BOXES} is missing, so localisation is not measured")

    # Model
    network = partial(lenet, pooling=settings.pooling)
    model = network(precision=settings.precision)
    if original:
        optimizer = keras.optimizers.SGD(settings.learning_rate)
    else:
        unit_variance_start(model, training.images[:256])
        centre_on_classes(model)
        rate = warm_up_then_cosine(settings.learning_rate, steps, settings.warm_up)
        optimizer = keras.optimizers.AdamW(rate, weight_decay=settings.weight_decay, beta_2=settings.beta_2)
        optimizer.exclude_from_weight_decay(var_names=["bias"])

    # Batches -> training; on the way, feature maps -> class activation maps -> heatmaps
    order = Order(settings.order, training.labels, settings.seed)
    batch = partial(make_batch, training, order, settings, steps)
    portable = network()  # in float32, for any machine
    train(settings, steps, model, optimizer, portable, batch, test, numbers(CLASSES), settings.pooling)


def make_batch(training, order, settings, steps, step):
    """The batch of a step: images (batch_size, H, W, 1) uint8, labels (batch_size, C), one-hot.

    Distortions fade out evenly over the run, so that it ends on images like those of the test.
    """
    chosen = order.batch(step, settings.batch_size)
    images = training.images[chosen]
    if settings.rotation or settings.zoom or settings.bend:
        rng, strength = np.random.default_rng((settings.seed, 1, step)), 1 - step / steps
        images = distort(images, rng, *(strength * x for x in (settings.rotation, settings.zoom, settings.bend)))
    return images, keras.utils.to_categorical(training.labels[chosen], CLASSES)


def evaluate_only(settings):
    """Measures a trained network on the test images."""
    _, test = load_dataset(settings.data)
    model = load_network(settings.evaluate)
    if model.input_shape[-1] != 1 or model.output_shape != (None, CLASSES):
        raise NetworkError(f"{settings.evaluate} is no network of grey images and {CLASSES} classes")
    measures = evaluate(class_activation_model(model, settings.pooling), *test, thorough=True)
    print(table(measures, len(test.labels)))


if __name__ == "__main__":
    settings = mnist_settings(__doc__, RECIPES)
    end_in_good_order("mnist.py", evaluate_only if settings.evaluate else run, settings)
