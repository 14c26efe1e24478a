"""Networks to look into: the LeNet of a run, any saved Keras model, the original's checkpoints, and those of Keras."""

import sys
import zipfile
from pathlib import Path

import keras
import numpy as np

from alexnet import weight_shapes
from files import complete_file
from lenet import lenet

# The variables of the repository of 2017, in the order of our LeNet's weights.
ORIGINAL = ("conv1/weights", "conv1/biases", "conv2/weights", "conv2/biases", "GAP/W")


class NetworkError(ValueError):
    """A network cannot be loaded; the message names it and says what to do."""


def load_network(path):
    """Loads a saved Keras model (`.keras`, in safe mode: no code in it is run), or a checkpoint of the original.

    Raises:
        NetworkError: The file is missing, or neither.
    """
    path = Path(path)
    try:
        if path.suffix == ".keras":
            return keras.models.load_model(path, compile=False)
        return original_lenet(path)
    except Exception as error:  # whatever Keras or TensorFlow raises for a broken or hostile file
        reason = " ".join(str(error).split())[:200]
        kind = "is not a saved Keras model" if path.suffix == ".keras" else "is not a checkpoint of the original"
        raise NetworkError(f"{path} {kind if path.exists() else 'is missing'} ({reason})") from None


def original_lenet(checkpoint):
    """The original's network, from its checkpoint in TensorFlow's V1 format.

    Its three channels are equal, so the sum of the first kernel over them is the same network on one channel.

    Returns:
        Model as `lenet` makes it, on one channel.
    """
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(checkpoint))
    kernel, *others = (reader.get_tensor(f"LeNet/{name}") for name in ORIGINAL)
    model = lenet()
    model.set_weights([kernel.sum(axis=2, keepdims=True), *others])  # (5, 5, 3, 32) -> (5, 5, 1, 32)
    return model


def torchvision_convolutions(path):
    """Reads the weights of torchvision's AlexNet from an .npz file: arrays by name, as `weight_shapes` lists them.

    Others in it are not read, and nothing is unpickled.
    """
    weights = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            for name, shape in weight_shapes().items():
                if f"{name}.npy" not in members:
                    raise NetworkError(f"{path} has no {name}; the README has the line that makes such a file")
                with archive.open(f"{name}.npy") as file:
                    version = np.lib.format.read_magic(file)
                    read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
                    found, fortran_order, dtype = read_header(file)
                    if found != shape or dtype.kind != "f":
                        raise NetworkError(f"{path}: {name} is {found} {dtype}, and not {shape} of floating point")
                    count = int(np.prod(shape))
                    values = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
                weights[name] = values.reshape(shape, order="F" if fortran_order else "C").astype(np.float32)
                if not np.isfinite(weights[name]).all():
                    raise NetworkError(f"{path}: {name} has infinite or NaN values")
    except FileNotFoundError:
        message = f"{path} is missing; the README has the line that makes it, --weights none does without"
        raise NetworkError(message) from None
    except NetworkError:
        raise
    except Exception as error:  # zipfile and NumPy raise a dozen kinds for a damaged file
        raise NetworkError(f"{path} is not an .npz file that can be read ({error})") from None
    return weights


def save_network(model, names, path):
    """Saves a model, and beside it, if they are more than numbers, the names of its classes."""
    if names != numbers(len(names)):
        with complete_file(names_file(path)) as part:
            part.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    with complete_file(path) as part:
        model.save(part)


def class_names(path, count):
    """Names of the `count` classes of a saved model; their numbers if there is no file of names beside it."""
    file = names_file(Path(path))
    if not file.exists():
        return numbers(count)
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        names = []
    if len(names) != count:
        raise NetworkError(f"{file} has {len(names)} lines that can be read; the model has {count} classes")
    return names


def names_file(path):
    """Path of the names of the classes of the model saved at `path`."""
    return path.with_name(f"{path.stem}_classes.txt")


def numbers(count):
    """Names of `count` classes that have none: "0", "1" ..."""
    return [str(label) for label in range(count)]


def keras_application(name, weights="imagenet"):
    """A network of `keras.applications`, by its name, such as "ResNet50".

    Args:
        name: Name of the function that makes it.
        weights: As that function takes them; "imagenet" downloads them once.

    Returns:
        The model, its preprocessing of images (N, H, W, 3) in 0..255, and a function that takes probabilities (N, C)
        to the names of the classes.

    Raises:
        NetworkError: There is no such network, or its weights cannot be loaded.
    """
    make = getattr(keras.applications, name, None)
    if not callable(make):
        names = ", ".join(sorted(n for n in dir(keras.applications) if callable(getattr(keras.applications, n))))
        raise NetworkError(f"{name} is neither a file nor a network of keras.applications ({names})")
    module = sys.modules[make.__module__]
    try:
        model = make(weights=weights)
    except Exception as error:  # of the download: Keras raises a bare Exception
        raise NetworkError(f"the weights of {name} cannot be loaded ({' '.join(str(error).split())[:200]})") from None

    def class_names():
        codes = np.eye(model.output_shape[-1], dtype=np.float32)
        return [decoded[0][1].replace("_", " ") for decoded in module.decode_predictions(codes, top=1)]

    return model, module.preprocess_input, class_names
