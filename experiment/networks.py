"""Loading and saving of networks: saved Keras models, checkpoints of the original, `keras.applications`."""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

from alexnet import weight_shapes
from experiment.exact_maps import exact_cam_model
from experiment.files import UserError, atomic_write
from lenet import lenet

# Variables of the original's checkpoints, in the order of our LeNet's weights.
ORIGINAL_VARIABLES = ("conv1/weights", "conv1/biases", "conv2/weights", "conv2/biases", "GAP/W")
KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")
# What Keras says of a file that it does not load, and what to tell the user.
REASONS = {
    r"No model config": "holds weights without their network; load them into it, and save the model as .keras",
    r"Lambda": "has a Lambda layer, and code in a file is not run; in Python, give the model to predict_cams",
    r"(?:locate (?:class|function)|Unknown (?:layer|object):?) '(.*?)'": (
        r"needs \1, which is not a part of Keras; in Python, give the model to predict_cams"
    ),
}


def load_network(path):
    """Loads a saved Keras model (.keras, .h5, .hdf5; no code in it is run), or a checkpoint of the original.

    Raises:
        UserError: The file is missing, or neither.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if suffix not in KERAS_SUFFIXES:
            return load_tf1_checkpoint(path)
        with tempfile.TemporaryDirectory() as folder:
            file = path
            if path.suffix != suffix:  # which Keras does not know
                file = shutil.copy(path, Path(folder) / f"{path.stem}{suffix}")
            return keras.models.load_model(file, compile=False)
    except Exception as error:  # whatever Keras or TensorFlow raises for a broken or hostile file
        raise UserError(f"{path} {reason(path, str(error))}") from None


def reason(path, message):
    """Why a network cannot be loaded from `path`."""
    if not path.exists():
        return "is missing; run mnist.py first" if path.name == "lenet.keras" else "is missing"
    if (path / "saved_model.pb").exists():
        return "is a TensorFlow SavedModel, which does not have the layers; save the Keras model as .keras"
    for pattern, text in REASONS.items():
        found = re.search(pattern, message)
        if found:
            return found.expand(text)
    kind = "a saved Keras model" if path.suffix.lower() in KERAS_SUFFIXES else "a checkpoint of the original"
    return f"is not {kind} ({' '.join(message.split())[:200]})"


def load_tf1_checkpoint(checkpoint):
    """The original's network, from its checkpoint in TensorFlow's V1 format, as `lenet` makes it."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(checkpoint))
    kernel, *others = (reader.get_tensor(f"LeNet/{name}") for name in ORIGINAL_VARIABLES)
    model = lenet()
    # Its three channels are equal, so their summed kernel is the same network on one: (5, 5, 3, 32) -> (5, 5, 1, 32)
    model.set_weights([kernel.sum(axis=2, keepdims=True), *others])
    return model


def to_cam_model(model, output=None):
    """`exact_cam_model`, with a UserError for a model without exact maps."""
    try:
        return exact_cam_model(model, output)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None


def check_model_fits_data(path, cam_model, shape, classes, short_side=None):
    """Raises a UserError if the model saved at `path` takes other images, or has another number of classes.

    Args:
        path, cam_model: Path of the model, and what `to_cam_model` makes of it.
        shape: (H, W, channels) of the images; H and W are None if their size varies.
        classes: Number of classes.
        short_side: Pixels to which the short side of the images is scaled, if it is.
    """
    found = cam_model.input_shape if len(cam_model.inputs) == 1 else ()
    fits = len(found) == 4 and all(size in (None, wanted) for size, wanted in zip(found[1:], shape, strict=True))
    if not fits or cam_model.output_shape[0][-1] != classes:
        size = "any size" if shape[0] is None else f"{shape[1]} x {shape[0]} pixels"
        raise UserError(f"{path} must take images of {size} and {shape[2]} channel(s), and have {classes} classes")
    expected = {"pixel_range": [0, 255]} | ({"short_side": short_side} if short_side else {})
    found = expected | load_preprocessing(path)
    found["pixel_range"] = list(found["pixel_range"])
    found.pop("digit", None)  # either way, the digits of an experiment are given as they are
    if found != expected:
        file = preprocessing_file(path)
        raise UserError(f"{file} is not {json.dumps(expected)}, which is how --evaluate prepares images")


def load_torchvision_convolutions(path):
    """Reads the convolutions of torchvision's AlexNet from an .npz file: arrays by the names in `weight_shapes`."""
    hint = "docs/photos.md says how to make it; --weights none does without"
    shapes = weight_shapes()
    try:
        with np.load(path, allow_pickle=False) as file:
            weights = {name: file[name] for name in shapes if name in file}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {hint}") from None
    except Exception as error:  # zipfile and NumPy raise a dozen kinds for a damaged file
        raise UserError(f"{path} is not a readable .npz file ({error}); {hint}") from None
    for name, shape in shapes.items():
        values = weights.get(name, np.empty(0))
        if values.shape != shape or values.dtype.kind != "f" or not np.isfinite(values).all():
            raise UserError(f"{path}: {name} must be an array {shape} of finite floating-point numbers; {hint}")
    return weights


def save_network(model, class_names, preprocessing, path):
    """Saves a model, and beside it the names of its classes, a line each, and how it wants its images."""
    with atomic_write(class_names_file(path)) as part:
        part.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    with atomic_write(preprocessing_file(path)) as part:
        part.write_text(json.dumps(preprocessing), encoding="utf-8")
    with atomic_write(path) as part:
        model.save(part)


def load_class_names(path):
    """Names of the classes of the model saved at `path`; None if no file beside it has them."""
    file = class_names_file(Path(path))
    if not file.exists():
        return None
    return file.read_text(encoding="utf-8-sig", errors="replace").rstrip("\n").split("\n")


def load_preprocessing(path):
    """How the model saved at `path` wants its images; {} if no file beside it says so.

    digit          true: a digit, light on black, 20 pixels high, see `digits.preprocess_digit`
    short_side     pixels to which the short side of an image is scaled
    pixel_range    what black and white are to the model; by default 0 and 255
    """
    file = preprocessing_file(Path(path))
    if Path(path).suffix.lower() not in KERAS_SUFFIXES:  # a checkpoint of the original
        return {"digit": True, "pixel_range": (0, 255)}
    if not file.exists():
        return {}
    try:
        preprocessing = json.loads(file.read_text(encoding="utf-8-sig"))
        low, high = map(float, preprocessing.get("pixel_range", (0, 255)))
        known = preprocessing.keys() <= {"digit", "short_side", "pixel_range"} and low < high
        known = known and isinstance(preprocessing.get("digit", True), bool)
        if not known or not 1 <= preprocessing.get("short_side", 1) <= 10_000:
            raise ValueError(preprocessing)
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f'{file} must be like {{"digit": true}} or {{"short_side": 256, "pixel_range": [0, 1]}}'
        ) from None
    return preprocessing


def class_names_file(path):  # mine.keras -> mine_classes.txt
    return path.with_name(f"{path.stem}_classes.txt")


def preprocessing_file(path):  # mine.keras -> mine_images.json
    return path.with_name(f"{path.stem}_images.json")


def keras_application(name, weights="imagenet"):
    """A network of `keras.applications`, by its name, such as "ResNet50".

    Returns:
        The model, its preprocessing of images (N, H, W, 3) in 0..255, and the names of its classes, or None.

    Raises:
        UserError: There is no such network, it has no exact class activation map, or its weights, which Keras downloads
            once, cannot be loaded.
    """
    make = None if name.startswith("_") else getattr(keras.applications, name, None)
    if not callable(make):
        names = ", ".join(sorted(n for n in dir(keras.applications) if callable(getattr(keras.applications, n))))
        raise UserError(f"{name} is neither a file nor a network of keras.applications ({names})")
    module = sys.modules[make.__module__]
    to_cam_model(make(weights=None))  # before hundreds of megabytes are downloaded in vain
    try:
        model = make(weights=weights)
    except Exception as error:  # of the download: Keras raises a bare Exception
        raise UserError(f"the weights of {name} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    try:
        codes = np.eye(model.output_shape[-1], dtype=np.float32)
        class_names = [decoded[0][1].replace("_", " ") for decoded in module.decode_predictions(codes, top=1)]
    except Exception as error:  # of the download
        print(
            f"the class names cannot be loaded, so numbers are shown: {' '.join(str(error).split())[:200]}",
            file=sys.stderr,
        )
        class_names = None
    return model, module.preprocess_input, class_names
