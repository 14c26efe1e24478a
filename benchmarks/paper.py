"""The paper's comparisons, on cluttered MNIST, and the first also on photos.

    python benchmarks/paper.py backpropagation   tables 2 and 3: boxes from the gradient of S_c against boxes from M_c
    python benchmarks/paper.py pooling           section 3.2: average against maximum
    python benchmarks/paper.py dense             table 1: the fully connected layers that the pooling replaces
    python benchmarks/paper.py resolution        section 3.1: feature maps of more and of fewer locations
    python benchmarks/paper.py features          section 4, table 5: digits that the network has never seen
    python benchmarks/paper.py crops             section 4.1, table 4: classifying what the box of a map shows

Each prints a table and writes a figure to out/paper. Networks are trained as by `python mnist.py`, which takes minutes
each, and kept there: what was stopped goes on, and comparisons share them. `--seeds 3` trains three of each.

    python benchmarks/paper.py backpropagation --model out/photos/efficientnetb0.keras --photos kangaroos.tar

takes a network and photos with true boxes instead.
"""

import argparse
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
from keras import layers
from scipy.ndimage import gaussian_filter
from tqdm import tqdm, trange

import cam
import mnist
from data.dataset import CLASSES, Split, load_dataset
from data.photo_folders import load_all_photos, read_photo
from experiment.figures import save_grid
from experiment.metrics import METRIC_TITLES, batches, evaluate, measure_map, ranks, summarize
from experiment.pictures import draw_box, enlarge, to_image
from experiment.predict import Network
from experiment.training import batch_indices, set_seed
from lenet import RECEPTIVE_FIELD, lenet
from photos import SHORT_SIDE, make_split

OUT = Path("out") / "paper"
LOCALIZATION = ("gt_known", "mean_iou", "pointing", "pxap")
COLUMNS = 8  # images in a figure
CROP_SIDE, MARGIN = 32, 4  # pixels: of a crop, as it is scaled; around its box


def trained(name, seed, train, build=lenet, **options):
    """The network that `build` makes, trained on a `Split` by the default recipe; its weights are kept by its name."""
    file = OUT / f"{name}_{seed}.weights.h5"
    settings = mnist.parse_arguments(["--seed", str(seed)])
    if build is lenet:
        options = {"location_dropout": settings.location_dropout} | options
    if not file.exists():
        set_seed(seed)
        model = build(precision=settings.precision, **options)
        mnist.prepare_training(model, settings, train.images[:256])
        one_hot = keras.utils.to_categorical(train.labels)
        for step in trange(settings.steps, desc=f"{name}, seed {seed}", disable=None):
            batch = batch_indices(step, settings.batch_size, len(one_hot), settings.order, settings.seed)
            model.train_on_batch(train.images[batch], one_hot[batch])
        model.save_weights(file)
    model = build(**options)  # with float32 layers
    model.load_weights(file)
    return model


def other_network(precision="float32", poolings=1, dense=False):
    """LeNet with another number of poolings after conv2, or with a fully connected layer instead of global pooling."""
    images = keras.Input((100, 100, 1), name="images")
    x = layers.Rescaling(1 / 255)(images)
    x = layers.Conv2D(32, 5, padding="same", activation="relu", dtype=precision, name="conv1")(x)
    x = layers.MaxPooling2D(2, dtype=precision)(x)  # (N, 50, 50, 32)
    x = layers.Conv2D(64, 5, padding="same", activation="relu", dtype=precision, name="conv2")(x)
    for _ in range(poolings):
        x = layers.MaxPooling2D(2, dtype=precision)(x)
    x = layers.Activation("linear", dtype=precision, name="feature_maps")(x)
    if dense:
        x = layers.Dense(1024, activation="relu", dtype=precision)(layers.Flatten()(x))
        x = layers.Dropout(0.5, dtype="float32")(x)
    else:
        x = layers.Dropout(0.3, (None, None, None, 1), dtype=precision)(x)
        x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    return keras.Model(images, layers.Dense(CLASSES, use_bias=False, dtype="float32", name="softmax_weights")(x))


def measure(model, test):
    metrics, _, _ = evaluate(cam.class_activation_model(model), test, all_metrics=True)
    return metrics


def print_table(rows, count, names=("accuracy", *LOCALIZATION)):
    """Prints metrics by name, a list over the seeds in each row, as Markdown: mean and standard deviation."""
    error = 0.5 / count**0.5  # of a share of one half; others have less
    print(f"\n{count:,} test images, standard error of a share up to {error:.1%}; +- is the deviation over seeds\n")
    print("| | seeds |", " | ".join(METRIC_TITLES.get(name, name) for name in names), "|")
    print("|---" * (2 + len(names)) + "|")
    for title, measured in rows.items():
        cells = []
        for name in names:
            values = [metrics[name] for metrics in measured if name in metrics]
            form = ",.0f" if values and values[0] > 1 else ".3f" if name in ("mean_iou", "pxap") else ".1%"
            spread = f" +- {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):{form}}{spread}" if values else "")
        print(f"| {title} | {len(measured)} |", " | ".join(cells), "|")


def save_figure(name, images, rows, boxes):
    """Writes images with true boxes, and below them a row of maps (H, W) for each title in `rows`, with their boxes."""

    def picture(pixels, box):
        image = to_image(enlarge(pixels, 200)).convert("RGB")
        draw_box(image, None if box is None else tuple(box), pixels.shape[1])
        return image

    grid = [[(picture(image, box), "true box", "black") for image, box in zip(images, boxes, strict=True)]]
    for title, maps in rows.items():
        drawn = [
            (cam.overlay(image, cam.normalize(m)), cam.bounding_box(m)) for image, m in zip(images, maps, strict=True)
        ]
        grid.append([(picture(pixels, box), title, "black") for pixels, box in drawn])
    save_grid(OUT / f"{name}.png", grid)
    print(f"\n{OUT / name}.png")


def maps_of(model, test):
    """M_c of the true classes at the size of the images, (N, H, W)."""
    _, _, maps = evaluate(cam.class_activation_model(model), test)
    return cam.upsample(np.stack(maps), *test.images.shape[1:3])


def backpropagation(arguments, train, test):
    import tensorflow as tf

    network = Network(arguments.model)
    if arguments.photos:
        photos, _ = load_all_photos(arguments.photos, network.class_names, network.wordnet_ids)
        test = make_split(photos, SHORT_SIDE, lambda photo: network.preprocess(read_photo(photo).pixels))
    measured, all_logits, examples = {}, [], {}
    progress = tqdm(total=len(test.labels), disable=None)
    for inputs in batches(test.inputs, 50):
        start = len(all_logits)
        x = tf.convert_to_tensor(inputs, tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits, maps = network.cam_model(x)
            score = tf.reduce_sum(tf.gather(logits, test.labels[start : start + len(x)], axis=1, batch_dims=1))
        gradients = tape.gradient(score, x).numpy()
        all_logits += list(logits.numpy())
        for index, (gradient, class_map) in enumerate(zip(gradients, maps.numpy(), strict=True), start):
            size = test.images[index].shape[:2]
            saliency = np.abs(gradient).max(axis=2)  # Simonyan et al. 2014, section 3.1
            sigma = len(gradient) / len(class_map)  # one location
            found = {
                "CAM": class_map[:, :, test.labels[index]],
                "gradient": saliency,
                "gradient, blurred": gaussian_filter(saliency, sigma),
                "gradient x image": np.abs((gradient * inputs[index - start]).sum(axis=2)),
            }
            found = {name: cam.upsample(one[None], *size)[0] for name, one in found.items()}
            for name, one in found.items():
                measured.setdefault(name, []).append(measure_map(one, test.boxes[index], all_metrics=True))
                if index < COLUMNS:
                    examples.setdefault(name, []).append(one)
            progress.update()
    progress.close()
    true_ranks = ranks(np.array(all_logits), test.labels)
    print_table({name: [summarize(m, true_ranks)] for name, m in measured.items()}, len(test.labels), LOCALIZATION)
    first = test.first(COLUMNS)
    boxes = [np.reshape(boxes, (-1, 4))[0] for boxes in first.boxes]
    save_figure(
        "backpropagation_photos" if arguments.photos else "backpropagation", list(first.images), examples, boxes
    )


def pooling(arguments, train, test):
    rows, examples, first = {}, {}, test.first(COLUMNS)
    for name, dropout in itertools.product(("average", "max"), (0.0, 0.3)):
        title = f"{name}, {'nothing' if dropout == 0 else '30%'} hidden"
        for seed in range(arguments.seeds):
            file = "default" if (name, dropout) == ("average", 0.3) else f"{name}_{dropout}"
            model = trained(file, seed, train, pooling=name, location_dropout=dropout)
            rows.setdefault(title, []).append(measure(model, test))
        examples[title] = maps_of(model, first)
    print_table(rows, len(test.labels))
    save_figure("pooling", first.images, examples, first.boxes)


def dense(arguments, train, test):
    rows = {}
    for seed in range(arguments.seeds):
        for title, model in (
            ("global average pooling", trained("default", seed, train)),
            ("fully connected, 1,024 units", trained("dense", seed, train, other_network, dense=True)),
        ):
            accuracy = (model.predict(test.images, 50, verbose=0).argmax(axis=1) == test.labels).mean()
            started = time.perf_counter()
            model.predict(test.images, 50, verbose=0)
            speed = len(test.labels) / (time.perf_counter() - started)
            metrics = {"accuracy": accuracy, "weights": model.count_params(), "images per second": speed}
            rows.setdefault(title, []).append(metrics)
    print_table(rows, len(test.labels), ("accuracy", "weights", "images per second"))


def resolution(arguments, train, test):
    rows, examples, first = {}, {}, test.first(COLUMNS)
    for poolings, title in enumerate(("50 x 50", "25 x 25, the default", "12 x 12")):
        for seed in range(arguments.seeds):
            if poolings == 1:
                model = trained("default", seed, train)
            else:
                model = trained(f"poolings_{poolings}", seed, train, other_network, poolings=poolings)
            rows.setdefault(title, []).append(measure(model, test))
        examples[title] = maps_of(model, first)
    print_table(rows, len(test.labels))
    save_figure("resolution", first.images, examples, first.boxes)


def features(arguments, train, test):
    """A linear classifier of the digits 5 to 9 on F_k of networks that have, or have not, seen them."""
    low, high, unseen = (
        subset(train, train.labels < 5),
        subset(train, train.labels >= 5),
        subset(test, test.labels >= 5),
    )
    high, unseen = (split._replace(labels=split.labels - 5) for split in (high, unseen))
    rows, examples, first = {}, {}, unseen.first(COLUMNS)
    for title in "untrained", "trained on 0 to 4", "trained on 0 to 9":
        for seed in range(arguments.seeds):
            keras.utils.set_random_seed(seed)
            model = lenet()
            if title == "trained on 0 to 4":
                model = trained("digits_0_to_4", seed, low, classes=5)
            elif title == "trained on 0 to 9":
                model = trained("default", seed, train)
            classifier = classify_features(model, high)
            rows.setdefault(title, []).append(measure(classifier, unseen))
        examples[title] = maps_of(classifier, first)
    print_table(rows, len(unseen.labels))
    save_figure("features", first.images, examples, first.boxes)


def subset(split, chosen):
    return Split(*(None if field is None else field[chosen] for field in split))


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
    rows, pictures, images = {}, {}, test.images[:COLUMNS]
    for seed in range(arguments.seeds):
        model = trained("default", seed, train)
        rows.setdefault("the whole image", []).append(measure(model, test))
        for title, name in ("box of the predicted class's map", "predicted"), ("true box", "true"):
            boxes = [predicted_boxes(model, split) if name == "predicted" else split.boxes for split in (train, test)]
            cut = [
                split._replace(images=cut_out(split.images, b)) for split, b in zip((train, test), boxes, strict=True)
            ]
            second = trained(f"crops_{name}", seed, cut[0])
            predicted = second.predict(cut[1].images, 50, verbose=0).argmax(axis=1)
            rows.setdefault(title, []).append({"accuracy": (predicted == test.labels).mean()})
            pictures[title] = cut[1].images[:COLUMNS]
    print_table(rows, len(test.labels), ("accuracy",))
    grid = [[(to_image(255 - enlarge(image, 200)), "test image", "black") for image in images]]
    for title, row in pictures.items():
        grid.append([(to_image(255 - enlarge(image, 200)), title, "black") for image in row])
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comparisons = (backpropagation, pooling, dense, resolution, features, crops)
    parser.add_argument("comparison", choices=[function.__name__ for function in comparisons])
    parser.add_argument("--seeds", default=1, type=int, help="networks of each kind (default: 1)")
    parser.add_argument("--model", default="out/lenet.keras", help="network of backpropagation (default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="photos with true boxes for backpropagation")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    train, test = (None, None) if arguments.photos else load_dataset(Path("data"), RECEPTIVE_FIELD["stride"])
    [function] = [function for function in comparisons if function.__name__ == arguments.comparison]
    process.run_script("paper.py", lambda arguments: function(arguments, train, test), arguments)


if __name__ == "__main__":
    main()
