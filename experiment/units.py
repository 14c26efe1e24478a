"""What the units of the last convolutional layer contribute to a class activation map."""

import keras
import numpy as np

from cam import class_activation_model


def unit_model(model):
    """A model from images to [f_k (N, h, w, K), F_k (N, K), S_c (N, C), M_c (N, h, w, C)].

    `model` is a network with the layers "feature_maps" and "softmax_weights", such as `lenet` makes.
    """
    feature_maps, pooled = model.get_layer("feature_maps").output, model.get_layer("softmax_weights").input
    return keras.Model(model.input, [feature_maps, pooled, *class_activation_model(model).outputs])


def largest_terms(feature_maps, pooled, softmax_weights, count=5):
    """Splits M_c of one image and class into the terms w_k^c f_k that contribute most to S_c, and the rest.

    Args:
        feature_maps, pooled, softmax_weights: f_k (h, w, K), F_k (K,) and w_k^c (K,).
        count: Number of terms, n.

    Returns:
        k (n,), the largest |w_k^c F_k| first; w_k^c F_k (n + 1,), the last that of all other units together, which add
        up to S_c; and w_k^c f_k (h, w, n + 1), which add up to M_c.
    """
    contributions, maps = softmax_weights * pooled, softmax_weights * feature_maps
    units, others = np.split(np.argsort(-np.abs(contributions), kind="stable"), [count])
    contributions = np.append(contributions[units], contributions[others].sum())
    return units, contributions, np.dstack([maps[:, :, units], maps[:, :, others].sum(axis=2)])
