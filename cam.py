"""Class activation maps: the method of "Learning Deep Features for Discriminative Localization", Zhou et al. 2016.

    f_k(x, y)   activation of unit k of the last convolutional layer at location (x, y): the feature maps
    w_k^c       softmax weight of class c for unit k
    F_k         mean of f_k over the locations: global average pooling
    S_c         sum_k w_k^c F_k: the logit of class c                         equation (1)
    M_c(x, y)   sum_k w_k^c f_k(x, y): the class activation map of class c    equation (2)

so S_c is the mean of M_c over the locations. Arrays are (N, H, W, ...): images, rows, columns.
"""

import sys

if __name__ == "__main__":
    print("cam.py is a library now; run python show.py IMAGE ...", file=sys.stderr)
    sys.exit(2)

import keras
import matplotlib
import numpy as np
from keras import layers, ops
from skimage import measure
from tqdm import tqdm

# XLA's convolutions on a CPU are several times slower than TensorFlow's own.
JIT_COMPILE = False if keras.backend.backend() == "tensorflow" else "auto"
POOLINGS = {"GlobalAveragePooling2D": ops.mean, "GlobalMaxPooling2D": ops.max}


def class_activation_map(feature_maps, softmax_weights):
    """Equation (2): M_c(x, y) = sum_k w_k^c f_k(x, y). No bias, no ReLU: M_c may be negative.

    Args:
        feature_maps: f_k, (N, H, W, K).
        softmax_weights: w_k^c, (K, C).

    Returns:
        M_c, (N, H, W, C).
    """
    return ops.matmul(feature_maps, softmax_weights)  # (N, H, W, K) @ (K, C) -> (N, H, W, C)


def class_activation_model(model):
    """Turns a classifier into a model that gives logits and class activation maps in one forward pass.

    Args:
        model: Keras model of the form convolutions -> GlobalAveragePooling2D -> (Dropout) -> Dense, the Dense layer
            with or without bias and softmax. Its layers are used, not copied: the maps follow its training.
            GlobalMaxPooling2D instead is the comparison in section 3.2.

    Returns:
        Keras model from the same images (N, h, w, channels) to [S_c (N, C), M_c (N, H, W, C)], both float32. If the
        Dense layer has a bias b_c, S_c is the mean of M_c plus b_c. With max pooling there is no such identity.

    Raises:
        ValueError: The model has another form.
    """
    outputs = getattr(model, "outputs", None) or []
    tail, tensors = [], outputs  # the last layers, last first: Dense and Dropout, and the one before them
    while len(tensors) == 1 and (not tail or isinstance(tail[-1], (layers.Dense, layers.Dropout))):
        tail.append(tensors[0]._keras_history.operation)
        tensors = keras.tree.flatten(tail[-1].input)
    form = [type(layer).__name__ for layer in reversed(tail) if not isinstance(layer, layers.Dropout)]
    if form not in [[pooling, "Dense"] for pooling in POOLINGS] or tail[-1].data_format != "channels_last":
        found = " -> ".join(form) or (f"{len(outputs)} outputs" if outputs else "no layer that is built")
        raise ValueError(
            f"model {model.name!r} has no exact class activation map: it ends in {found}; "
            "it must be convolutions -> GlobalAveragePooling2D (channels last) -> (Dropout) -> Dense"
        )
    dense, feature_maps = next(layer for layer in tail if isinstance(layer, layers.Dense)), tail[-1].input
    logits_and_maps = LogitsAndMaps(dense, POOLINGS[form[0]], name="logits_and_maps")(feature_maps)
    cam_model = keras.Model(model.input, logits_and_maps, name=f"{model.name}_cam")
    cam_model.compile(jit_compile=JIT_COMPILE)
    return cam_model


class LogitsAndMaps(layers.Layer):
    """Feature maps f_k (N, H, W, K) -> logits S_c (N, C) and class activation maps M_c (N, H, W, C)."""

    def __init__(self, dense, pool, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        self.dense, self.pool = dense, pool

    def call(self, feature_maps):
        pooled = self.pool(feature_maps, axis=(1, 2))  # F_k: (N, K)
        logits = ops.matmul(pooled, self.dense.kernel)  # S_c, equation (1): (N, C)
        if self.dense.use_bias:
            logits = logits + self.dense.bias
        return logits, class_activation_map(feature_maps, self.dense.kernel)


def predict_class_maps(cam_model, images, classes, batch_size=50):
    """Logits of images, and the class activation map of one class for each of them.

    Args:
        cam_model: Model made by `class_activation_model`.
        images: (N, h, w, channels), as the model takes them.
        classes: One class per image, (N,), 0..C-1.
        batch_size: Images per forward pass.

    Returns:
        S_c (N, C) and M_c of the given classes (N, H, W), float32.
    """
    classes, logits, maps = np.asarray(classes), [], []
    hidden = len(images) < 8 * batch_size or None  # of the progress bar; None: shown on a terminal only
    for start in tqdm(range(0, len(images), batch_size), "predicting", leave=False, disable=hidden):
        batch = slice(start, start + batch_size)
        batch_logits, batch_maps = cam_model.predict_on_batch(images[batch])
        logits.append(batch_logits)
        maps.append(batch_maps[np.arange(len(batch_maps)), :, :, classes[batch]])
    return np.concatenate(logits), np.concatenate(maps)


def zero_mean_over_classes(softmax_weights):
    """Subtracts from w_k^c (K, C) its mean over the classes, for each unit k. A Keras constraint for training.

    Softmax, and so prediction and loss, does not change when the same map is added to the maps of all classes. Gradient
    descent leaves that common part as it is; Adam, whose steps do not sum to zero over the classes, makes it drift.
    With it removed, M_c shows the evidence for class c against the other classes.
    """
    return softmax_weights - ops.mean(softmax_weights, axis=1, keepdims=True)


def upsample(maps, height, width):
    """Upsamples maps (N, H, W) or (N, H, W, C) to `height` x `width`: bilinear, half-pixel centres (section 2)."""
    if len(maps.shape) == 3:
        return upsample(maps[..., None], height, width)[..., 0]
    maps = ops.image.resize(maps, (height, width), interpolation="bilinear", data_format="channels_last")
    return ops.convert_to_numpy(maps)


def normalize(maps):
    """Scales each map of (..., H, W) to [0, 1] by its minimum and maximum; a constant map becomes zeros.

    Returns:
        float32 array of the same shape.

    Raises:
        ValueError: A map has a value that is not finite.
    """
    maps = np.asarray(maps, np.float64)  # in which the difference of two float32 cannot overflow
    if not np.isfinite(maps).all():
        raise ValueError("a class activation map is not finite: weights or image have infinite or NaN values")
    low, high = maps.min(axis=(-2, -1), keepdims=True), maps.max(axis=(-2, -1), keepdims=True)
    return ((maps - low) / np.where(high > low, high - low, 1)).astype(np.float32)


def overlay(image, heatmap, colormap="jet", opacity=0.5, invert=None):
    """Overlays a heatmap on an image.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3) uint8.
        heatmap: (H, W), 0..1: a map upsampled to the size of the image, and normalized.
        colormap: Name of a matplotlib colormap.
        opacity: Opacity of the heatmap, 0..1.
        invert: Whether to invert the image first; by default a grey one is, so that black does not darken the colours.

    Returns:
        RGB image (H, W, 3) uint8.
    """
    colors = 255 * matplotlib.colormaps[colormap](np.linspace(0, 1, 256, dtype=np.float32))[:, :3]  # (256, 3)
    background = image.reshape(*heatmap.shape, -1).astype(np.float32)  # (H, W, 1 or 3)
    if invert or (invert is None and background.shape[2] == 1):
        background = 255 - background
    blended = opacity * colors[np.rint(255 * heatmap).astype(np.uint8)] + (1 - opacity) * background  # (H, W, 3)
    return np.rint(blended).astype(np.uint8)


def bounding_box(class_map, threshold=0.2):
    """The paper's box: around the largest connected component above 20% of the map's maximum (section 3.2).

    Args:
        class_map: M_c of one image and class, (H, W), upsampled to the image for a box in its pixels.
        threshold: Share of the maximum, 0..1.

    Returns:
        (x0, y0, x1, y1), half-open, in locations of the map; None if the map is nowhere positive.

    Raises:
        ValueError: The map has a value that is not finite.
    """
    class_map = np.asarray(class_map)
    if not np.isfinite(class_map).all():
        raise ValueError("a class activation map is not finite: weights or image have infinite or NaN values")
    maximum = class_map.max()
    return largest_component_box(class_map > threshold * maximum) if maximum > 0 else None


def largest_component_box(mask):
    """Box (x0, y0, x1, y1), half-open, around the largest connected component of a mask (H, W); None if it is empty.

    Locations that touch at a corner are connected. Of components of equal size the first in reading order counts.
    """
    labels = measure.label(mask, connectivity=2)  # (H, W): 0 outside, 1, 2 ... by reading order
    sizes = np.bincount(labels.ravel())[1:]
    if not len(sizes):
        return None
    component = labels == 1 + sizes.argmax()
    columns, rows = np.flatnonzero(component.any(axis=0)), np.flatnonzero(component.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
