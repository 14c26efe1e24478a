"""Networks to look into: the LeNet of a run, any saved Keras model, the original's checkpoints, and those of Keras."""

import sys
from pathlib import Path

import keras
import numpy as np

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
