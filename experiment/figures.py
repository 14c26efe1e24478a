"""The pictures of a run."""

from concurrent.futures import ThreadPoolExecutor

import keras
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from cam import bounding_box, normalize, overlay, upsample
from experiment.files import atomic_write
from experiment.grid import SIDE, beside, draw_box, enlarge, fit, on_one_scale, save_grid, save_picture, to_image
from experiment.metrics import METRIC_TITLES, SHOWN_METRICS
from experiment.schedule import spread
from experiment.units import get_softmax_weights, largest_terms, receptive_field, unit_model

STRIP_LENGTH = 6  # maps in a strip
MAX_CLASSES = 10  # in classes.png, patterns.png and units.png
EXAMPLES = 8  # images of each class in patterns.png, and of each unit in units.png
CANDIDATES = 50  # test images of each class, the first, from which these are chosen
UNITS = 3  # of each class in units.png
BATCH = 25  # images in a forward pass


def save_images(out, images):
    """Writes `img_S/image_test.png` of each of the test images (S, H, W, 1 or 3)."""
    for index, image in enumerate(images):
        (out / f"img_{index}").mkdir(parents=True, exist_ok=True)
        save_picture(enlarge(image), out / f"img_{index}" / "image_test.png")


def save_heatmaps(out, step, images, heatmaps):
    """Writes `img_S/cmap_STEP.png`: the heatmaps (S, H, W), 0..1, over the images (S, H, W, 1 or 3)."""

    def save(index):
        picture = enlarge(overlay(images[index], heatmaps[index]))
        save_picture(picture, out / f"img_{index}" / f"cmap_{step}.png")

    with ThreadPoolExecutor() as pool:  # zlib releases the interpreter lock
        list(pool.map(save, range(len(images))))


def save_figures(out, cam_model, test, class_names, history):
    """Writes the figures that sum up a run.

    img_S/evolution.png    some maps of test image S in one strip, with step and predicted class
    img_S/classes.png      its maps of all classes (of many, the top ten) on one scale about zero, with logits S_c
    img_S/procedure.png    equation (2): the five largest terms w_k^c f_k, the rest, and their sum M_c
    overview.png           for each class one image, and its maps through the training
    patterns.png           for each class (of many, the first ten that have test images) the images with the highest
                           S_c, with map and box
    units.png              for each of these classes the units with the largest w_k^c, and what they respond to
    accuracy.png           accuracy and localization on test images against training images seen

    Args:
        out: Folder of the run.
        cam_model: Model made by `class_activation_model` from the trained model.
        test: The test images, as a `Split`. The first of them are the samples, of which heatmaps were drawn.
        class_names: Names of the C classes.
        history: `RunFolder.history`.
    """
    save_accuracy(out / "accuracy.png", history)
    rows = [history[position] for position in spread(len(history), STRIP_LENGTH)]
    samples = test.first(len(history[-1]["predicted"]))
    first_of_class = np.unique(samples.labels, return_index=True)[1]
    strips = [strip(out, index, samples.labels[index], rows, class_names) for index in first_of_class]
    save_grid(out / "overview.png", strips, SIDE // 2)
    model, softmax_weights = unit_model(cam_model), get_softmax_weights(cam_model)

    def save_sample(index, feature_maps, pooled, logits, maps):
        folder, image, label = out / f"img_{index}", samples.images[index], samples.labels[index]
        save_grid(folder / "evolution.png", [strip(out, index, label, rows, class_names)])
        title = f"test image {index}: {class_names[label]}"
        shown = top_classes(logits)
        predicted = logits.argmax()
        titles = [f"{class_names[c]}: S = {logits[c]:z.1f}" + (", predicted" if c == predicted else "") for c in shown]
        colors = ["black" if c != predicted else "seagreen" if c == label else "firebrick" for c in shown]
        titles = [(title, "black"), *zip(titles, colors, strict=True)]
        save_class_maps(folder / "classes.png", image, maps[:, :, shown], titles)
        terms = largest_terms(feature_maps, pooled, softmax_weights[:, label])
        save_procedure(folder / "procedure.png", image, title, class_names[label], terms)

    with ThreadPoolExecutor() as pool:
        for batch in batches(len(samples.images)):
            outputs = model.predict_on_batch(samples.images[batch])
            list(pool.map(save_sample, range(batch.start, batch.stop), *outputs))

    # Some test images of each class, to choose from
    classes = np.unique(test.labels)[:MAX_CLASSES]
    candidates = np.concatenate([np.flatnonzero(test.labels == c)[:CANDIDATES] for c in classes])
    candidates = test._replace(images=test.images[candidates], labels=test.labels[candidates], boxes=None)
    units = np.argsort(-softmax_weights[:, classes], axis=0, kind="stable")[:UNITS].T  # k (len(classes), UNITS)
    logits, maps, responses = [], [], []  # S_c (N, C); M_c (N, h, w) of the true classes; f_k (N, h, w, units)
    for batch in batches(len(candidates.labels)):
        feature_maps, _, batch_logits, class_maps = model.predict_on_batch(candidates.images[batch])
        logits.extend(batch_logits)
        for index, label in enumerate(candidates.labels[batch]):
            maps.append(class_maps[index, :, :, label])
            responses.append(feature_maps[index][:, :, units.ravel()])
    save_patterns(out / "patterns.png", candidates, np.array(logits), maps, class_names)
    pairs = [(c, k) for c, of_class in zip(classes, units, strict=True) for k in of_class]
    titles = [f"{class_names[c]}: unit {k}, w = {softmax_weights[k, c]:z.2f}" for c, k in pairs]
    field = receptive_field(keras.Model(model.input, model.outputs[0]), *test.images.shape[1:3])
    save_units(out / "units.png", candidates.images, np.array(responses), titles, field)


def batches(count):
    """Slices of at most BATCH indices each, which cover 0..count-1."""
    return [slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]


def top_classes(logits):
    """The classes to show, 0..C-1: all in their order, or of many those with the highest logits (C,)."""
    return np.arange(len(logits)) if len(logits) <= MAX_CLASSES else np.argsort(-logits)[:MAX_CLASSES]


def strip(out, index, label, rows, class_names):
    """Pictures of test image `index`, for `save_grid`: itself, and its maps in some rows of the history."""
    folder = out / f"img_{index}"
    pictures = [(Image.open(folder / "image_test.png"), f"test image {index}: {class_names[label]}", "black")]
    for row in rows:
        predicted = row["predicted"][index]
        color = "black" if predicted == label else "firebrick"
        picture = Image.open(folder / f"cmap_{row['step']}.png")
        pictures.append((picture, f"step {row['step']:,}: {class_names[predicted]}", color))
    return pictures


def save_class_maps(path, image, maps, titles, boxes=()):
    """Writes an image, and over it its maps for several classes, all on one scale.

    Args:
        path: File to write.
        image: (H, W, 1 or 3) uint8.
        maps: (h, w, n).
        titles: n + 1 pairs of title and color, the first for the image.
        boxes: A box of each map, in pixels of the image, or None.
    """
    pictures = on_one_scale(image, maps, min(max(*image.shape[:2], SIDE // 2), SIDE), boxes)
    row = [(one, title, color) for one, (title, color) in zip(pictures, [*titles, ("scale", "black")], strict=True)]
    save_grid(path, [row[start : start + 6] for start in range(0, len(row), 6)])


def save_procedure(path, image, title, class_name, terms):
    """Writes an image, and over it the terms of equation (2) and their sum, the class activation map, on one scale.

    Args:
        path: File to write.
        image: (H, W, 1 or 3) uint8.
        title: Title of the image.
        class_name: Name of the class.
        terms: `Terms` of the class.
    """
    named = zip(terms.units, terms.weights, terms.parts, strict=False)  # the last part is that of all others
    titles = [title, *(f"{weight:+z.2f} f{unit}: S {part:+z.2f}" for unit, weight, part in named)]
    titles += [f"all others: S {terms.parts[-1]:+z.2f}", f"= map of {class_name}: S = {terms.parts.sum():z.2f}"]
    maps = np.dstack([terms.maps, terms.maps.sum(axis=2)])
    save_class_maps(path, image, maps, [(text, "black") for text in titles])


def save_patterns(path, candidates, logits, maps, class_names):
    """Writes a row for each class: its images with the highest scores, with map and box.

    Args:
        path: File to write.
        candidates: `Split` of N images.
        logits: S_c, (N, C).
        maps: M_c of the true classes, (N, h, w).
        class_names: Names of the C classes.
    """
    rows, predicted = [], logits.argmax(axis=1)
    for label in np.unique(candidates.labels):
        of_class = np.flatnonzero(candidates.labels == label)
        rows.append([])
        for index in of_class[np.argsort(-logits[of_class, label], kind="stable")][:EXAMPLES]:
            image = candidates.images[index]
            class_map = upsample(maps[index][None], *image.shape[:2])[0]
            picture = fit(to_image(overlay(image, normalize(class_map))), SIDE // 2)
            draw_box(picture, bounding_box(class_map), image.shape[1])
            title, color = f"{class_names[label]}: S = {logits[index, label]:z.1f}", "black"
            if predicted[index] != label:
                title, color = f"{title}, predicted {class_names[predicted[index]]}", "firebrick"
            rows[-1].append((picture, title, color))
    save_grid(path, rows)


def save_units(path, images, responses, titles, field):
    """Writes for each unit the images that it responds to most, at the place where it does; three units in a row.

    Args:
        path: File to write.
        images: (N, H, W, 1 or 3) uint8.
        responses: f_k of n units, (N, h, w, n).
        titles: Titles of the units, (n,).
        field: The receptive field, as `receptive_field` returns it. If it covers more than half of an image, the whole
            image is shown, with f_k over it.
    """
    height, width = images.shape[1:3]
    (top, down, rows), (left, right, columns) = field
    cells = []
    for unit, title in enumerate(titles):
        strongest = responses[..., unit].max(axis=(1, 2))
        pictures = []
        for index in np.argsort(-strongest, kind="stable")[:EXAMPLES]:
            f = responses[index, :, :, unit]
            if 2 * rows * columns > height * width:
                picture = overlay(images[index], normalize(upsample(f[None], height, width)[0]))
            else:
                y, x = np.unravel_index(f.argmax(), f.shape)
                padded = np.pad(images[index], [(rows, rows), (columns, columns), (0, 0)])  # black beyond the border
                y, x = rows + top + down * y, columns + left + right * x
                picture = padded[y : y + rows, x : x + columns]
            pictures.append(fit(to_image(picture), SIDE // 4))
        cells.append((beside(pictures), title, "black"))
    save_grid(path, [cells[start : start + UNITS] for start in range(0, len(cells), UNITS)])


def save_accuracy(path, history):
    """Plots accuracy and localization on test images against training images seen."""
    *earlier, last = history
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120, layout="constrained")
    for name in SHOWN_METRICS:
        column, title = f"test_{name}", METRIC_TITLES[name]
        if column not in last:
            continue
        known = [row for row in earlier if column in row]  # of photos, some may have no boxes
        label = f"{title}, all {last['test_images']:,} images: {last[column]:.2%}"
        points = axes.plot(last["images"], 100 * last[column], "D", label=label)
        if known:
            images, values = zip(*((row["images"], 100 * row[column]) for row in known), strict=True)
            label = f"{title}, the first {known[0]['test_images']:,}"
            axes.plot(images, values, ".-", color=points[0].get_color(), label=label)
    axes.set(xlabel="training images seen", ylabel="test images (%)", ylim=(0, 100))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)  # so that millions do not run into each other
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic_write(path) as part:
        figure.savefig(part)
    plt.close(figure)


def report_classes(out, labels, predicted, class_names):
    """Prints the accuracy of each class, and writes `out/confusion.png`, the confusion matrix.

    Args:
        out: Folder, which is made if it is missing.
        labels, predicted: True and predicted classes of N images, (N,), 0..C-1.
        class_names: Names of the C classes.
    """
    confusion = np.zeros((len(class_names), len(class_names)), int)
    np.add.at(confusion, (labels, predicted), 1)
    counts, widest = confusion.sum(axis=1), max(map(len, class_names))
    for name, correct, count in zip(class_names, confusion.diagonal(), counts, strict=True):
        if count:
            print(f"    {name:<{widest}}  {correct:,} of {count:,} ({correct / count:.1%})")
    shown = np.flatnonzero(counts)  # classes that have images
    width, height = (min(2.5 + 0.35 * count, 20) for count in (len(class_names), len(shown)))  # inches
    figure, axes = plt.subplots(figsize=(width, height), dpi=100, layout="constrained")
    axes.imshow(confusion[shown] / counts[shown, None], "Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="predicted", ylabel="true", title="images of each class")
    if len(class_names) <= 60:
        axes.set_xticks(range(len(class_names)), class_names, rotation=90)
        axes.set_yticks(range(len(shown)), [class_names[c] for c in shown])
        for y, c in enumerate(shown):
            for x in np.flatnonzero(confusion[c]):
                color = "white" if 2 * confusion[c, x] > counts[c] else "black"
                axes.text(x, y, confusion[c, x], ha="center", va="center", color=color, size="small")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "confusion.png") as part:
        figure.savefig(part)
    plt.close(figure)
    print(f"confusion matrix: {out / 'confusion.png'}")
