"""Class activation maps of an image, with any network."""

import re
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from cam import bounding_box, upsample
from experiment import networks
from experiment.exact_maps import exact_cam_model
from experiment.files import UserError
from experiment.images import Picture, read_picture
from experiment.preprocessing import Preprocessing, check_inputs, load_preprocessing


class Cams(NamedTuple):
    """Class activation maps of one image for n classes, as `predict_cams` returns them."""

    classes: np.ndarray  # (n,): 0..C-1
    names: list  # of the classes
    scores: np.ndarray  # S_c (n,)
    probabilities: np.ndarray  # (n,): what the network itself gives; of bare logits their softmax
    maps: np.ndarray  # M_c (n, h, w), not upsampled
    boxes: list  # (x0, y0, x1, y1), half-open, in pixels of the image; None if a map is nowhere positive
    picture: Picture  # the image


def predict_cams(image, network, top=5, classes=None):
    """Class activation maps of an image.

        cams = predict_cams("dog.jpg", Network("ResNet50"))
        print(cams.names[0], cams.scores[0], cams.boxes[0])

    Args:
        image: Path of an image file; Pillow image; or array (H, W) or (H, W, 1), or uint8 (H, W, 3) or, with
            transparency, (H, W, 4).
        network: A `Network`; or what `Network` takes, which is then loaded in each call.
        top: Number of classes, those with the highest scores.
        classes: Class or classes to use instead, 0..C-1.

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
    classes = np.atleast_1d(classes)
    if classes.dtype.kind not in "iu" or not classes.size or classes.min() < 0 or classes.max() >= len(scores):
        raise UserError(f"classes must be whole numbers in 0..{len(scores) - 1}")
    height, width = picture.pixels.shape[:2]
    scale = np.array([picture.width / width, picture.height / height] * 2)
    boxes = [bounding_box(upsample(maps[None, :, :, c], height, width)[0]) for c in classes]
    boxes = [box and tuple(np.rint(scale * box).astype(int).tolist()) for box in boxes]
    names = [network.class_names[c] for c in classes]
    maps = np.moveaxis(maps[:, :, classes], 2, 0)
    return Cams(classes, names, scores[classes], probabilities[classes], maps, boxes, picture)


class Network:
    """A classifier with its class activation maps, its class names, and the preprocessing of its images.

    Args:
        model: Keras model; path of a saved one, or of a checkpoint of the original; or name of a network of
            `keras.applications`, such as "ResNet50", with its ImageNet weights and its own preprocessing.
        pixel_range, preprocess, short_side: Override the `Preprocessing` recorded beside a saved model.
        output: Name of the output, if the model has several.

    Attributes:
        cam_model: Model from images to [S_c (N, C), M_c (N, h, w, C)].
        class_names: Names of the C classes; "0", "1" ... if none are known.
        wordnet_ids: Their WordNet ids, of a network of `keras.applications`; None if they are not known.

    Raises:
        UserError: The model cannot be loaded, has no exact class activation maps, or does not take one image.
    """

    def __init__(self, model, pixel_range=None, preprocess=None, output=None, short_side=None):
        class_names, self.wordnet_ids, preprocessing = None, None, Preprocessing()
        if isinstance(model, keras.Model):
            self.source = f"model {model.name!r}"
        elif not isinstance(model, str | Path):
            raise UserError(f"{type(model)} is not a model of Keras 3, nor a path or a name of one")
        elif Path(model).suffix or Path(model).exists():
            self.source, model = model, networks.load_network(model)
            preprocessing = load_preprocessing(self.source)
            class_names = networks.load_class_names(self.source)
        else:
            self.source = model
            model, preprocessing, class_names, self.wordnet_ids = networks.keras_application(str(model))
        if preprocess:
            preprocessing = preprocessing._replace(preprocess=preprocess, pixel_range=None)
        if pixel_range:
            preprocessing = preprocessing._replace(pixel_range=pixel_range)
        if short_side:
            preprocessing = preprocessing._replace(short_side=short_side)
        self.preprocessing = preprocessing
        self.range_is_known = bool(preprocessing.preprocess or preprocessing.pixel_range)

        self.cam_model = exact_cam_model(model, output)
        self.input_shape = check_inputs(self.source, self.cam_model.inputs, preprocessing)
        self.activation = self.cam_model.get_layer("logits_and_maps").activation
        count = self.cam_model.output_shape[0][-1]
        self.is_binary = count == 1 and self.activation in ("linear", "sigmoid")
        count += self.is_binary
        self.class_names = class_names or [str(c) for c in range(count)]
        if len(self.class_names) != count:
            file = networks.class_names_file(Path(self.source))
            raise UserError(f"{file} has {len(self.class_names)} lines; the model has {count} classes")

    def preprocess(self, pixels):
        """An image (H, W, 3) uint8 as the network takes it, (h, w, channels) float32."""
        return self.preprocessing.apply(pixels, self.input_shape)

    def predict(self, pixels):
        """Scores S_c (C,), probabilities (C,) and maps M_c (h, w, C) of an image (H, W, 3) uint8."""
        logits, maps = (output[0] for output in self.predict_on_batch(self.preprocess(pixels)[None]))
        activation = keras.ops.sigmoid if self.is_binary or self.activation == "sigmoid" else keras.ops.softmax
        return logits, keras.ops.convert_to_numpy(activation(logits)), maps

    def predict_on_batch(self, images):
        """Scores S_c (N, C) and maps M_c (N, h, w, C) of preprocessed images (N, H, W, channels)."""
        try:
            logits, maps = self.cam_model.predict_on_batch(images)
        except Exception as error:  # whatever Keras and its backend raise
            height, width = images.shape[1:3]
            reason = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())[:200]
            raise UserError(f"{self.source} does not take {width} x {height} pixels; too small? ({reason})") from None
        if not maps.size or not np.isfinite(maps).all():
            raise UserError(f"{self.source} gives infinite or NaN values")
        if self.is_binary:  # one logit: its class against the other
            logits, maps = np.concatenate([-logits, logits], axis=1), np.concatenate([-maps, maps], axis=3)
        return logits, maps
