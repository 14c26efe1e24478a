"""Trains AlexNet on photos of Caltech-256, or on your own, and shows where it looks while it learns.

    python caltech256.py --data 256_ObjectCategories.tar --weights alexnet.npz     convolutions from ImageNet
    python caltech256.py --data 256_ObjectCategories.tar --weights none            from random weights
    python caltech256.py --data photos --weights alexnet.npz                       a folder photos/CLASS for each class

archive -> photos -> batches -> AlexNet -> feature maps -> class activation maps -> heatmaps
"""

from experiment.quiet import keras  # first, to keep TensorFlow's start-up log off the console

# isort: split
import io
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cam
from alexnet import CONVOLUTIONS, SHORT_SIDE, SIDE, alexnet, set_convolutions
from data.archive import read_bytes
from data.photos import BOXES, crop_boxes, decode, load_all_photos, load_photos
from experiment.figures import report_classes, save_figures, save_heatmaps, save_images
from experiment.files import UserError
from experiment.images import read_picture, scale_short_side
from experiment.metrics import evaluate, format_metrics, localize, predict_class_maps
from experiment.networks import (
    check_evaluated,
    class_names_file,
    load_class_names,
    load_network,
    load_torchvision_convolutions,
    to_cam_model,
)
from experiment.pages import Page
from experiment.run import RunFolder, run_main, set_seed
from experiment.schedule import batch_indices, warmup_cosine
from experiment.settings import fill_in_recipe, make_parser, number

# All settings; each is a flag, see `python caltech256.py --help`.
SETTINGS = {
    "data": Path("data/256_ObjectCategories.tar"),
    "weights": Path("data/alexnet.npz"),
    "batch_size": 32,
    "learning_rate": 1e-3,  # of Adam, at its peak
    "warmup": 0.1,  # share of the steps in which the rate rises to its peak; then it falls to 0 along a cosine
    "label_smoothing": 0.0,
    "location_dropout": 0.3,  # share of the locations before the last convolution that are hidden in a training step
    "precision": "auto",
    "out": Path("out/caltech256"),
    "every": 100,  # steps between two heatmaps of a photo
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
TEST_PHOTOS = 100  # evaluated during training; the final evaluation takes all
BATCH = 50  # photos in a forward pass of --evaluate


def main(settings):
    set_seed(settings.seed)

    # Archive -> photos, which stay in it until a batch needs them; test photos -> crops (N, 224, 224, 3) uint8
    weights = load_torchvision_convolutions(settings.weights) if settings.recipe == "pretrained" else None
    train, test_photos, names, counts = load_photos(
        settings.data, settings.categories, settings.test_share, settings.fold
    )
    found = [f"{len(train.labels):,} training photos, {len(test_photos.labels):,} test photos of {len(names)} classes"]
    print(describe(settings.data, found, test_photos, counts), flush=True)
    if test_photos.boxes is None:
        print(f"{settings.data} has no {BOXES}, so localization is not measured", flush=True)
    if settings.batch_size > len(train.images):
        raise UserError(f"--batch-size {settings.batch_size} is more than the {len(train.images)} training photos")
    settings.steps = settings.steps or settings.epochs * len(train.images) // settings.batch_size
    test = test_photos._replace(images=crop(test_photos.images), boxes=None)

    # Photos -> feature maps f_k -> global average pooling F_k -> softmax weights w_k^c -> logits S_c
    model = alexnet(len(names), settings.precision, settings.location_dropout)
    if weights:
        set_convolutions(model, weights)
        for name in CONVOLUTIONS:  # frozen, a step takes a third of the time
            model.get_layer(name).trainable = settings.pretrained_lr_scale > 0
    kernel = model.get_layer("softmax_weights").kernel  # w_k^c: (K, C)
    kernel.constraint = cam.zero_mean_over_classes  # M_c: evidence for c relative to the other classes
    kernel.assign(kernel.constraint(kernel))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing)
    model.compile(make_optimizer(settings), loss, metrics=["accuracy"], jit_compile=cam.JIT_COMPILE)

    # The same layers and weights: photos -> S_c, equation (1) (N, C), and M_c, equation (2) (N, 13, 13, C)
    cam_model = cam.class_activation_model(model)

    # Lock, checkpoint (restored into the model), progress, history
    run = RunFolder(settings, model, (train, test_photos))
    if run.finished:
        return
    print(f"{settings.steps:,} steps of {settings.batch_size} photos, {settings.recipe} recipe, {settings.precision}")
    print(f"follow the run in {settings.out / 'index.html'}", flush=True)
    samples = test.first(settings.samples)
    save_images(settings.out, samples.images)
    page = Page(settings.out, samples._replace(boxes=boxes_in_crops(test_photos.first(settings.samples))), names)
    batches = prefetch(lambda step: make_batch(train, settings, step), range(max(run.step, 0), settings.steps))

    for step in run.steps():  # step 0 comes before training
        if step > 0:
            photos, labels = next(batches)  # (B, 224, 224, 3), (B,)
            run.add_loss(*model.train_on_batch(photos, keras.utils.to_categorical(labels, len(names))))

        if run.is_due(step):
            count = len(test.labels) if step == settings.steps else max(TEST_PHOTOS, settings.samples)
            # Photos -> logits (N, C) and class activation maps of the true classes (N, 13, 13)
            tested = test.first(count)
            logits, maps = predict_class_maps(cam_model, tested.images, tested.labels)
            metrics = evaluate(logits, maps, tested) | localize_photos(cam_model, test_photos.first(count))
            # Maps of the samples (S, 13, 13) -> heatmaps (S, 224, 224), 0..1 -> PNG
            sample_maps = maps[: settings.samples]
            heatmaps = cam.normalize(cam.upsample(sample_maps, SIDE, SIDE))
            save_heatmaps(settings.out, step, samples.images, heatmaps)
            predicted = logits[: settings.samples].argmax(axis=1)
            run.record(metrics, len(tested.labels), predicted, sample_maps)
            page.renew(cam_model, run.history)

    # The same weights in float32 layers, for any machine
    trained = alexnet(len(names), location_dropout=settings.location_dropout)
    trained.set_weights(model.get_weights())
    cam_model = cam.class_activation_model(trained)
    save_figures(settings.out, cam_model, test, names, run.history)
    page.renew(cam_model, run.history, finished=True)
    run.finish(trained, names, images={"short_side": SHORT_SIDE, "pixel_range": (0, 255)})


def evaluate_model(settings):
    """Measures a trained model on all photos of a folder or archive."""
    cam_model = to_cam_model(load_network(settings.evaluate))
    classes = cam_model.output_shape[0][-1]
    names = load_class_names(settings.evaluate) or [str(c) for c in range(classes)]
    if len(names) != classes:
        file = class_names_file(settings.evaluate)
        raise UserError(f"{file} has {len(names)} lines; the model has {classes} classes")
    check_evaluated(settings.evaluate, cam_model, (None, None, 3), max(classes, 2), SHORT_SIDE)  # not of one logit
    photos, counts = load_all_photos(settings.data, names)
    print(describe(settings.data, [f"{len(photos.labels):,} photos"], photos, counts), flush=True)
    starts = tqdm(range(0, len(photos.labels), BATCH), "predicting", leave=False, disable=None)
    crops = (crop(photos.images[start : start + BATCH]) for start in starts)
    logits = np.concatenate([cam_model.predict_on_batch(images)[0] for images in crops])  # (N, C)
    metrics = evaluate(logits, None, photos._replace(boxes=None)) | localize_photos(cam_model, photos, all_metrics=True)
    print(format_metrics(metrics, len(photos.labels)))
    report_classes(settings.out, photos.labels, logits.argmax(axis=1), names)


def describe(data, found, photos, counts):
    """A line about the photos that were found."""
    if photos.boxes is not None:
        found.append(f"{sum(boxes is not None for boxes in photos.boxes):,} test photos with boxes")
    return f"{data}: {', '.join(found)}" + "".join(f"; {count:,} {reason}" for reason, count in counts.items())


def crop(photos):
    """The photos as the network is tested on them: crops (N, 224, 224, 3) uint8."""
    return np.stack([decode(photo, SHORT_SIDE, SIDE) for photo in photos])


def boxes_in_crops(photos):
    """True boxes in pixels of the crops, a list (n, 4) for each photo; None if there are no boxes at all."""
    if photos.boxes is None:
        return None
    found = zip(photos.images, photos.boxes, strict=True)
    return [[] if boxes is None else crop_boxes(photo, boxes, SHORT_SIDE, SIDE) for photo, boxes in found]


def localize_photos(cam_model, photos, all_metrics=False):
    """Metrics of localization on the whole photos, as show.py reads them, of those that have true boxes."""
    if photos.boxes is None:
        return {}
    boxed = [item for item in zip(*photos, strict=True) if item[2] is not None]

    def predict():
        for photo, label, boxes in boxed:
            try:
                picture = read_picture(io.BytesIO(read_bytes(photo)))
                pixels = scale_short_side(picture.pixels, SHORT_SIDE)
            except UserError as error:
                raise UserError(f"{photo.name}: {error}") from None
            height, width = picture.pixels.shape[:2]
            logits, maps = cam_model.predict_on_batch(pixels[None])
            class_map = cam.upsample(maps[:, :, :, label], height, width)[0]  # (H, W)
            yield logits[0], label, class_map, boxes * ([width / picture.width, height / picture.height] * 2)

    return localize(predict(), len(boxed), all_metrics) if boxed else {}


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
    text = "only measure a saved model, on all photos of --data"
    parser.add_argument("--evaluate", type=Path, metavar="MODEL", help=text)
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="only these, such as coffee-mug (default: all)")
    text = "share of each class that is the test set (default: its last 10 photos)"
    parser.add_argument("--test-share", type=number(0, 0.9, float), help=text)
    text = "validate: test on this fifth of the training photos of each class, 1..5, and leave out the test photos"
    parser.add_argument("--fold", type=number(1, 5), help=text)
    settings = parser.parse_args()
    for name in ("categories", "test_share", "fold"):
        if settings.evaluate and getattr(settings, name) is not None:
            parser.error(f"--evaluate measures all photos of --data, without --{name.replace('_', '-')}")
    recipe = "scratch" if str(settings.weights) == "none" else "pretrained"
    fill_in_recipe(parser, settings, recipe, RECIPES)
    run_main("caltech256.py", evaluate_model if settings.evaluate else main, settings)
