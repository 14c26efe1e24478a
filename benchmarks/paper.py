"""The paper's comparisons, on cluttered MNIST, and the first also on photos.

    python benchmarks/paper.py backpropagation   tables 2 and 3: boxes from the gradient of S_c against boxes from M_c
    python benchmarks/paper.py pooling           section 3.2: average against maximum
    python benchmarks/paper.py dense             table 1: the fully connected layers that the pooling replaces
    python benchmarks/paper.py resolution        section 3.1: feature maps of more and of fewer locations
    python benchmarks/paper.py features          section 4, table 5: digits that the network has never seen
    python benchmarks/paper.py crops             section 4.1, table 4: classifying what the box of a map shows

Each prints a table, and writes a figure to out/paper if there are maps or crops to show. Networks are trained with the
settings of `python mnist.py`, which takes minutes each (`dense`, with settings of its own, half an hour), and their
weights are kept there: comparisons share them. `--seeds 3` trains three of each.

    python benchmarks/paper.py backpropagation --model out/photos/efficientnetb0.keras --photos kangaroos.tar

takes a network and photos with true boxes instead.
"""

import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment import process

if __name__ == "__main__":
    process.start()

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from scipy.ndimage import gaussian_filter
from tqdm import tqdm, trange

import cam
import mnist
from data.dataset import CLASSES, Split, load_dataset
from data.photo_folders import load_all_photos, make_split, read_photo
from experiment.figures import save_grid
from experiment.files import UserError, atomic_write
from experiment.metrics import METRIC_TITLES, batches, evaluate, measure_map, ranks, summarize
from experiment.pictures import draw_box, enlarge, to_image
from experiment.predict import Network
from experiment.preprocessing import SHORT_SIDE
from experiment.settings import ArgumentParser, bounded
from experiment.training import batch_indices, set_seed, shrink
from lenet import RECEPTIVE_FIELD, lenet

DATA, OUT = Path("data"), Path("out/paper")
LOCALIZATION = ("gt_known", "mean_iou", "pointing", "pxap")
COLUMNS = 8  # images in a figure
CROP_SIDE, MARGIN = 32, 4  # pixels: of a crop, as it is scaled; around its box


def trained(name, seed, train, build=lenet, flags=(), **options):
    """The network that `build` makes, trained on a `Split` as by mnist.py; its weights are kept by its name."""
    file = OUT / f"{name}_{seed}.npz"
    settings = mnist.parse_arguments(["--seed", str(seed), *flags])
    if build is lenet:
        options = {"location_dropout": settings.location_dropout} | options
    if not file.exists():
        set_seed(seed)
        model = build(precision=settings.precision, **options)
        mnist.prepare_training(model, settings, train.images[:256])
        one_hot = keras.utils.to_categorical(train.labels)
        for step in trange(settings.steps, desc=f"{name}, seed {seed}", disable=None):
            batch = batch_indices(step, settings.batch_size, len(one_hot), settings.order, settings.seed)
            small = step < settings.small_images * settings.steps
            model.train_on_batch(shrink(train.images[batch]) if small else train.images[batch], one_hot[batch])
        with atomic_write(file) as part, part.open("wb") as npz:
            np.savez(npz, *model.get_weights())
    model = build(**options)  # with float32 layers
    with np.load(file) as weights:
        model.set_weights([weights[name] for name in weights.files])
    return model


def other_network(precision="float32", poolings=1, dense=False):
    """LeNet with another number of poolings after conv2, or with a fully connected layer instead of global pooling."""
    images = keras.Input((100, 100, 1) if dense else (None, None, 1), name="images")
    x = layers.Rescaling(1 / 255)(images)
    x = layers.Conv2D(32, 5, padding="same", activation="relu", dtype=precision, name="conv1")(x)
    x = layers.MaxPooling2D(2, padding="same", dtype=precision)(x)  # (N, 50, 50, 32)
    x = layers.Conv2D(64, 5, padding="same", activation="relu", dtype=precision, name="conv2")(x)
    for _ in range(poolings):
        x = layers.MaxPooling2D(2, padding="same", dtype=precision)(x)
    x = layers.Activation("linear", dtype=precision, name="feature_maps")(x)
    if dense:
        x = layers.Dense(1024, activation="relu", dtype=precision)(layers.Flatten()(x))
        x = layers.Dropout(0.5, dtype="float32")(x)
    else:
        x = layers.Dropout(0.3, (None, None, None, 1), dtype=precision)(x)
        x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    return keras.Model(images, layers.Dense(CLASSES, use_bias=False, dtype="float32", name="softmax_weights")(x))


def compare(networks, test, figure):
    """Prints the metrics of networks, a list over the seeds for each title, and draws the maps of the last of each."""
    rows, maps, first = {}, {}, test.first(COLUMNS)
    for title, models in networks.items():
        cam_models = [cam.class_activation_model(model) for model in models]
        rows[title] = [evaluate(cam_model, test, all_metrics=True)[0] for cam_model in cam_models]
        _, _, class_maps = evaluate(cam_models[-1], first)
        maps[title] = cam.upsample(np.stack(class_maps), *first.images.shape[1:3])
    print_table(rows, len(test.labels), ("accuracy", *LOCALIZATION))
    save_figure(figure, first, maps)


def print_table(rows, count, names):
    """Prints metrics by name, a list over the seeds in each row, as Markdown: mean and standard deviation."""
    error = 0.5 / count**0.5  # of a share of one half; others have less
    print(f"\n{count:,} test images, standard error of a share up to {error:.1%}; +- is the deviation over seeds\n")
    print("| | seeds |", " | ".join(METRIC_TITLES.get(name, name) for name in names), "|")
    print("|---" * (2 + len(names)) + "|")
    for title, measured in rows.items():
        cells = []
        for name in names:
            values = [metrics[name] for metrics in measured]
            form = ",.0f" if values[0] > 1 else ".3f" if name in ("mean_iou", "pxap") else ".1%"
            spread = f" +- {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):{form}}{spread}")
        print(f"| {title} | {len(measured)} |", " | ".join(cells), "|")


def save_figure(name, test, rows):
    """Writes the images of a `Split` with their true boxes, and below them rows of maps (H, W) with their boxes."""
    grid = [[]]
    for image, boxes in zip(test.images, test.boxes, strict=True):
        grid[0].append(cell(image, tuple(np.reshape(boxes, (-1, 4))[0]), "true box"))
    for title, maps in rows.items():
        grid.append([])
        for image, class_map in zip(test.images, maps, strict=True):
            heatmap = cam.overlay(image, cam.normalize(class_map))
            grid[-1].append(cell(heatmap, cam.bounding_box(class_map), title))
    save_grid(OUT / f"{name}.png", grid)
    print(f"\n{OUT / name}.png")


def cell(pixels, box, title):
    picture = to_image(enlarge(pixels, 200)).convert("RGB")
    draw_box(picture, box, pixels.shape[1])
    return picture, title, "black"


def backpropagation(arguments, train, test):
    network = Network(arguments.model)
    if arguments.photos:
        photos, _ = load_all_photos(arguments.photos, network.class_names, network.wordnet_ids)
        test = make_split(photos, SHORT_SIDE, lambda photo: network.preprocess(read_photo(photo).pixels))
        if test.boxes is None or any(boxes is None for boxes in test.boxes):
            raise UserError(f"{arguments.photos}: each photo must have a true box")
    measured, examples, all_logits = {}, {}, []
    for inputs in tqdm(batches(test.inputs, 1), total=len(test.labels), disable=None):
        index = len(all_logits)
        label, size = test.labels[index], test.images[index].shape[:2]
        logits, class_map, gradient = differentiate(network.cam_model, inputs, label)
        all_logits.append(logits)
        saliency = np.abs(gradient).max(axis=2)  # Simonyan et al. 2014, section 3.1
        product = np.abs((gradient * inputs[0]).sum(axis=2))
        sigma = len(gradient) / len(class_map) / 2  # half a location
        maps = {
            "CAM": class_map,
            "gradient": saliency,
            "gradient, blurred": gaussian_filter(saliency, sigma),
            "gradient x image": product,
            "gradient x image, blurred": gaussian_filter(product, sigma),
        }
        for name, one in maps.items():
            one = cam.upsample(one[None], *size)[0]
            measured.setdefault(name, []).append(measure_map(one, test.boxes[index], all_metrics=True))
            examples.setdefault(name, []).append(one)
    true_ranks = ranks(np.array(all_logits), test.labels)
    print_table({name: [summarize(m, true_ranks)] for name, m in measured.items()}, len(test.labels), LOCALIZATION)
    examples = {name: one[:COLUMNS] for name, one in examples.items()}
    save_figure("backpropagation_photos" if arguments.photos else "backpropagation", test.first(COLUMNS), examples)


def differentiate(cam_model, images, label):
    """S_c (C,), M_c (h, w), and the gradient of S_c with respect to the image, (H, W, channels), of a batch of one."""
    images = tf.convert_to_tensor(images, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits, maps = cam_model(images)
        score = logits[0, label]
    return logits[0].numpy(), maps[0, :, :, label].numpy(), tape.gradient(score, images)[0].numpy()


def pooling(arguments, train, test):
    networks = {}
    for name, dropout in itertools.product(("average", "max"), (0.0, 0.3)):
        title = f"{name}, {'30%' if dropout else 'nothing'} hidden"
        file = "default" if (name, dropout) == ("average", 0.3) else f"{name}_{dropout}"
        options = {"pooling": name, "location_dropout": dropout}
        networks[title] = [trained(file, seed, train, **options) for seed in range(arguments.seeds)]
    compare(networks, test, "pooling")


def dense(arguments, train, test):
    rows = {"global average pooling": [], "fully connected, 1,024 units": []}
    for seed in range(arguments.seeds):
        # At 0.03 a layer of 41 million weights does not learn; it takes images of one size.
        flags = "--learning-rate", "0.001", "--small-images", "0"
        models = trained("default", seed, train), trained("dense", seed, train, other_network, flags, dense=True)
        for title, model in zip(rows, models, strict=True):
            accuracy = (model.predict(test.images, 50, verbose=0).argmax(axis=1) == test.labels).mean()
            started = time.perf_counter()
            model.predict(test.images, 50, verbose=0)
            speed = len(test.labels) / (time.perf_counter() - started)
            rows[title].append({"accuracy": accuracy, "weights": model.count_params(), "images per second": speed})
    print_table(rows, len(test.labels), ("accuracy", "weights", "images per second"))


def resolution(arguments, train, test):
    _, test = load_dataset(DATA, 8)  # 104 x 104 pixels, so that the maps of all three networks fit the images
    networks = {"50 x 50": [], "25 x 25, the default": [], "13 x 13": []}
    for seed in range(arguments.seeds):
        for poolings, title in enumerate(networks):
            name = "default" if poolings == 1 else f"poolings_{poolings}"
            other = {} if poolings == 1 else {"build": other_network, "poolings": poolings}
            networks[title].append(trained(name, seed, train, **other))
    compare(networks, test, "resolution")


def features(arguments, train, test):
    """Linear classifiers of the digits 5 to 9 on F_k of networks that have, or have not, seen them."""
    low, high, unseen = subset(train, 0, 4), subset(train, 5, 9), subset(test, 5, 9)
    networks = {"untrained": [], "trained on 0 to 4": [], "trained on 0 to 9": []}
    for seed in range(arguments.seeds):
        set_seed(seed)
        models = lenet(), trained("digits_0_to_4", seed, low, classes=5), trained("default", seed, train)
        for title, model in zip(networks, models, strict=True):
            networks[title].append(classify_features(model, high))
    compare(networks, unseen, "features")


def subset(split, first, last):
    """The images of the classes `first` to `last` of a `Split`, which become the classes 0, 1 ..."""
    chosen = (split.labels >= first) & (split.labels <= last)
    return Split(split.images[chosen], split.labels[chosen] - first, split.boxes[chosen])


def classify_features(model, train):
    """A network with the feature maps of `model`, and softmax weights fitted to a `Split` by least squares (no SVM)."""
    classes = int(train.labels.max()) + 1
    pooled = keras.Model(model.input, model.get_layer("softmax_weights").input).predict(train.images, 50, verbose=0)
    targets = np.eye(classes)[train.labels] - 1 / classes  # so that a unit's weights have a mean of zero
    softmax_weights = np.linalg.lstsq(pooled.astype(np.float64), targets)[0]  # (K, C)
    classifier = lenet(1, classes)
    classifier.set_weights([*model.get_weights()[:-1], softmax_weights])
    return classifier


def crops(arguments, train, test):
    rows = {"the whole image": [], "box of the predicted class": [], "true box": []}
    for seed in range(arguments.seeds):
        model = trained("default", seed, train)
        found = [split._replace(images=cut_out(split.images, predicted_boxes(model, split))) for split in (train, test)]
        true = [split._replace(images=cut_out(split.images, split.boxes)) for split in (train, test)]
        kinds = (train, test), found, true
        models = model, trained("crops_predicted", seed, found[0]), trained("crops_true", seed, true[0])
        for title, (_, seen), one in zip(rows, kinds, models, strict=True):
            accuracy = (one.predict(seen.images, 50, verbose=0).argmax(axis=1) == seen.labels).mean()
            rows[title].append({"accuracy": accuracy})
    print_table(rows, len(test.labels), ("accuracy",))
    grid = []
    for title, (_, seen) in zip(rows, kinds, strict=True):
        grid.append([cell(255 - image, None, title) for image in seen.images[:COLUMNS]])
    save_grid(OUT / "crops.png", grid)


def predicted_boxes(model, split):
    """For each image the box of the map of the class with the highest score; the whole image if it has none."""
    size, boxes = split.images.shape[1:3], []
    for images in batches(split.images, 50):
        logits, maps = cam.class_activation_model(model).predict_on_batch(images)
        maps = maps[np.arange(len(images)), :, :, logits.argmax(axis=1)]
        boxes += [cam.bounding_box(one) or (0, 0, size[1], size[0]) for one in cam.upsample(maps, *size)]
    return boxes


def cut_out(images, boxes):
    """The squares around boxes, with a margin, scaled to (N, CROP_SIDE, CROP_SIDE, 1) uint8; black beyond the image."""
    cut = []
    for image, (x0, y0, x1, y1) in zip(images, boxes, strict=True):
        half = max(x1 - x0, y1 - y0) / 2 + MARGIN
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        square = tuple(round(edge) for edge in (x - half, y - half, x + half, y + half))
        cut.append(np.asarray(to_image(image).crop(square).resize((CROP_SIDE, CROP_SIDE))))
    return np.stack(cut)[..., None]


def compare_as_asked(arguments):
    OUT.mkdir(parents=True, exist_ok=True)
    train, test = (None, None) if arguments.photos else load_dataset(DATA, RECEPTIVE_FIELD["stride"])
    globals()[arguments.comparison](arguments, train, test)


def main(arguments=None):
    parser = ArgumentParser("paper.py", __doc__)
    comparisons = "backpropagation", "pooling", "dense", "resolution", "features", "crops"
    parser.add_argument("comparison", choices=comparisons)
    parser.add_argument("--seeds", default=1, type=bounded(1), help="networks of each kind (default: 1)")
    parser.add_argument("--model", default="data/lenet.keras", help="network of backpropagation (default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="photos with true boxes for backpropagation")
    process.run_script("paper.py", compare_as_asked, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
