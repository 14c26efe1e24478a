"""Class activation maps of your own images.

    python show.py digit.png                          of the LeNet that mnist.py has trained
    python show.py dog.jpg cat.jpg --model ResNet50   of a network of keras.applications with its ImageNet weights
    python show.py photo.jpg --model mine.keras       of any saved Keras model of the form
                                                      convolutions -> GlobalAveragePooling2D -> (Dropout) -> Dense
    python show.py mug.jpg --model out/caltech256/alexnet.keras      of the AlexNet that caltech256.py has trained

Writes a figure for each image: the maps of the classes with the highest scores, on one scale, each with the box around
its largest connected component above 20% of the maximum. Prints scores and boxes (x0, y0, x1, y1, half-open, in pixels
of the image). A file mine_classes.txt beside mine.keras may name the classes, one a line.

AlexNet gets the photo scaled to 256 pixels on its short side. LeNet gets it in grey and, if its background is light,
inverted; repeated pixels, as in a run's image_test.png, are taken once. If it then is larger than 100 pixels, it is
treated as a photo of one digit: stretched to full contrast and scaled so that its ink is 20 pixels high, as in MNIST.
"""

from experiment.quiet import keras  # first, to keep TensorFlow's start-up log off the console

# isort: split
import argparse
import importlib
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from skimage import filters, transform

from alexnet import SHORT_SIDE
from cam import bounding_box, upsample
from experiment.figures import save_class_maps
from experiment.files import UserError, atomic_write
from experiment.networks import keras_application, load_class_names, load_network, to_cam_model
from experiment.run import run_main
from experiment.settings import number

MAX_PIXELS = 50_000_000
DIGIT_HEIGHT = 20  # pixels of an MNIST digit
MAX_DIGIT_SIDE = 100  # pixels: the longer side of an image that is not taken for a photo of one digit


def read_image(path):
    """Reads an image, turned upright: (H, W, 3) uint8."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path} has {image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,}")
            if image.mode.startswith("I"):  # 16 bits: the upper 8
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for a bad image
        raise UserError(f"{path} is not a readable image ({error})") from None


def preprocess_digit(image):
    """An image (H, W, 3) as LeNet expects it: light ink on black, (h, w, 1) uint8; see the top of this file."""
    grey = np.asarray(Image.fromarray(image).convert("L"))
    if np.median(grey) > 127:
        grey = 255 - grey
    grey = without_repeats(grey)
    if max(grey.shape) <= MAX_DIGIT_SIDE:
        return grey[:, :, None]
    ink = grey > filters.threshold_otsu(grey)
    rows = np.flatnonzero(ink.mean(axis=1) > 0.002)  # more than a speck
    height = rows[-1] - rows[0] + 1 if len(rows) else DIGIT_HEIGHT
    scale = min(DIGIT_HEIGHT / height, 10 * MAX_DIGIT_SIDE / max(grey.shape))
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


def preprocess(image, model):
    """An image (H, W, 3) as `model` takes it: grey or RGB, and of its input size if that is fixed; 0..255."""
    height, width, channels = model.input_shape[1:]
    if channels == 1:
        image = np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    elif channels != 3:
        raise UserError(f"the model takes images of {channels} channels; 1 and 3 can be given")
    if model.name == "alexnet":  # all of it, at the scale of the photos in training
        if max(image.shape[:2]) > 8 * min(image.shape[:2]):
            raise UserError(f"an image is {image.shape[1]} x {image.shape[0]} pixels, too long for AlexNet; crop it")
        scale = SHORT_SIDE / min(image.shape[:2])
        height, width = (round(scale * length) for length in image.shape[:2])
    if height and width:
        image = transform.resize(image, (height, width), preserve_range=True, anti_aliasing=True)
    return image.astype(np.float32)


def load_model(settings):
    """The model, its preprocessing of images, and a function that gives the names of its C classes."""
    if Path(settings.model).suffix or Path(settings.model).exists():
        model = load_network(settings.model)
        preprocess_input, class_names = np.asarray, lambda: load_class_names(settings.model, model.output_shape[-1])
    else:
        model, preprocess_input, class_names = keras_application(settings.model)
    if settings.preprocess:
        try:
            preprocess_input = importlib.import_module(f"keras.applications.{settings.preprocess}").preprocess_input
        except ImportError:
            raise UserError(f"--preprocess {settings.preprocess} is not a module of keras.applications") from None
    return model, preprocess_input, class_names


def main(settings):
    paths, chosen = settings.images, settings.classes
    if len({path.stem for path in paths}) < len(paths):
        raise UserError("two images have the same name; their figures would be the same file")
    images = [read_image(path) for path in paths]
    model, preprocess_input, class_names = load_model(settings)
    cam_model = to_cam_model(model)
    count = model.output_shape[-1]
    if chosen and (len(chosen) not in (1, len(images)) or min(chosen) < 0 or max(chosen) >= count):
        raise UserError(f"--class takes one class for all images, or one for each of them, of 0..{count - 1}")
    if model.name == "lenet":
        inputs = [preprocess_digit(image) for image in images]
    else:
        inputs = [preprocess_input(preprocess(image, model)) for image in images]
    class_names = class_names()

    settings.out.mkdir(parents=True, exist_ok=True)
    for index, (path, image) in enumerate(zip(paths, images, strict=True)):
        logits, maps = cam_model.predict_on_batch(inputs[index][None])  # S_c (1, C), M_c (1, h, w, C)
        if not np.isfinite(maps).all():
            raise UserError(f"{settings.model} gives infinite or NaN values on {path}")
        logits, probabilities = logits[0], keras.ops.convert_to_numpy(keras.ops.softmax(logits[0]))
        shown = [chosen[index % len(chosen)]] if chosen else np.argsort(-logits)[: settings.top]
        maps = maps[0, :, :, shown]  # (K, h, w)
        if settings.relu:
            maps = np.maximum(maps, 0)
        boxes = [bounding_box(class_map) for class_map in upsample(maps, *image.shape[:2])]
        titles = [(f"{class_names[c]}: S = {logits[c]:z.2f}, P = {probabilities[c]:.1%}", "black") for c in shown]
        file = settings.out / f"cam_{path.stem}.png"
        save_class_maps(file, image, np.moveaxis(maps, 0, 2), [(path.name, "black"), *titles], boxes)
        if settings.npy:
            with atomic_write(file.with_suffix(".npy")) as part, part.open("wb") as npy:
                np.save(npy, maps)
        print(f"{path} -> {file}")
        for c, box in zip(shown, boxes, strict=True):
            where = "nowhere positive" if box is None else "box {} {} {} {}".format(*box)
            print(f"    {class_names[c]:<24} S = {logits[c]:z8.2f}  P = {probabilities[c]:6.1%}  {where}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("show.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"show.py: {message}; see --help\n")  # one line, without the usage
    flag = parser.add_argument
    flag("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    text = "saved model, checkpoint of the original, or network of keras.applications (default: %(default)s)"
    flag("--model", default="out/lenet.keras", help=text)
    flag("--top", default=5, type=number(1), help="number of top classes to show (default: 5)")
    flag("--class", nargs="+", type=int, dest="classes", metavar="C", help="show this class, or one for each image")
    flag("--out", default=Path("out"), type=Path, help="folder for the figures, cam_NAME.png (default: out)")
    flag("--npy", action="store_true", help="also write the maps, not upsampled, cam_NAME.npy (K, h, w) float32")
    flag("--relu", action="store_true", help="set negative values of the maps to zero, which the paper does not")
    flag(
        "--preprocess", help="preprocess images for a saved model as this module of keras.applications, such as resnet"
    )
    run_main("show.py", main, parser.parse_args())
