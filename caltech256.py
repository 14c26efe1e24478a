"""Trains AlexNet on photos of Caltech-256, and shows where it looks while it learns.

    python caltech256.py --data 256_ObjectCategories.tar --weights alexnet.npz     convolutions from ImageNet
    python caltech256.py --data 256_ObjectCategories.tar --weights none            from random weights

archive -> photos -> batches -> AlexNet -> feature maps -> class activation maps -> heatmaps
"""

from experiment.quiet import keras  # first, to keep TensorFlow's start-up log off the console

# isort: split
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import cam
from alexnet import CONVOLUTIONS, SHORT_SIDE, SIDE, alexnet, set_convolutions
from data.photos import decode, load_photos
from experiment.figures import save_figures, save_heatmaps, save_images
from experiment.files import UserError
from experiment.metrics import evaluate, predict_class_maps
from experiment.networks import load_torchvision_convolutions
from experiment.pages import Page
from experiment.run import RunFolder, run_main, set_seed
from experiment.schedule import batch_indices, warmup_cosine
from experiment.settings import fill_in_recipe, make_parser

# All settings; each is a flag, see `python caltech256.py --help`.
SETTINGS = {
    "data": Path("data/256_ObjectCategories.tar"),
    "weights": Path("data/alexnet.npz"),
    "batch_size": 32,
    "learning_rate": 1e-3,  # of Adam, at its peak
    "warmup": 0.1,  # share of the steps in which the rate rises to its peak; then it falls to 0 along a cosine
    "label_smoothing": 0.1,
    "precision": "auto",
    "out": Path("out/caltech256"),
    "every": 50,  # steps between two heatmaps of a photo
    "samples": 30,  # test photos to draw heatmaps of, from the first
    "seed": 0,
}
RECIPES = {
    "pretrained": {
        "epochs": 12,
        "pretrained_lr_scale": 0.0,  # learning rate of the ImageNet weights, as a share; with 0 they stay as they are
    },
    "scratch": {"epochs": 20},
}
TEST_PHOTOS = 300  # evaluated during training; the final evaluation takes all


def main(settings):
    set_seed(settings.seed)

    # Archive -> photos. Test photos (N, 224, 224, 3) uint8; those for training stay in it until a batch needs them
    weights = load_torchvision_convolutions(settings.weights) if settings.recipe == "pretrained" else None
    train, test, names, counts = load_photos(settings.data, settings.categories)
    found = f"{len(train.images):,} training photos, {len(test.images):,} test photos of {len(names)} categories"
    print("; ".join([f"{settings.data}: {found}", *(f"{count} {what}" for what, count in counts.items())]), flush=True)
    if settings.batch_size > len(train.images):
        raise UserError(f"--batch-size {settings.batch_size} is more than the {len(train.images)} training photos")
    settings.steps = settings.steps or settings.epochs * len(train.images) // settings.batch_size
    test = test._replace(images=np.stack([decode(photo, SHORT_SIDE, SIDE) for photo in test.images]))

    # Photos -> feature maps f_k -> global average pooling F_k -> softmax weights w_k^c -> logits S_c
    model = alexnet(len(names), settings.precision)
    if weights:
        set_convolutions(model, weights)
        for name in CONVOLUTIONS:  # frozen, a step takes a third of the time
            model.get_layer(name).trainable = settings.pretrained_lr_scale > 0
    kernel = model.get_layer("softmax_weights").kernel  # w_k^c: (K, C)
    kernel.constraint = cam.zero_mean_over_classes  # M_c: evidence against the other classes
    kernel.assign(kernel.constraint(kernel))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing)
    model.compile(make_optimizer(settings), loss, metrics=["accuracy"], jit_compile=cam.JIT_COMPILE)

    # The same layers and weights: photos -> S_c, equation (1) (N, C), and M_c, equation (2) (N, 13, 13, C)
    cam_model = cam.class_activation_model(model)

    run = RunFolder(settings, model)  # lock, checkpoint (restored into the model), progress, history
    if run.finished:
        return
    print(f"{settings.steps:,} steps of {settings.batch_size} photos, {settings.recipe} recipe, {settings.precision}")
    print(f"watch them in {settings.out / 'index.html'}", flush=True)
    samples = test.first(settings.samples)
    save_images(settings.out, samples.images)
    page = Page(settings.out, samples, names)
    batches = prefetch(lambda step: make_batch(train, settings, step), range(max(run.step, 0), settings.steps))

    for step in run.steps():  # step 0 comes before training
        if step > 0:
            photos, labels = next(batches)  # (B, 224, 224, 3), (B,)
            run.add_loss(*model.train_on_batch(photos, keras.utils.to_categorical(labels, len(names))))

        if run.is_due(step):
            tested = test if step == settings.steps else test.first(max(TEST_PHOTOS, settings.samples))
            # Photos -> logits (N, C) and class activation maps of the true classes (N, 13, 13)
            logits, maps = predict_class_maps(cam_model, tested.images, tested.labels)
            metrics = evaluate(logits, maps, tested)
            # Maps of the samples (S, 13, 13) -> heatmaps (S, 224, 224), 0..1 -> PNG
            predicted, maps = logits[: settings.samples].argmax(axis=1), maps[: settings.samples]
            heatmaps = cam.normalize(cam.upsample(maps, SIDE, SIDE))
            save_heatmaps(settings.out, step, samples.images, heatmaps)
            run.record(metrics, len(tested.labels), predicted, maps)
            page.renew(cam_model, run.history)

    # The same weights in float32 layers, for any machine
    trained = alexnet(len(names))
    trained.set_weights(model.get_weights())
    cam_model = cam.class_activation_model(trained)
    save_figures(settings.out, cam_model, test, names, run.history)
    page.renew(cam_model, run.history, finished=True)
    run.finish(trained, names, images={"short_side": SHORT_SIDE, "pixel_range": (0, 255)})


def make_optimizer(settings):
    """Adam. ImageNet weights that are trained have a learning rate of their own."""
    rates = [settings.learning_rate, settings.learning_rate * (settings.pretrained_lr_scale or 0)]
    new, pretrained = [keras.optimizers.Adam(warmup_cosine(rate, settings.steps, settings.warmup)) for rate in rates]
    if not rates[1]:
        return new
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(new, {"conv[1-5]/.*": pretrained}))


def make_batch(train, settings, step):
    """Random crops of photos, half of them mirrored, (B, 224, 224, 3) uint8, and their labels (B,)."""
    rng = np.random.default_rng((settings.seed, 1, step))
    batch = batch_indices(step, settings.batch_size, len(train.images), "shuffled", settings.seed)
    photos = np.stack([decode(train.images[index], SHORT_SIDE, SIDE, rng) for index in batch])
    return photos, train.labels[batch]


def prefetch(make, steps, ahead=4):
    """Yields make(step) for each step; two threads make the next ones while the network trains."""
    with ThreadPoolExecutor(2) as pool:
        pending = deque()
        for step in steps:
            pending.append(pool.submit(make, step))
            if len(pending) > ahead:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


if __name__ == "__main__":
    parser = make_parser("caltech256.py", __doc__, SETTINGS, RECIPES)
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="only these, such as coffee-mug (default: all)")
    settings = parser.parse_args()
    recipe = "scratch" if str(settings.weights) == "none" else "pretrained"
    fill_in_recipe(parser, settings, recipe, RECIPES)
    run_main("caltech256.py", main, settings)
