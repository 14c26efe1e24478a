"""Trains AlexNet on photos of Caltech-256, or on your own, and shows where it looks as it learns.

    python caltech256.py --data 256_ObjectCategories.tar --weights alexnet.npz     convolutions from ImageNet
    python caltech256.py --data 256_ObjectCategories.tar --weights none            from random weights
    python caltech256.py --data photos --weights alexnet.npz                       a folder photos/CLASS for each class

archive -> photos -> batches -> AlexNet -> feature maps -> class activation maps -> heatmaps
"""

from experiment import process

if __name__ == "__main__":
    process.start()  # before TensorFlow is imported, which logs its start-up

import io
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

import cam
from alexnet import CONVOLUTIONS, CROP_SIDE, SHORT_SIDE, alexnet, set_convolutions
from data.archive import read_bytes
from data.dataset import Split
from data.photos import BOXES_CSV, crop_boxes, decode, load_all_photos, load_photos
from experiment import metrics, networks
from experiment.figures import report_classes, save_figures
from experiment.files import UserError
from experiment.images import read_picture, scale_short_side
from experiment.pictures import save_heatmaps, save_images
from experiment.run import RunFolder
from experiment.settings import bounded, fill_in_recipe, make_parser
from experiment.training import JIT_COMPILE, batch_indices, keep_zero_mean_over_classes, set_seed, warmup_cosine

# All settings; each is a flag, see `python caltech256.py --help`.
SETTINGS = {
    "data": Path("data/256_ObjectCategories.tar"),
    "weights": Path("data/alexnet.npz"),
    "batch_size": 32,
    "learning_rate": 1e-3,  # of Adam, at its peak
    "warmup": 0.1,  # share of the steps in which the rate rises to its peak; then it falls to 0 along a cosine
    "label_smoothing": 0.0,
    "location_dropout": 0.3,  # ours, not the paper's: share of the locations hidden in a step, see `alexnet`
    "precision": "auto",
    "out": Path("out/caltech256"),
    "eval_every": 100,  # steps between two evaluations, each with a heatmap of every sample
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
FIRST_TEST_PHOTOS = 100  # evaluated during training; the final evaluation takes all


def train_model(settings):
    set_seed(settings.seed)

    # Archive -> photos, which stay in it until a batch needs them; test photos -> crops (N, 224, 224, 3) uint8
    weights = networks.load_torchvision_convolutions(settings.weights) if settings.recipe == "pretrained" else None
    train, test, names, counts = load_photos(settings.data, settings.categories, settings.test_share, settings.fold)
    count = len(train.labels)
    found = [f"{count:,} training photos, {len(test.labels):,} test photos of {len(names)} classes"]
    print(describe(settings.data, found, test, counts), flush=True)
    if test.boxes is None:
        print(f"{settings.data} has no {BOXES_CSV}, so localization is not measured", flush=True)
    if settings.batch_size > count:
        raise UserError(f"--batch-size {settings.batch_size} is more than the {count} training photos")
    settings.steps = settings.steps or settings.epochs * count // settings.batch_size
    crops = Split(crop(test.files), test.labels, None)
    samples = crops.first(settings.samples)  # the S crops of the heatmaps

    # Photos -> feature maps f_k -> global average pooling F_k -> softmax weights w_k^c -> logits S_c, equation (1)
    model = build_model(settings, len(names), weights)
    # The same layers and weights: photos -> S_c (N, C) and M_c, equation (2) (N, 13, 13, C)
    cam_model = cam.class_activation_model(model)

    # Lock, checkpoint (restored into the model), history, page
    run = RunFolder(settings, model, (train.fingerprint(), test.fingerprint()))
    if run.finished:
        return
    print(f"{settings.steps:,} steps of {settings.batch_size} photos, {settings.recipe} recipe, {settings.precision}")
    run.open_page(samples, names, boxes_in_crops(test.first(settings.samples)))
    save_images(settings.out, samples.images)
    batches = prefetch(lambda step: make_batch(train, settings, step), range(max(run.step, 0), settings.steps))

    for step in run.steps():  # step 0 evaluates the untrained model
        if step > 0:
            photos, labels = next(batches)  # (B, 224, 224, 3), (B,)
            run.add_loss(*model.train_on_batch(photos, keras.utils.to_categorical(labels, len(names))))

        if run.is_due(step):
            tested = len(test.labels) if step == settings.steps else max(FIRST_TEST_PHOTOS, settings.samples)
            # Crops -> logits S_c (N, C) and class activation maps M_c of the true classes (N, 13, 13)
            measured, logits, maps = metrics.evaluate(cam_model, crops.first(tested))
            measured |= localize_photos(cam_model, test.first(tested))
            # Maps of the samples -> size of the crops (S, 224, 224) -> heatmaps, 0..1 -> img_0/cmap_100.png ...
            upsampled = cam.upsample(maps[: settings.samples], CROP_SIDE, CROP_SIDE)
            save_heatmaps(settings.out, step, samples.images, cam.normalize(upsampled))
            boxes = [cam.bounding_box(class_map) for class_map in upsampled]
            run.record(measured, len(logits), logits.argmax(axis=1)[: settings.samples], boxes)

    # The same weights in float32 layers, for any machine
    float32_model = alexnet(len(names), location_dropout=settings.location_dropout)
    float32_model.set_weights(model.get_weights())
    run.save_model(float32_model, names, preprocessing={"short_side": SHORT_SIDE, "pixel_range": (0, 255)})
    save_figures(settings.out, float32_model, crops, names, run.history)
    run.finish()


def build_model(settings, classes, weights):
    """Builds the compiled AlexNet-GAP that is trained, from ImageNet weights or, if `weights` is None, from none."""
    model = alexnet(classes, settings.precision, settings.location_dropout)
    if weights:
        set_convolutions(model, weights)
        for name in CONVOLUTIONS:  # frozen, a step takes a third of the time
            model.get_layer(name).trainable = settings.pretrained_lr_scale > 0
    keep_zero_mean_over_classes(model.get_layer("softmax_weights"))  # ours, not the paper's: see its docstring
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing)
    model.compile(make_optimizer(settings), loss, metrics=["accuracy"], jit_compile=JIT_COMPILE)
    return model


def evaluate_model(settings):
    """Measures a trained model on all photos of a folder or archive."""
    cam_model = networks.to_cam_model(networks.load_network(settings.evaluate))
    classes = cam_model.output_shape[0][-1]
    names = networks.load_class_names(settings.evaluate) or [str(c) for c in range(classes)]
    if len(names) != classes:
        file = networks.class_names_file(settings.evaluate)
        raise UserError(f"{file} has {len(names)} lines; the model has {classes} classes")
    shape = None, None, 3
    networks.check_model_fits_data(settings.evaluate, cam_model, shape, max(classes, 2), SHORT_SIDE)  # not one logit
    photos, counts = load_all_photos(settings.data, names)
    print(describe(settings.data, [f"{len(photos.labels):,} photos"], photos, counts), flush=True)
    logits = []
    for start in tqdm(range(0, len(photos.labels), metrics.EVALUATION_BATCH), "predicting", leave=False, disable=None):
        crops = crop(photos.files[start : start + metrics.EVALUATION_BATCH])
        logits.append(cam_model.predict_on_batch(crops)[0])
    logits = np.concatenate(logits)  # (N, C)
    metrics.check_finite(logits)
    measured = {"accuracy": metrics.accuracy(logits, photos.labels)}
    measured |= localize_photos(cam_model, photos, all_metrics=True)
    print(metrics.format_metrics(measured, len(photos.labels)))
    report_classes(settings.out, photos.labels, logits.argmax(axis=1), names)


def describe(data, found, photos, counts):
    """A line about the photos that were found."""
    if photos.boxes is not None:
        found.append(f"{sum(boxes is not None for boxes in photos.boxes):,} test photos with boxes")
    return f"{data}: {', '.join(found)}" + "".join(f"; {count:,} {reason}" for reason, count in counts.items())


def crop(files):
    """The photos as the network is tested on them: crops (N, 224, 224, 3) uint8."""
    return np.stack([decode(file, SHORT_SIDE, CROP_SIDE) for file in files])


def boxes_in_crops(photos):
    """True boxes in pixels of the crops, a list (n, 4) for each photo; None if there are no boxes at all."""
    if photos.boxes is None:
        return None
    found = zip(photos.files, photos.boxes, strict=True)
    return [[] if boxes is None else crop_boxes(file, boxes, SHORT_SIDE, CROP_SIDE) for file, boxes in found]


def localize_photos(cam_model, photos, all_metrics=False):
    """Metrics of localization, measured on the whole photos, as show.py reads them; {} if none has true boxes."""
    boxed = [index for index, boxes in enumerate(photos.boxes or []) if boxes is not None]
    logits, measured = [], []
    hidden = None if all_metrics else True  # None: the progress bar is shown on a terminal only
    for index in tqdm(boxed, "measuring", leave=False, disable=hidden):
        file, label, boxes = photos.files[index], photos.labels[index], photos.boxes[index]
        try:
            picture = read_picture(io.BytesIO(read_bytes(file)))
            pixels = scale_short_side(picture.pixels, SHORT_SIDE)
        except UserError as error:
            raise UserError(f"{file.name}: {error}") from None
        height, width = picture.pixels.shape[:2]
        photo_logits, maps = cam_model.predict_on_batch(pixels[None])
        class_map = cam.upsample(maps[:, :, :, label], height, width)[0]  # (H, W)
        boxes = boxes * ([width / picture.width, height / picture.height] * 2)
        logits.append(photo_logits[0])
        measured.append(metrics.measure_map(class_map, boxes, all_metrics))
    return metrics.summarize(measured, metrics.ranks(np.array(logits), photos.labels[boxed])) if boxed else {}


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
    batch = batch_indices(step, settings.batch_size, len(train.files), "shuffled", settings.seed)
    photos = np.stack([decode(train.files[index], SHORT_SIDE, CROP_SIDE, rng) for index in batch])
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


def parse_arguments(arguments=None):
    """The settings of a command line: a list of arguments, by default those of the process."""
    parser = make_parser("caltech256.py", __doc__, SETTINGS, RECIPES)
    text = "only measure a saved model, on all photos of --data"
    parser.add_argument("--evaluate", type=Path, metavar="MODEL", help=text)
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="only these, such as coffee-mug (default: all)")
    text = "share of each class that is the test set (default: its last 10 photos)"
    parser.add_argument("--test-share", type=bounded(0, 0.9, float), help=text)
    text = "validate: test on this fifth of the training photos of each class, 1..5, and leave out the test photos"
    parser.add_argument("--fold", type=bounded(1, 5), help=text)
    settings = parser.parse_args(arguments)
    for name in ("categories", "test_share", "fold"):
        if settings.evaluate and getattr(settings, name) is not None:
            parser.error(f"--evaluate measures all photos of --data, without --{name.replace('_', '-')}")
    recipe = "scratch" if str(settings.weights) == "none" else "pretrained"
    fill_in_recipe(parser, settings, recipe, RECIPES)
    return settings


def main(arguments=None):
    settings = parse_arguments(arguments)
    if settings.evaluate:
        process.run_script("caltech256.py", evaluate_model, settings)
    else:
        process.run_script("caltech256.py", train_model, settings, process.RESUME)


if __name__ == "__main__":
    main()
