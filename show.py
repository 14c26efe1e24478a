"""Class activation maps of your own images.

    python show.py digit.png                          of the LeNet that mnist.py has trained
    python show.py dog.jpg cat.jpg --model ResNet50   of a network of keras.applications with its ImageNet weights
    python show.py photo.jpg --model mine.keras       of a saved Keras model whose logits are an affine function of its
                                                      pooled feature maps
    python show.py mug.jpg --model out/caltech256/alexnet.keras      of the AlexNet that caltech256.py has trained

Writes a figure for each image: the maps of the classes with the highest scores, on one scale, each with the box around
its largest connected component above 20% of the maximum. Prints scores and boxes (x0, y0, x1, y1, half-open, in pixels
of the image), and writes them to boxes.csv. A file mine_classes.txt beside mine.keras may name the classes,
one a line.

AlexNet gets the photo scaled to 256 pixels on its short side, LeNet a digit as in MNIST: light on black, 20 pixels
high. Another network gets RGB or grey pixels, scaled to its input size if that is fixed.

In Python, `predict_cams` does the same.
"""

from experiment.quiet import keras  # first, to keep TensorFlow's start-up log off the console

# isort: split
import argparse
import csv
import importlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cam import bounding_box, upsample
from experiment.digits import preprocess_digit
from experiment.figures import save_class_maps
from experiment.files import UserError, atomic_write
from experiment.images import Picture, read_picture, resize, scale_short_side
from experiment.networks import (
    class_names_file,
    images_file,
    keras_application,
    load_class_names,
    load_images_settings,
    load_network,
    to_cam_model,
)
from experiment.run import run_main
from experiment.settings import number


class Cams(NamedTuple):
    """Class activation maps of one image for K classes, as `predict_cams` returns them."""

    classes: np.ndarray  # (K,): 0..C-1
    names: list  # of the classes
    scores: np.ndarray  # S_c (K,)
    probabilities: np.ndarray  # (K,): what the network itself gives; of bare logits their softmax
    maps: np.ndarray  # M_c (K, h, w), not upsampled
    boxes: list  # (x0, y0, x1, y1), half-open, in pixels of the image; None if a map is nowhere positive
    picture: Picture  # the image


def predict_cams(image, network, top=5, classes=None):
    """Class activation maps of an image.

        cams = predict_cams("dog.jpg", Network("ResNet50"))
        print(cams.names[0], cams.scores[0], cams.boxes[0])

    Args:
        image: Path of an image file; or uint8 array (H, W), (H, W, 1), (H, W, 3), or (H, W, 4) with transparency.
        network: A `Network`; or what `Network` takes, which is then loaded in each call.
        top: Number of classes, those with the highest scores.
        classes: Classes to use instead, 0..C-1.

    Returns:
        `Cams`, the class with the highest score first, or in the order of `classes`.

    Raises:
        UserError: The image cannot be read, or the network cannot be used, or not with this image.
    """
    network = network if isinstance(network, Network) else Network(network)
    picture = read_picture(image)
    scores, probabilities, maps = network.predict(picture.pixels)
    if classes is None:
        classes = np.argsort(-scores, kind="stable")[:top]
    elif min(classes) < 0 or max(classes) >= len(scores):
        raise UserError(f"a class must be one of 0..{len(scores) - 1}")
    height, width = picture.pixels.shape[:2]
    scale = np.array([picture.width / width, picture.height / height] * 2)
    boxes = [bounding_box(upsample(maps[None, :, :, c], height, width)[0]) for c in classes]
    boxes = [box and tuple(np.rint(scale * box).astype(int).tolist()) for box in boxes]
    names = [network.class_names[c] for c in classes]
    maps = np.moveaxis(maps[:, :, classes], 2, 0)
    return Cams(np.asarray(classes), names, scores[classes], probabilities[classes], maps, boxes, picture)


class Network:
    """A classifier with its class activation maps, its class names, and the preprocessing of its images.

    Args:
        model: Keras model; path of a saved one, or of a checkpoint of the original; or name of a network of
            `keras.applications`, such as "ResNet50", with its ImageNet weights and its own preprocessing.
        pixel_range: The values of black and white, such as (0, 1). Default: as recorded beside a saved model, or
            (0, 255).
        preprocess: Module of `keras.applications` whose `preprocess_input` is applied instead, such as "resnet".
        output: Name of the output, if the model has several.

    Attributes:
        class_names: Names of the C classes; "0", "1" ... if none are known.

    Raises:
        UserError: The model cannot be loaded, has no exact class activation maps, or does not take one image.
    """

    def __init__(self, model, pixel_range=None, preprocess=None, output=None):
        class_names, settings, preprocess_input = None, {}, None
        if isinstance(model, keras.Model):
            self.source = f"model {model.name!r}"
        elif Path(model).suffix or Path(model).exists():
            self.source, model = model, load_network(model)
            settings, class_names = load_images_settings(self.source), load_class_names(self.source)
        else:
            self.source = model
            model, preprocess_input, class_names = keras_application(str(model))
        if preprocess:
            try:
                preprocess_input = importlib.import_module(f"keras.applications.{preprocess}").preprocess_input
            except (ImportError, AttributeError):
                raise UserError(f"--preprocess {preprocess} is not a module of keras.applications") from None
        if pixel_range and (preprocess_input or pixel_range[0] >= pixel_range[1]):
            raise UserError(
                "--pixel-range takes the lower value first, and only where no other preprocessing is applied"
            )
        self.cam_model = to_cam_model(model, output)
        self.settings, self.preprocess_input = settings, preprocess_input
        self.pixel_range = pixel_range or settings.get("pixel_range", (0, 255))
        self.range_is_known = bool(pixel_range or preprocess_input or "pixel_range" in settings)

        inputs = self.cam_model.inputs
        if len(inputs) > 1 or len(inputs[0].shape) != 4 or inputs[0].shape[-1] not in (1, 3):
            shapes = ", ".join(str(tensor.shape) for tensor in inputs)
            raise UserError(f"{self.source} takes {shapes}; one image of 1 or 3 channels can be given")
        self.input_shape = inputs[0].shape[1:]  # (h, w, channels), h and w None if any will do
        if "short_side" in settings and self.input_shape[:2] != (None, None):
            raise UserError(
                f"{self.source} takes images of a fixed size, and short_side in {images_file(Path(self.source))}"
            )
        if preprocess_input and self.input_shape[2] == 1:
            raise UserError(f"{self.source} takes grey images, and --preprocess is for colours")
        self.activation = self.cam_model.get_layer("logits_and_maps").activation
        count = self.cam_model.output_shape[0][-1]
        self.is_binary = count == 1 and self.activation in ("linear", "sigmoid")
        count += self.is_binary
        self.class_names = class_names or [str(c) for c in range(count)]
        if len(self.class_names) != count:
            file = class_names_file(Path(self.source))
            raise UserError(f"{file} has {len(self.class_names)} lines; the model has {count} classes")

    def predict(self, pixels):
        """Scores S_c (C,), probabilities (C,) and maps M_c (h, w, C) of an image (H, W, 3) uint8."""
        images = self.preprocess(pixels)[None]
        try:
            logits, maps = (output[0] for output in self.cam_model.predict_on_batch(images))
        except Exception as error:  # whatever Keras and its backend raise
            height, width = images.shape[1:3]
            reason = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())[:200]
            raise UserError(f"{self.source} does not take {width} x {height} pixels; too small? ({reason})") from None
        if not maps.size or not np.isfinite(maps).all():
            raise UserError(f"{self.source} gives infinite or NaN values")
        if self.is_binary:  # one logit: its class against the other
            logits, maps = np.concatenate([-logits, logits]), np.concatenate([-maps, maps], axis=2)
        activation = keras.ops.sigmoid if self.is_binary or self.activation == "sigmoid" else keras.ops.softmax
        return logits, keras.ops.convert_to_numpy(activation(logits)), maps

    def preprocess(self, pixels):
        """An image (H, W, 3) uint8 as the network takes it, (h, w, channels) float32."""
        height, width, channels = self.input_shape
        if self.settings.get("digit"):
            pixels = preprocess_digit(pixels)[:, :, None].repeat(channels, axis=2)  # (h, w, channels)
        elif channels == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        rows, columns = pixels.shape[:2]
        if "short_side" in self.settings:
            pixels = scale_short_side(pixels, self.settings["short_side"])
        elif height or width:  # if one of them is fixed, the image keeps its proportions
            height, width = height or round(rows * width / columns), width or round(columns * height / rows)
        if height and (height, width) != (rows, columns):
            pixels = resize(pixels, max(height, 1), max(width, 1))
        pixels = pixels.astype(np.float32)
        if self.preprocess_input:
            return self.preprocess_input(pixels)
        low, high = self.pixel_range
        return low + (high - low) / 255 * pixels


def figure_names(paths):
    """A name for the figure of each image: cam_NAME, or cam_FOLDER_NAME or cam_FOLDER_NAME_2 if that is taken."""
    stems, names = [path.stem for path in paths], []
    for path in paths:
        first = f"cam_{path.stem}"
        if stems.count(path.stem) > 1:
            first = f"cam_{path.resolve().parent.name}_{path.stem}"
        name, count = first, 1
        while name in names:
            count += 1
            name = f"{first}_{count}"
        names.append(name)
    return names


def main(settings):
    sys.stdout.reconfigure(errors="replace")  # for names that the console cannot show
    paths, chosen = settings.images, settings.classes
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is missing")
    network = Network(settings.model, settings.pixel_range, settings.preprocess, settings.output)
    count = len(network.class_names)
    if chosen and (len(chosen) not in (1, len(paths)) or min(chosen) < 0 or max(chosen) >= count):
        raise UserError(f"--class takes one class for all images, or one for each of them, of 0..{count - 1}")
    if not network.range_is_known:
        print(f"{settings.model} gets pixels of 0..255; if it was trained on others, say so: --pixel-range 0 1")

    rows = [["file", "class", "score", "probability", "x0", "y0", "x1", "y1"]]  # of boxes.csv
    for index, (path, name) in enumerate(zip(paths, figure_names(paths), strict=True)):
        try:
            cams = predict_cams(path, network, settings.top, chosen and [chosen[index % len(chosen)]])
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        maps = np.maximum(cams.maps, 0) if settings.relu else cams.maps
        settings.out.mkdir(parents=True, exist_ok=True)
        file = settings.out / f"{name}.png"
        draw(file, path.name, cams._replace(maps=maps))
        if settings.npy:
            with atomic_write(file.with_suffix(".npy")) as part, part.open("wb") as npy:
                np.save(npy, maps)
        print(f"{path} -> {file}")
        for c in range(len(cams.classes)):
            box, score, probability = cams.boxes[c], cams.scores[c], cams.probabilities[c]
            where = "box {} {} {} {}".format(*box) if box else "nowhere positive"
            print(f"    {cams.names[c]:<24} S = {score:z8.2f}  P = {probability:6.1%}  {where}")
            rows.append([path, cams.names[c], f"{score:.6g}", f"{probability:.6g}", *(box or [""] * 4)])
        with (
            atomic_write(settings.out / "boxes.csv") as part,
            part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table,
        ):
            csv.writer(table).writerows(rows)


def draw(file, title, cams):
    """Writes the figure of an image: itself, and its maps with their boxes."""
    pixels = cams.picture.pixels
    boxes = [box and np.multiply(box, pixels.shape[1] / cams.picture.width).tolist() for box in cams.boxes]
    if (pixels == pixels[:, :, :1]).all():  # grey
        pixels = pixels[:, :, :1]
    titles = [(title, "black")]
    for name, score, probability in zip(cams.names, cams.scores, cams.probabilities, strict=True):
        titles.append((f"{name}: S = {score:z.2f}, P = {probability:.1%}", "black"))
    save_class_maps(file, pixels, np.moveaxis(cams.maps, 0, 2), titles, boxes)


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
    text = "values of black and white for a saved model, such as 0 1 or -1 1 (default: 0 255)"
    flag("--pixel-range", nargs=2, type=float, metavar=("LOW", "HIGH"), help=text)
    text = "preprocess images for a saved model as this module of keras.applications, such as resnet"
    flag("--preprocess", help=text)
    flag("--output-name", dest="output", metavar="NAME", help="name of the output, if the model has several")
    run_main("show.py", main, parser.parse_args())
