"""How images are prepared for a network, and the file beside a saved network that says so."""

import importlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiment.digits import preprocess_digit
from experiment.files import UserError, atomic_write
from experiment.images import resize, scale_short_side

KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")
SHORT_SIDE = 256  # pixels of a photo, as ImageNet networks are tested


class Preprocessing(NamedTuple):
    """How images are prepared for a network."""

    digit: bool = False  # as a digit, light on black, 20 pixels high, see `digits.preprocess_digit`
    short_side: int | None = None  # pixels to which the short side is scaled
    pixel_range: tuple | None = None  # what black and white are to the network; by default 0 and 255
    preprocess: str | None = None  # module of `keras.applications` whose `preprocess_input` is applied instead

    def apply(self, pixels, input_shape):
        """An image (H, W, 3) uint8 as a network of that input shape takes it, (h, w, channels) float32.

        Height and width of the input shape are None if any will do. If one of them is fixed, the image keeps its
        proportions.
        """
        height, width, channels = input_shape
        if self.digit:
            pixels = preprocess_digit(pixels)[:, :, None].repeat(channels, axis=2)
        elif channels == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        rows, columns = pixels.shape[:2]
        if self.short_side:
            pixels = scale_short_side(pixels, self.short_side)
        elif height or width:
            height, width = height or round(rows * width / columns), width or round(columns * height / rows)
            pixels = resize(pixels, max(height, 1), max(width, 1))
        pixels = pixels.astype(np.float32)
        if self.preprocess:
            return load_preprocess_input(self.preprocess)(pixels)
        low, high = self.pixel_range or (0, 255)
        return low + (high - low) / 255 * pixels


def check_inputs(source, inputs, preprocessing):
    """Checks that the network `source`, with these input tensors, takes one image that is prepared so.

    Returns the shape of the image, (h, w, channels); h and w are None if any will do.

    Raises:
        UserError: The network takes something else, or the `Preprocessing` contradicts itself.
    """
    if len(inputs) > 1 or len(inputs[0].shape) != 4 or inputs[0].shape[-1] not in (1, 3):
        shapes = ", ".join(str(tensor.shape) for tensor in inputs)
        raise UserError(f"{source} takes {shapes}; it must take one image of 1 or 3 channels")
    shape = inputs[0].shape[1:]
    if preprocessing.short_side and shape[:2] != (None, None):
        raise UserError(f"{source} takes images of a fixed size; short_side is for networks that take any size")
    if preprocessing.short_side and preprocessing.digit:
        raise UserError(f"{source} takes digits, which are scaled by their own size; short_side is for photos")
    low, high = preprocessing.pixel_range or (0, 255)
    if low >= high or (preprocessing.preprocess and preprocessing.pixel_range):
        raise UserError(f"{source}: a pixel range has the lower value first, and goes with no other preprocessing")
    if preprocessing.preprocess:
        load_preprocess_input(preprocessing.preprocess)
        if shape[2] == 1:
            raise UserError(f"{source} takes grey images; the preprocessing of keras.applications is for colours")
    return shape


def complete_preprocessing(preprocessing, path, inputs, short_side=None):
    """Completes the `Preprocessing` of photos for the network `path`, with these input tensors, and checks it.

    Photos are scaled to `short_side`; if that is None, as recorded, or to SHORT_SIDE if the network takes any size.
    Pixels are in 0..255 unless another preprocessing is recorded; that is printed.
    """
    if short_side:
        preprocessing = preprocessing._replace(short_side=short_side)
    elif inputs[0].shape[1:3] == (None, None) and not (preprocessing.short_side or preprocessing.digit):
        preprocessing = preprocessing._replace(short_side=SHORT_SIDE)
    check_inputs(path, inputs, preprocessing)
    if not (preprocessing.preprocess or preprocessing.pixel_range):
        file = preprocessing_file(path)
        print(f"{path} gets pixels of 0..255; if it was trained on others, say so in {file}")
        preprocessing = preprocessing._replace(pixel_range=(0, 255))
    return preprocessing


def load_preprocess_input(module):
    """The function `preprocess_input` of a module of `keras.applications`, such as "resnet"."""
    try:
        return importlib.import_module(f"keras.applications.{module}").preprocess_input
    except (ImportError, AttributeError):
        raise UserError(f"preprocess: {module} is not a module of keras.applications") from None


def preprocessing_file(path):  # mine.keras -> mine_images.json
    return path.with_name(f"{path.stem}_images.json")


def save_preprocessing(preprocessing, path):
    """Writes the file beside the network at `path`."""
    fields = {name: value for name, value in preprocessing._asdict().items() if value}
    with atomic_write(preprocessing_file(path)) as part:
        part.write_text(json.dumps(fields), encoding="utf-8")


def load_preprocessing(path):
    """The `Preprocessing` recorded beside the network at `path`; the default if there is none.

    Raises:
        UserError: The file is damaged, or has another field.
    """
    path = Path(path)
    if path.suffix.lower() not in KERAS_SUFFIXES:  # a checkpoint of the original
        return Preprocessing(digit=True)
    file = preprocessing_file(path)
    if not file.exists():
        return Preprocessing()
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
        if "pixel_range" in fields:
            low, high = fields["pixel_range"]
            fields["pixel_range"] = float(low), float(high)
            if low >= high:
                raise ValueError(fields)
        preprocessing = Preprocessing(**fields)
        short_side = 1 if preprocessing.short_side is None else preprocessing.short_side
        if not isinstance(preprocessing.digit, bool) or type(short_side) is not int or not 1 <= short_side <= 10_000:
            raise ValueError(fields)
    except (ValueError, TypeError):
        example = '{"digit": true}, {"preprocess": "resnet"} or {"short_side": 256, "pixel_range": [0, 1]}'
        raise UserError(f"{file} must be like {example}") from None
    return preprocessing
