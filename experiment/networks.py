"""Loading and saving of networks: saved Keras models, checkpoints of the original, `keras.applications`."""

import sys
from pathlib import Path

import keras
import numpy as np

from alexnet import weight_shapes
from cam import class_activation_model
from experiment.files import UserError, atomic_write
from lenet import lenet

# Variables of the original's checkpoints, in the order of our LeNet's weights.
ORIGINAL_VARIABLES = ("conv1/weights", "conv1/biases", "conv2/weights", "conv2/biases", "GAP/W")


def load_network(path):
    """Loads a saved Keras model (`.keras`, in safe mode: no code in it is run), or a checkpoint of the original.

    Raises:
        UserError: The file is missing, or neither.
    """
    path = Path(path)
    try:
        if path.suffix == ".keras":
            return keras.models.load_model(path, compile=False)
        return load_tf1_checkpoint(path)
    except Exception as error:  # whatever Keras or TensorFlow raises for a broken or hostile file
        reason = " ".join(str(error).split())[:200]
        kind = "is not a saved Keras model" if path.suffix == ".keras" else "is not a checkpoint of the original"
        raise UserError(f"{path} {kind if path.exists() else 'is missing'} ({reason})") from None


def load_tf1_checkpoint(checkpoint):
    """The original's network, from its checkpoint in TensorFlow's V1 format, as `lenet` makes it."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(checkpoint))
    kernel, *others = (reader.get_tensor(f"LeNet/{name}") for name in ORIGINAL_VARIABLES)
    model = lenet()
    # Its three channels are equal, so their summed kernel is the same network on one: (5, 5, 3, 32) -> (5, 5, 1, 32)
    model.set_weights([kernel.sum(axis=2, keepdims=True), *others])
    return model


def to_cam_model(model):
    """`cam.class_activation_model`, with a UserError for a model that has another form."""
    try:
        return class_activation_model(model)
    except ValueError as error:
        raise UserError(str(error)) from None


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


def save_network(model, class_names, path):
    """Saves a model, and beside it the names of its classes, a line each."""
    with atomic_write(class_names_file(path)) as part:
        part.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    with atomic_write(path) as part:
        model.save(part)


def load_class_names(path, count):
    """Names of the `count` classes of the model saved at `path`; "0", "1" ... if no file beside it has them."""
    file = class_names_file(Path(path))
    if not file.exists():
        return [str(c) for c in range(count)]
    class_names = file.read_text(encoding="utf-8", errors="replace").splitlines()
    if len(class_names) != count:
        raise UserError(f"{file} has {len(class_names)} lines; the model has {count} classes")
    return class_names


def class_names_file(path):  # mine.keras -> mine_classes.txt
    return path.with_name(f"{path.stem}_classes.txt")


def keras_application(name, weights="imagenet"):
    """A network of `keras.applications`, by its name, such as "ResNet50".

    Returns:
        The model, its preprocessing of images (N, H, W, 3) in 0..255, and a function that gives its class names.

    Raises:
        UserError: There is no such network, or its weights, which Keras downloads once, cannot be loaded.
    """
    make = getattr(keras.applications, name, None)
    if not callable(make):
        names = ", ".join(sorted(n for n in dir(keras.applications) if callable(getattr(keras.applications, n))))
        raise UserError(f"{name} is neither a file nor a network of keras.applications ({names})")
    module = sys.modules[make.__module__]
    try:
        model = make(weights=weights)
    except Exception as error:  # of the download: Keras raises a bare Exception
        raise UserError(f"the weights of {name} cannot be loaded ({' '.join(str(error).split())[:200]})") from None

    def class_names():
        codes = np.eye(model.output_shape[-1], dtype=np.float32)
        return [decoded[0][1].replace("_", " ") for decoded in module.decode_predictions(codes, top=1)]

    return model, module.preprocess_input, class_names
