"""The command line of cam.py: class activation maps of your own images.

    python cam.py digit.png                          of the LeNet that mnist.py has trained
    python cam.py dog.jpg cat.jpg --model ResNet50   of a network of keras.applications with its ImageNet weights
    python cam.py photo.jpg --model mine.keras       of any saved Keras model of the form
                                                     convolutions -> GlobalAveragePooling2D -> (Dropout) -> Dense
    python cam.py mug.jpg --model out/caltech256/alexnet.keras      of the AlexNet that caltech256.py has trained

Writes a figure for each image: the image, and over it the maps of the classes with the highest scores, all on one
scale, each with the box around its largest part above 20% of the maximum. Scores and boxes (x0, y0, x1, y1, half-open,
in pixels of the image) go to the console.

The AlexNet gets the photo scaled to 256 pixels on its short side. Beside a saved model mine.keras, a file
mine_classes.txt may name its classes, one a line.

For the LeNet, an image is made grey and, if its background is light, inverted. Pixels that are repeated, as in a run's
image_test.png, are taken once. An image that then is larger than 100 pixels is taken for a photo of one digit,
stretched to full contrast and scaled so that its ink is 20 pixels high, as it is in MNIST.
"""

import argparse
import importlib
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageOps
from skimage import filters, transform

from alexnet import SHORT_SIDE
from cam import bounding_box, class_activation_model, upsample
from files import complete_file
from networks import NetworkError, class_names, keras_application, load_network

LARGEST_IMAGE = 50_000_000  # pixels
DIGIT_HEIGHT = 20  # pixels of an MNIST digit
SMALL = 100  # pixels: the longer side of images that the LeNet gets as they are


class ImageError(ValueError):
    """An image or a setting cannot be used; the message names it and says what to do."""


def read_image(path):
    """Reads an image, turned upright: (H, W, 3) uint8."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise ImageError(
                    f"{path} has {image.width} x {image.height} pixels; at most {LARGEST_IMAGE:,} are read"
                )
            if image.mode.startswith("I"):  # 16 bits: the upper 8
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise ImageError(f"{path} is missing") from None
    except ImageError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for a bad image
        raise ImageError(f"{path} is not an image that can be read ({error})") from None


def to_digit(image):
    """An image (H, W, 3) as the LeNet knows them: light ink on black, (h, w, 1) uint8; see the top of this file."""
    grey = np.asarray(Image.fromarray(image).convert("L"))
    if np.median(grey) > 127:
        grey = 255 - grey
    grey = without_repeats(grey)
    if max(grey.shape) <= SMALL:
        return grey[:, :, None]
    ink = grey > filters.threshold_otsu(grey)
    rows = np.flatnonzero(ink.mean(axis=1) > 0.002)  # more than a speck
    height = rows[-1] - rows[0] + 1 if len(rows) else DIGIT_HEIGHT
    scale = min(DIGIT_HEIGHT / height, 10 * SMALL / max(grey.shape))
    shape = [max(8, round(length * scale)) for length in grey.shape]
    low, high = np.percentile(grey, 50), grey[ink].mean() if ink.any() else 255
    contrast = ((grey - low) / max(high - low, 1)).clip(0, 1)
    return np.rint(255 * transform.resize(contrast, shape, anti_aliasing=True)).astype(np.uint8)[:, :, None]


def without_repeats(grey):
    """Undoes an enlargement of an image (H, W) that repeated each pixel, but not to less than a digit."""
    side = math.gcd(*grey.shape)
    for times in range(min(side, max(grey.shape) // DIGIT_HEIGHT), 1, -1):
        if side % times == 0:
            small = grey[::times, ::times]
            if np.array_equal(small.repeat(times, axis=0).repeat(times, axis=1), grey):
                return small
    return grey


def to_input(image, model):
    """An image (H, W, 3) as `model` takes it: grey or RGB, and at its size if it has one; 0..255."""
    height, width, channels = model.input_shape[1:]
    if channels == 1:
        image = np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    elif channels != 3:
        raise ImageError(f"the model takes images of {channels} channels; 1 and 3 can be given")
    if model.name == "alexnet":  # as large as the photos that it has learned from, and all of it
        if max(image.shape[:2]) > 8 * min(image.shape[:2]):
            raise ImageError(f"an image is {image.shape[1]} x {image.shape[0]} pixels, too long for AlexNet; crop it")
        scale = SHORT_SIDE / min(image.shape[:2])
        height, width = (round(scale * length) for length in image.shape[:2])
    if height and width:
        image = transform.resize(image, (height, width), preserve_range=True, anti_aliasing=True)
    return image.astype(np.float32)


def explain(cam, inputs, batch_size):
    """Scores S_c (C,) and maps M_c (h, w, C) of each input (H, W, channels); those of one shape go through together."""
    found = [None] * len(inputs)
    for shape in dict.fromkeys(image.shape for image in inputs):
        places = [place for place, image in enumerate(inputs) if image.shape == shape]
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            scores, maps = cam.predict_on_batch(np.stack([inputs[place] for place in part]))
            for place, *result in zip(part, scores, maps, strict=True):
                found[place] = result
    return found


def draw(path, image, maps, titles, boxes):
    """Draws the image, and over it each of the maps (K, H, W) with its title and box, all on one scale."""
    count = 1 + len(maps)
    columns = min(count, 6)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3 * columns + 1, 3.3 * lines), dpi=110, layout="constrained")
    axes = np.ravel(axes)
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(image)
    axes[0].set_title("image", fontsize=10)
    for axis, class_map, title, box in zip(axes[1:], maps, titles, boxes, strict=False):
        axis.imshow(image)
        shades = axis.imshow(class_map, cmap="jet", alpha=0.5, vmin=maps.min(), vmax=max(maps.max(), maps.min() + 1e-6))
        axis.set_title(title, fontsize=10)
        if box:
            x0, y0, x1, y1 = box
            axis.add_patch(
                plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color="white", linewidth=2)
            )
    figure.colorbar(shades, ax=list(axes), label="M_c", fraction=0.03)
    with complete_file(path) as part:
        figure.savefig(part)
    plt.close(figure)


def run(settings):
    paths = settings.images
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise ImageError("two images have the same name; their figures would be the same file")
    images = [read_image(path) for path in paths]

    # Network and what goes into it
    if Path(settings.model).suffix or Path(settings.model).exists():
        model = load_network(settings.model)
        preprocess, application_names = np.asarray, None
    else:
        model, preprocess, application_names = keras_application(settings.model)
    try:
        cam = class_activation_model(model)
    except ValueError as error:
        raise NetworkError(str(error)) from None
    if settings.preprocess:
        try:
            preprocess = importlib.import_module(f"keras.applications.{settings.preprocess}").preprocess_input
        except ImportError:
            raise ImageError(f"--preprocess {settings.preprocess}: no such part of keras.applications") from None
    if model.name == "lenet":
        inputs = [to_digit(image) for image in images]
    else:
        inputs = [preprocess(to_input(image, model)) for image in images]

    # Maps, and the classes to show
    results = explain(cam, inputs, settings.batch_size)
    count = len(results[0][0])
    chosen = settings.classes and np.array(settings.classes * (len(images) if len(settings.classes) == 1 else 1))
    if chosen is not None and (len(chosen) != len(images) or chosen.min() < 0 or chosen.max() >= count):
        raise ImageError(f"--class takes one class for all images, or one for each of them, of 0..{count - 1}")
    names_of_classes = application_names() if application_names else class_names(settings.model, count)
    settings.out.mkdir(parents=True, exist_ok=True)
    for place, (image, (scores, maps)) in enumerate(zip(images, results, strict=True)):
        if not np.isfinite(maps).all():
            raise NetworkError(f"{settings.model} gives infinite or NaN values on {paths[place]}")
        shown = np.argsort(-scores)[: settings.top] if chosen is None else chosen[place : place + 1]
        exponentials = np.exp(scores - scores.max())
        probabilities = exponentials / exponentials.sum()
        maps = maps[:, :, shown].transpose(2, 0, 1)  # (K, h, w)
        if settings.relu:
            maps = np.maximum(maps, 0)
        large = np.asarray(upsample(maps, *image.shape[:2]))  # (K, H, W)
        boxes = [bounding_box(class_map) for class_map in large]
        titles = [f"{names_of_classes[c]}\nS = {scores[c]:z.2f}, P = {probabilities[c]:.1%}" for c in shown]
        draw(settings.out / f"cam_{names[place]}.png", image, large, titles, boxes)
        if settings.npy:
            with complete_file(settings.out / f"cam_{names[place]}.npy") as part:
                np.save(part, maps)
        print(f"{paths[place]} -> {settings.out / f'cam_{names[place]}.png'}")
        for c, box in zip(shown, boxes, strict=True):
            where = "nowhere positive" if box is None else "box {} {} {} {}".format(*box)
            print(f"    {names_of_classes[c]:<24} S = {scores[c]:z8.2f}  P = {probabilities[c]:6.1%}  {where}")


def main():
    parser = argparse.ArgumentParser(
        prog="cam.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"cam.py: {message}; see --help\n")  # one line, without the usage
    flag = parser.add_argument
    flag("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    flag("--model", default="out/lenet.keras", help="saved model, checkpoint of the original, or name of a network")
    flag("--top", default=5, type=int, help="show the classes with the highest scores, so many (default: 5)")
    flag("--class", nargs="+", type=int, dest="classes", metavar="C", help="show this class, or this of each image")
    flag("--out", default=Path("out"), type=Path, help="folder for the figures, cam_NAME.png (default: out)")
    flag("--npy", action="store_true", help="also write the maps as they are, cam_NAME.npy (K, h, w), float32")
    flag("--relu", action="store_true", help="set what is negative in a map to zero, which the paper does not")
    flag(
        "--preprocess", help="prepare images for a saved model as this part of keras.applications, such as resnet, does"
    )
    flag("--batch-size", default=32, type=int, help="images at a time (default: 32)")
    settings = parser.parse_args()
    if min(settings.top, settings.batch_size) < 1:
        parser.error("--top and --batch-size are at least 1")
    try:
        run(settings)
    except (ImageError, NetworkError, OSError) as error:
        parser.exit(2, f"cam.py: {error}\n")
