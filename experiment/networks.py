"""Loading and saving of networks: saved Keras models, checkpoints of the original, `keras.applications`."""

import contextlib
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np

from alexnet import weight_shapes
from experiment.exact_maps import exact_cam_model, find_feature_maps
from experiment.files import UserError, atomic_write
from experiment.keras2 import load_keras2, read_config
from experiment.preprocessing import (
    KERAS_SUFFIXES,
    Preprocessing,
    check_inputs,
    load_preprocessing,
    preprocessing_file,
    save_preprocessing,
)
from lenet import lenet

# Variables of the original's checkpoints, in the order of our LeNet's weights.
ORIGINAL_VARIABLES = ("conv1/weights", "conv1/biases", "conv2/weights", "conv2/biases", "GAP/W")
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
    try:
        if path.suffix.lower() not in KERAS_SUFFIXES:
            return load_tf1_checkpoint(path)
        with tempfile.TemporaryDirectory() as folder:
            file, suffix = path, ".keras" if zipfile.is_zipfile(path) else ".h5"
            if path.suffix != suffix:  # Keras goes by the suffix, and Keras 2.12 wrote HDF5 to .keras
                file = shutil.copy(path, Path(folder) / f"{path.stem}{suffix}")
            if keras_version(file).startswith("2."):
                return load_keras2(file)
            return keras.models.load_model(file, compile=False)
    except Exception as error:  # whatever Keras or TensorFlow raises for a broken or hostile file
        raise UserError(f"{path} {reason(path, error)}") from None


def reason(path, error):
    """Why a network cannot be loaded from `path`, after the exception that was raised."""
    message = str(error)
    if not path.exists():
        return "is missing; run mnist.py first" if path.name == "lenet.keras" else "is missing"
    if (path / "saved_model.pb").exists():
        return "is a TensorFlow SavedModel, which does not have the layers; save the Keras model as .keras"
    version = keras_version(path)
    if version.startswith("2."):
        hint = "build the network with Keras 3, load the weights, and save it as .keras"
        why = f" ({error})" if isinstance(error, NotImplementedError) else ""
        return f"was saved by Keras {version}, and Keras 3 cannot load it{why}; {hint}"
    for pattern, text in REASONS.items():
        found = re.search(pattern, message)
        if found:
            return found.expand(text)
    if path.suffix.lower() in KERAS_SUFFIXES:
        return f"is not a saved Keras model ({' '.join(message.split())[:200]})"
    hint = "build a network of another library in Keras, copy the weights, and save it as .keras"
    return f"is neither a saved Keras model ({', '.join(KERAS_SUFFIXES)}) nor a checkpoint of the original; {hint}"


def keras_version(path):
    """Version of Keras that saved a .keras or .h5 file; "" if the file does not say."""
    with contextlib.suppress(Exception):  # whatever is raised for a broken or hostile file
        return read_config(path)[0]
    return ""


def load_tf1_checkpoint(checkpoint):
    """The original's network, from its checkpoint in TensorFlow's V1 format, as `lenet` makes it."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(checkpoint))
    kernel, *others = (reader.get_tensor(f"LeNet/{name}") for name in ORIGINAL_VARIABLES)
    model = lenet()
    # Its three channels are equal, so their summed kernel is the same network on one: (5, 5, 3, 32) -> (5, 5, 1, 32)
    model.set_weights([kernel.sum(axis=2, keepdims=True), *others])
    return model


def check_model_fits_data(path, cam_model, shape, classes):
    """Raises a UserError if the model saved at `path` does not take images (H, W, channels), or has other classes."""
    preprocessing = load_preprocessing(path)._replace(digit=False)  # the digits of an experiment are given as they are
    found = check_inputs(path, cam_model.inputs, preprocessing)
    fits = all(size in (None, wanted) for size, wanted in zip(found, shape, strict=True))
    if not fits or cam_model.output_shape[0][-1] != classes:
        size = f"{shape[1]} x {shape[0]} pixels and {shape[2]} channel(s)"
        raise UserError(f"{path} must take images of {size}, and have {classes} classes")
    if preprocessing not in (Preprocessing(), Preprocessing(pixel_range=(0, 255))):
        file = preprocessing_file(Path(path))
        raise UserError(f'{file} is not {{"pixel_range": [0, 255]}}, which is how --evaluate prepares images')


def load_torchvision_convolutions(path):
    """Reads the convolutions of torchvision's AlexNet from an .npz file: arrays by the names in `weight_shapes`."""
    hint = "docs/photos.md says how to make it; --weights none does without"
    try:
        with np.load(path, allow_pickle=False) as file:
            weights = {name: file[name] for name in weight_shapes()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {hint}") from None
    except Exception as error:  # zipfile and NumPy raise a dozen kinds for a damaged file
        raise UserError(f"{path} cannot be read ({error}); {hint}") from None
    for name, shape in weight_shapes().items():
        values = weights[name]
        if values.shape != shape or values.dtype.kind != "f" or not np.isfinite(values).all():
            raise UserError(f"{path}: {name} must be an array {shape} of finite floating-point numbers; {hint}")
    return weights


def save_network(model, class_names, preprocessing, path):
    """Saves a model, and beside it the names of its classes, a line each, and its `Preprocessing`."""
    with atomic_write(class_names_file(path)) as part:
        part.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    save_preprocessing(preprocessing, path)
    with atomic_write(path) as part:
        model.save(part)


def load_class_names(path):
    """Names of the classes of the model saved at `path`; None if no file beside it has them."""
    file = class_names_file(Path(path))
    if not file.exists():
        return None
    return file.read_text(encoding="utf-8-sig", errors="replace").rstrip("\n").split("\n")


def class_names_file(path):  # mine.keras -> mine_classes.txt
    return path.with_name(f"{path.stem}_classes.txt")


def keras_application(name):
    """A network of `keras.applications`, by its name, such as "ResNet50", with its ImageNet weights.

    Returns:
        The model; its `Preprocessing`; the names of its classes and their WordNet ids, or None and None.

    Raises:
        UserError: There is no such network, it has no exact class activation map, or its weights, which Keras downloads
            once, cannot be loaded.
    """
    make, preprocessing = find_application(name)
    exact_cam_model(make(weights=None))  # before hundreds of megabytes are downloaded in vain
    model = download(name, make)
    class_names = wordnet_ids = None
    try:
        codes = np.eye(model.output_shape[-1], dtype=np.float32)
        best = sys.modules[make.__module__].decode_predictions(codes, top=1)
        wordnet_ids, class_names, _ = zip(*(decoded[0] for decoded in best), strict=True)
        class_names = [name.replace("_", " ") for name in class_names]
    except Exception as error:  # of the download
        reason = " ".join(str(error).split())[:200]
        print(f"the class names cannot be loaded, so numbers are shown: {reason}", file=sys.stderr)
    return model, preprocessing, class_names, wordnet_ids


def load_features(network):
    """A network without its classifier, as a model from images to its last feature maps f_k (N, h, w, K).

    Args:
        network: Path of a saved Keras model, or name of a network of `keras.applications`.

    Returns:
        The model, and its `Preprocessing`.

    Raises:
        UserError: The network cannot be loaded, or has no feature maps.
    """
    if Path(network).suffix or Path(network).exists():
        try:
            images, feature_maps, _ = find_feature_maps(load_network(network))
            return keras.Model(images, feature_maps), load_preprocessing(network)
        except ValueError as error:
            raise UserError(f"{network}: {error}") from None
    make, preprocessing = find_application(network)
    return download(network, make, include_top=False), preprocessing


def find_application(name):
    """The function of `keras.applications` that makes the network `name`, and its `Preprocessing`."""
    make = None if name.startswith("_") else getattr(keras.applications, name, None)
    if not callable(make):
        names = ", ".join(sorted(n for n in dir(keras.applications) if callable(getattr(keras.applications, n))))
        raise UserError(f"{name} is neither a file nor a network of keras.applications ({names})")
    return make, Preprocessing(preprocess=make.__module__.split(".")[-1])


def download(name, make, **options):
    """The network `name` of `keras.applications`, which `make` makes, with its ImageNet weights."""
    try:
        return make(weights="imagenet", **options)
    except Exception as error:  # of the download: Keras raises a bare Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights of {name} cannot be loaded ({reason}); give the file of a network") from None
