"""What the units of the last convolutional layer contribute to a class activation map."""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from cam import class_activation_model


def unit_model(model):
    """A model from images to [f_k (N, h, w, K), F_k (N, K), S_c (N, C), M_c (N, h, w, C)].

    `model` is a network with the layers "feature_maps" and "softmax_weights", such as `lenet` makes.
    """
    feature_maps, pooled = model.get_layer("feature_maps").output, model.get_layer("softmax_weights").input
    return keras.Model(model.input, [feature_maps, pooled, *class_activation_model(model).outputs])


def get_softmax_weights(model):
    """w_k^c of such a network, (K, C)."""
    return ops.convert_to_numpy(model.get_layer("softmax_weights").kernel)


class Terms(NamedTuple):
    """M_c of one image, split into the terms w_k^c f_k that contribute most to the logit, and the rest."""

    units: np.ndarray  # k (n,), the largest |w_k^c F_k| first
    weights: np.ndarray  # w_k^c (n,)
    contributions: np.ndarray  # to S_c (n + 1,): w_k^c F_k, and those of all other units together
    maps: np.ndarray  # that add up to M_c (h, w, n + 1): w_k^c f_k, and those of all other units together


def largest_terms(feature_maps, pooled, softmax_weights, count=5):
    """Splits M_c of one image and class into `count` terms and the rest: from f_k (h, w, K), F_k (K,), w_k^c (K,).

    The maps of the `Terms` add up to M_c, and their contributions to S_c.
    """
    contributions, maps = softmax_weights * pooled, softmax_weights * feature_maps
    units, others = np.split(np.argsort(-np.abs(contributions), kind="stable"), [count])
    rest = maps[:, :, others].sum(axis=2)
    return Terms(
        units,
        softmax_weights[units],
        np.append(contributions[units], contributions[others].sum()),
        np.dstack([maps[:, :, units], rest]),
    )
