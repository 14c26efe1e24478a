"""The figures that sum up a run."""

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from cam import bounding_box, normalize, overlay, upsample
from experiment.files import atomic_write
from experiment.images import read_picture
from experiment.metrics import METRIC_TITLES, SHOWN_METRICS, batches
from experiment.pictures import PICTURE_SIDE, draw_box, fit, on_one_scale, save_grid, to_image
from experiment.units import largest_terms, unit_model

FIGURES = ("overview.png", "patterns.png", "units.png", "confusion.png")
SAMPLE_FIGURES = ("image_test.png", "cmap_[0-9]*.png", "evolution.png", "classes.png", "procedure.png")
STRIP_LENGTH = 6  # maps in a strip
MAX_CLASSES = 10  # in classes.png, patterns.png and units.png
EXAMPLES = 8  # images of each class in patterns.png, and of each unit in units.png
CANDIDATES = 50  # test images of each class, the first, from which these are chosen
UNITS = 3  # of each class in units.png
FIGURE_BATCH = 25  # images in a forward pass whose feature maps are kept


def save_figures(out, model, test, class_names, history, receptive_field=None):
    """Writes the figures that sum up a run.

    Args:
        out: Folder of the run.
        model: The trained network, with the layers "feature_maps" and "softmax_weights".
        test: The `Split` of test images. The first are the samples, of which heatmaps were drawn.
        class_names: Names of the C classes.
        history: `RunFolder.history`.
        receptive_field: That of the feature maps, as in `lenet.RECEPTIVE_FIELD`; None if it covers most of an image.
    """
    model = unit_model(model)
    save_samples(out, model, test, class_names, history)
    save_classes(out, model, test, class_names, receptive_field)


def save_samples(out, model, test, class_names, history):
    """Writes the figures of each sample, and one of all classes; `model` is a `unit_model`.

    img_S/evolution.png    some maps of test image S in one strip, with step and predicted class
    img_S/classes.png      its maps of all classes (of many, the top ten) on one scale about zero, with logits S_c
    img_S/procedure.png    equation (2): the five largest terms w_k^c f_k, the rest, and their sum M_c
    overview.png           for each class one image, and its maps through the training
    """
    softmax_weights = np.asarray(model.get_layer("softmax_weights").kernel)  # w_k^c (K, C)
    rows = [history[index] for index in geometric_indices(len(history), STRIP_LENGTH)]
    samples = test.first(len(history[-1]["predicted"]))
    overview = {}  # a strip of each class
    for index, (feature_maps, pooled, logits, maps) in enumerate(predict_in_batches(model, samples.inputs)):
        folder, image, label = out / f"img_{index}", samples.images[index], samples.labels[index]
        title = f"test image {index}: {class_names[label]}"
        pictures = strip(folder, index, label, rows, class_names)
        save_grid(folder / "evolution.png", [pictures])
        if label not in overview:
            overview[label] = [(fit(picture, PICTURE_SIDE // 2), text, color) for picture, text, color in pictures]
        shown, predicted = np.arange(len(logits)), logits.argmax()
        if len(shown) > MAX_CLASSES:
            shown = np.argsort(-logits)[:MAX_CLASSES]
        titles = [(title, "black")]
        for c in shown:
            text, color = f"{class_names[c]}: S = {logits[c]:z.1f}", "black"
            if c == predicted:
                text, color = f"{text}, predicted", "seagreen" if c == label else "firebrick"
            titles.append((text, color))
        save_class_maps(folder / "classes.png", image, maps[:, :, shown], titles)
        terms = largest_terms(feature_maps, pooled, softmax_weights[:, label])
        save_procedure(folder / "procedure.png", image, title, class_names[label], softmax_weights[:, label], terms)
    save_grid(out / "overview.png", [overview[label] for label in sorted(overview)])


def save_classes(out, model, test, class_names, receptive_field):
    """Writes the figures of each class (of many, the first ten that have test images); `model` is a `unit_model`.

    patterns.png    the images with the highest S_c, with map and box
    units.png       the units with the largest w_k^c, and what they respond to
    """
    softmax_weights = np.asarray(model.get_layer("softmax_weights").kernel)  # w_k^c (K, C)
    classes = np.unique(test.labels)[:MAX_CLASSES]
    candidates = np.concatenate([np.flatnonzero(test.labels == c)[:CANDIDATES] for c in classes])
    images, labels = [test.images[index] for index in candidates], test.labels[candidates]
    inputs = test.inputs[candidates] if isinstance(test.inputs, np.ndarray) else (test.inputs[i] for i in candidates)
    units = np.argsort(-softmax_weights[:, classes], axis=0, kind="stable")[:UNITS].T  # k (len(classes), UNITS)
    logits, maps, responses = [], [], []  # S_c (C,); M_c (h, w) of the true class; f_k (h, w, units)
    for label, outputs in zip(labels, predict_in_batches(model, inputs), strict=True):
        feature_maps, _, image_logits, class_maps = outputs
        logits.append(image_logits)
        maps.append(class_maps[:, :, label].copy())
        responses.append(feature_maps[:, :, units.ravel()])
    save_patterns(out / "patterns.png", (images, labels), np.array(logits), maps, class_names)
    titles = [
        f"{class_names[c]}: unit {k}, w = {softmax_weights[k, c]:z.2f}"
        for c, of_class in zip(classes, units, strict=True)
        for k in of_class
    ]
    save_units(out / "units.png", images, responses, titles, receptive_field)


def predict_in_batches(model, inputs):
    """Yields the outputs of a model for each image."""
    for batch in batches(inputs, FIGURE_BATCH):
        yield from zip(*model.predict_on_batch(batch), strict=True)


def geometric_indices(count, chosen):
    """About `chosen` geometrically spaced indices from 0 to count - 1."""
    return np.unique(np.geomspace(1, count, chosen).round().astype(int)) - 1


def strip(folder, index, label, rows, class_names):
    """Pictures of test image `index`, for `save_grid`: itself, and its heatmaps in some rows of the history.

    A run that was resumed has only the files of the earlier heatmaps; one that is missing is left out.
    """
    image = to_image(read_picture(folder / "image_test.png").pixels)
    pictures = [(image, f"test image {index}: {class_names[label]}", "black")]
    for row in rows:
        predicted, path = row["predicted"][index], folder / f"cmap_{row['step']}.png"
        if path.exists():
            color = "black" if predicted == label else "firebrick"
            heatmap = to_image(read_picture(path).pixels)
            pictures.append((heatmap, f"step {row['step']:,}: {class_names[predicted]}", color))
    return pictures


def save_class_maps(path, image, maps, titles, boxes=()):
    """Writes an image (H, W, 1 or 3), and over it its maps (h, w, n) for several classes, all on one scale.

    `titles` are n + 1 pairs of title and color, the first for the image; `boxes` a box of each map, in pixels of the
    image, or None.
    """
    pictures = on_one_scale(image, maps, min(max(*image.shape[:2], PICTURE_SIDE // 2), PICTURE_SIDE), boxes)
    row = [(one, title, color) for one, (title, color) in zip(pictures, [*titles, ("scale", "black")], strict=True)]
    save_grid(path, [row[start : start + 6] for start in range(0, len(row), 6)])


def save_procedure(path, image, title, class_name, weights, terms):
    """Writes an image, and over it the `largest_terms` of equation (2) and their sum, the class activation map.

    `weights` are the softmax weights of the class, (K,).
    """
    units, contributions, maps = terms
    names = [*(f"{weights[k]:+z.2f} f{k}" for k in units), "all others"]
    titles = [title, *(f"{name}: S {share:+z.2f}" for name, share in zip(names, contributions, strict=True))]
    titles.append(f"= map of {class_name}: S = {contributions.sum():z.2f}")
    save_class_maps(path, image, np.dstack([maps, maps.sum(axis=2)]), [(text, "black") for text in titles])


def save_patterns(path, candidates, logits, maps, class_names):
    """Writes a row for each class: its images with the highest logits, with map and box.

    `candidates` are N images (H, W, 1 or 3) and their labels (N,); `logits` S_c (N, C); `maps` M_c of the true classes,
    (h, w) each.
    """
    (images, labels), rows, predicted = candidates, [], logits.argmax(axis=1)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        rows.append([])
        for index in of_class[np.argsort(-logits[of_class, label], kind="stable")][:EXAMPLES]:
            image = images[index]
            class_map = upsample(maps[index][None], *image.shape[:2])[0]
            picture = fit(to_image(overlay(image, normalize(class_map))), PICTURE_SIDE // 2)
            draw_box(picture, bounding_box(class_map), image.shape[1])
            title, color = f"{class_names[label]}: S = {logits[index, label]:z.1f}", "black"
            if predicted[index] != label:
                title, color = f"{title}, predicted {class_names[predicted[index]]}", "firebrick"
            rows[-1].append((picture, title, color))
    save_grid(path, rows)


def save_units(path, images, responses, titles, receptive_field):
    """Writes for each unit the images that it responds to most, cropped to its receptive field; three units in a row.

    `images` are (H, W, 1 or 3) each, `responses` f_k of n units for each image, (h, w, n). Without a receptive field,
    the images are shown whole, with f_k over them.
    """
    cells = []
    for unit, title in enumerate(titles):
        strongest = np.array([response[:, :, unit].max() for response in responses])
        pictures = []
        for index in np.argsort(-strongest, kind="stable")[:EXAMPLES]:
            f = responses[index][:, :, unit]
            if receptive_field:
                start, stride, length = (receptive_field[name] for name in ("start", "stride", "length"))
                padded = np.pad(images[index], [(length, length), (length, length), (0, 0)])  # black beyond the border
                y, x = length + start + stride * np.array(np.unravel_index(f.argmax(), f.shape))
                picture = padded[y : y + length, x : x + length]
            else:
                picture = overlay(images[index], normalize(upsample(f[None], *images[index].shape[:2])[0]))
            square = (PICTURE_SIDE // 4, PICTURE_SIDE // 4)
            picture = np.asarray(ImageOps.pad(to_image(picture).convert("RGB"), square, Image.Resampling.BOX, "white"))
            pictures.append(np.pad(picture, [(0, 0), (0, 2), (0, 0)], constant_values=255))  # a gap
        cells.append((to_image(np.hstack(pictures)), title, "black"))
    save_grid(path, [cells[start : start + UNITS] for start in range(0, len(cells), UNITS)])


def save_accuracy(path, history):
    """Plots accuracy and localization on test images against training images seen."""
    *earlier, last = history
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name in SHOWN_METRICS:
        column, title = f"test_{name}", METRIC_TITLES[name]
        if column not in last:
            continue
        known = [row for row in earlier if column in row]  # of photos, some may have no boxes
        count = last["test_images"] if name == "accuracy" else last.get("test_boxed", last["test_images"])
        label = f"{title}, all {count:,} images: {last[column]:.2%}"
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


def report_classes(out, labels, predicted, class_names):
    """Prints the accuracy of each class, and writes `out/confusion.png`, the confusion matrix.

    `labels` and `predicted` are the true and the predicted classes of N images, (N,), 0..C-1.
    """
    confusion = np.zeros((len(class_names), len(class_names)), int)
    np.add.at(confusion, (labels, predicted), 1)
    counts, widest = confusion.sum(axis=1), max(map(len, class_names))
    for name, correct, count in zip(class_names, confusion.diagonal(), counts, strict=True):
        if count:
            print(f"    {name:<{widest}}  {correct:,} of {count:,} ({correct / count:.1%})")
    shown = np.flatnonzero(counts)  # classes that have images
    width, height = (min(2.5 + 0.35 * count, 20) for count in (len(class_names), len(shown)))  # inches
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(confusion[shown] / counts[shown, None], "Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="predicted", ylabel="true", title="images of each class")
    if len(class_names) <= 60:
        axes.set_xticks(range(len(class_names)), class_names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(shown)), [class_names[c] for c in shown], parse_math=False)
        for y, c in enumerate(shown):
            for x in np.flatnonzero(confusion[c]):
                color = "white" if 2 * confusion[c, x] > counts[c] else "black"
                axes.text(x, y, confusion[c, x], ha="center", va="center", color=color, size="small")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "confusion.png") as part:
        figure.savefig(part)
    print(f"confusion matrix: {out / 'confusion.png'}")
