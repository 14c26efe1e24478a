"""Trains AlexNet on photos of Caltech-256 and shows where it looks, as training goes on.

    python caltech256.py --data 256_ObjectCategories.tar --weights alexnet.npz     convolutions from ImageNet
    python caltech256.py --data 256_ObjectCategories.tar --weights none            from random weights

archive -> photos -> batches -> AlexNet -> feature maps -> class activation maps -> heatmaps
"""

from quiet import keras  # first, to keep TensorFlow's start-up log off the console

# isort: split
from functools import partial

import numpy as np

from alexnet import CONVOLUTIONS, SHORT_SIDE, SIDE, alexnet, set_convolutions
from data.dataset import Part
from data.photos import decode, load_photos
from networks import torchvision_convolutions
from settings import caltech256_settings
from state import SettingError, make_repeatable
from training import Order, centre_on_classes, end_in_good_order, train, warm_up_then_cosine

# Settings: defaults of the two recipes. Every one is a flag (settings.py), see `python caltech256.py --help`.
RECIPES = {
    "pretrained": dict(
        epochs=12,
        batch_size=32,  # photos per step
        learning_rate=1e-3,  # of Adam, at its peak
        old_rate=0.0,  # share of that rate for the weights from ImageNet; with 0 they stay as they are
        warm_up=0.1,  # share of the steps in which the rate rises to the peak; then it falls to 0 along a cosine
        label_smoothing=0.1,  # share of the probability that the loss spreads evenly over the classes
        precision="auto",
    ),
    "scratch": dict(
        epochs=20,
        batch_size=32,
        learning_rate=1e-3,
        warm_up=0.1,
        label_smoothing=0.1,
        precision="auto",
    ),
}


def run(settings):
    """The experiment: from the archive to the heatmaps."""
    make_repeatable(settings.seed)

    # Archive -> photos; those for training stay in it until a batch needs them
    weights = torchvision_convolutions(settings.weights) if settings.recipe == "pretrained" else None
    training, test_photos, names, counts = load_photos(settings.data, settings.categories)
    if settings.batch_size > len(training.photos):
        raise SettingError(
            f"--batch-size {settings.batch_size} is more than the {len(training.photos)} training photos"
        )
    steps = settings.steps or settings.epochs * len(training.photos) // settings.batch_size
    print(
        f"{settings.data}: {len(training.photos):,} training photos, {len(test_photos.photos):,} test photos of "
        f"{len(names)} categories" + "".join(f"; {count} {what}" for what, count in counts.items())
    )
    photos = np.stack([decode(photo, SHORT_SIDE, SIDE) for photo in test_photos.photos])  # (N, 224, 224, 3) uint8
    test = Part(photos, test_photos.labels, None)

    # Model
    model = alexnet(len(names), settings.precision)
    if weights:
        set_convolutions(model, weights)
        for name in CONVOLUTIONS:
            model.get_layer(name).trainable = settings.old_rate > 0  # if not, a step takes a third of the time
    else:
        print("--weights none: the convolutions start at random; without ImageNet expect far fewer photos right")
    centre_on_classes(model)

    # Batches -> training; on the way, feature maps -> class activation maps -> heatmaps
    order = Order("shuffled", training.labels, settings.seed)  # stratified, they did no better
    batch = partial(make_batch, training, order, len(names), settings)
    portable = alexnet(len(names))  # in float32, for any machine
    train(settings, steps, model, adam(settings, steps), portable, batch, test, names)


def adam(settings, steps):
    """The optimizer; weights from ImageNet that are to change have a rate of their own."""
    rate = partial(warm_up_then_cosine, steps=steps, warm_up=settings.warm_up)
    new = keras.optimizers.Adam(rate(settings.learning_rate))
    if settings.recipe == "scratch" or settings.old_rate == 0:
        return new
    old = keras.optimizers.Adam(rate(settings.learning_rate * settings.old_rate))
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(new, {"conv[1-5]/.*": old}))


def make_batch(training, order, classes, settings, step):
    """The batch of a step: random crops of photos, mirrored or not, (batch_size, 224, 224, 3) uint8, and labels."""
    rng = np.random.default_rng((settings.seed, 1, step))
    chosen = order.batch(step, settings.batch_size)
    photos = np.stack([decode(training.photos[index], SHORT_SIDE, SIDE, rng) for index in chosen])
    return photos, keras.utils.to_categorical(training.labels[chosen], classes)


if __name__ == "__main__":
    settings = caltech256_settings(__doc__, RECIPES)
    end_in_good_order("caltech256.py", run, settings)
