"""What the units of the last convolutional layer add to a class activation map, and what part of an image they see."""

from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops


def unit_model(cam_model):
    """Adds the feature maps to a model of class activation maps.

    Args:
        cam_model: Model made by `cam.class_activation_model`.

    Returns:
        Keras model from the same images to [f_k (N, h, w, K), F_k (N, K), S_c (N, C), M_c (N, h, w, C)], float32.
    """
    layer = cam_model.get_layer("logits_and_maps")
    feature_maps = layers.Identity(dtype="float32")(layer.input)
    pooled = layers.Flatten(dtype="float32")(layer.operations[0](layer.input))  # may be (N, 1, 1, K)
    return keras.Model(cam_model.input, [feature_maps, pooled, *cam_model.outputs])


def get_softmax_weights(cam_model):
    """w_k^c of a model made by `cam.class_activation_model`, (K, C)."""
    return ops.convert_to_numpy(cam_model.get_layer("logits_and_maps").softmax_weights_and_biases()[0])


class Terms(NamedTuple):
    """M_c of one image, split into the terms w_k^c f_k that matter most for the score, and the rest."""

    units: np.ndarray  # k (n,), the largest |w_k^c F_k| first
    weights: np.ndarray  # w_k^c (n,)
    parts: np.ndarray  # of S_c (n + 1,): w_k^c F_k, and those of all other units together
    maps: np.ndarray  # of M_c (h, w, n + 1): w_k^c f_k, and those of all other units together


def largest_terms(feature_maps, pooled, softmax_weights, count=5):
    """Splits the class activation map of one image and class.

    Args:
        feature_maps: f_k, (h, w, K).
        pooled: F_k, (K,).
        softmax_weights: w_k^c of the class, (K,).
        count: Number n of terms.

    Returns:
        `Terms`. Their maps add up to M_c, and their parts to S_c - b_c.
    """
    parts, maps = softmax_weights * pooled, softmax_weights * feature_maps
    units, others = np.split(np.argsort(-np.abs(parts), kind="stable"), [count])
    rest = maps[:, :, others].sum(axis=2)
    return Terms(
        units,
        softmax_weights[units],
        np.append(parts[units], parts[others].sum()),
        np.dstack([maps[:, :, units], rest]),
    )


def receptive_field(model, height, width):
    """Finds the pixels that a location of the feature maps depends on.

    Args:
        model: Keras model from images to feature maps, a chain of layers.
        height, width: Size of the images.

    Returns:
        For rows and for columns: (start, stride, length). Location i depends on the pixels from start + i * stride on,
        `length` of them, of which the first and the last may lie beyond the border.
    """
    fields = []
    for axis, size in enumerate((height, width)):
        start, stride, length = 0, 1, 1  # of the input
        for layer in model.layers:
            if isinstance(layer, layers.ZeroPadding2D):
                before, after = layer.padding[axis]
                start, size = start - before * stride, size + before + after
            window = getattr(layer, "kernel_size", None) or getattr(layer, "pool_size", None)
            if window:
                reach = (window[axis] - 1) * getattr(layer, "dilation_rate", (1, 1))[axis]  # beyond the first pixel
                steps = (size - 1 if layer.padding == "same" else size - 1 - reach) // layer.strides[axis]
                padded = max(steps * layer.strides[axis] + reach + 1 - size, 0)
                start, size = start - padded // 2 * stride, steps + 1
                length, stride = length + reach * stride, stride * layer.strides[axis]
        fields.append((start, stride, length))
    return fields
