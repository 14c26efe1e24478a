"""Class activation maps: the method of "Learning Deep Features for Discriminative Localization", Zhou et al. 2016.

    f_k(x, y)   activation of unit k of the last convolutional layer at location (x, y): the feature maps
    w_k^c       softmax weight of class c for unit k
    F_k         mean of f_k over the locations: global average pooling (in the paper their sum)
    S_c         sum_k w_k^c F_k: the logit of class c, and with the sums exchanged
                mean over (x, y) of sum_k w_k^c f_k(x, y)                     equation (1)
    P_c         exp(S_c) / sum_c exp(S_c): its probability, the softmax
    M_c(x, y)   sum_k w_k^c f_k(x, y): the class activation map of class c    equation (2)

so S_c is the mean of M_c over the locations. Arrays are (N, H, W, ...): images, rows, columns.
"""

import keras
import matplotlib
import numpy as np
from keras import ops
from skimage import measure


def class_activation_map(feature_maps, softmax_weights):
    """Equation (2): M_c(x, y) = sum_k w_k^c f_k(x, y). No bias, no ReLU: M_c may be negative.

    This is the definition; `class_activation_model` gives the same maps with the layers of a network.

    Args:
        feature_maps: f_k, (N, H, W, K).
        softmax_weights: w_k^c, (K, C).

    Returns:
        M_c, (N, H, W, C).
    """
    return ops.matmul(feature_maps, softmax_weights)  # (N, H, W, K) @ (K, C) -> (N, H, W, C)


def class_activation_model(model, feature_maps="feature_maps", softmax_weights="softmax_weights"):
    """Turns a classifier into a model that gives logits and class activation maps in one forward pass.

    The layer that computes the logits S_c = sum_k w_k^c F_k computes the maps M_c, equation (2), when it is applied to
    the feature maps: at each location, instead of to their mean.

    Args:
        model: Functional Keras model: feature maps -> global average pooling -> `Dense(C, use_bias=False)`.
        feature_maps: Name of the layer whose output is f_k, (N, H, W, K).
        softmax_weights: Name of the Dense layer. Layers are shared with `model`, so the maps reflect its current
            weights.

    Returns:
        Keras model from the same images to [S_c (N, C), M_c (N, H, W, C)].

    Raises:
        ValueError: There is no such layer, or the Dense layer has a bias or an activation.
    """
    f = model.get_layer(feature_maps).output  # f_k: (N, H, W, K)
    dense = model.get_layer(softmax_weights)  # F_k -> S_c; f_k -> M_c, equation (2)
    if dense.use_bias or dense.activation is not keras.activations.linear:
        raise ValueError(f"layer {softmax_weights!r} must be Dense(C, use_bias=False), with no activation")
    return keras.Model(model.input, [model.output, dense(f)], name=f"{model.name}_cam")


def upsample(maps, height, width):
    """Upsamples maps (N, H, W) or (N, H, W, C) to `height` x `width`, bilinear.

    The paper upsamples to the size of the image and does not say how (section 2). Pixel centres are at half integers.
    """
    if len(maps.shape) == 3:
        return upsample(maps[..., None], height, width)[..., 0]
    return ops.convert_to_numpy(ops.image.resize(maps, (height, width), "bilinear", data_format="channels_last"))


def normalize(maps):
    """Scales each map (H, W) of (..., H, W) to [0, 1] by its minimum and maximum; a constant map becomes zeros.

    Raises:
        ValueError: A map has a value that is not finite.
    """
    maps = np.asarray(maps, np.float64)  # so that high - low cannot overflow
    if not np.isfinite(maps).all():
        raise ValueError("a class activation map is not finite: weights or image have infinite or NaN values")
    low, high = maps.min(axis=(-2, -1), keepdims=True), maps.max(axis=(-2, -1), keepdims=True)
    return ((maps - low) / np.where(high > low, high - low, 1)).astype(np.float32)


def overlay(image, heatmap, colormap="jet", opacity=0.5):
    """Overlays a heatmap on an image; returns RGB (H, W, 3) uint8.

    A grey image is inverted first: a black background would darken the colours.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3) uint8.
        heatmap: (H, W), 0..1: a map upsampled to the size of the image, and normalized.
        colormap: Name of a matplotlib colormap.
        opacity: Opacity of the heatmap, 0..1: one number, or one for each pixel, (H, W, 1).

    Raises:
        ValueError: The image is not uint8, or the heatmap has values beyond 0..1 or NaN.
    """
    if image.dtype != np.uint8:
        raise ValueError(f"the image must be uint8, 0..255, not {image.dtype}")
    if heatmap.dtype.kind != "f" or not (heatmap.min() >= 0 and heatmap.max() <= 1):
        raise ValueError("the heatmap must have floating-point values in 0..1; see normalize")
    colors = 255 * matplotlib.colormaps[colormap](np.linspace(0, 1, 256, dtype=np.float32))[:, :3]  # (256, 3)
    background = image.reshape(*heatmap.shape, -1).astype(np.float32)  # (H, W, 1 or 3)
    if background.shape[2] == 1:
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

    Locations that touch at a corner are connected. Of components of equal size, the first in raster order counts.
    """
    labels = measure.label(mask, connectivity=2)  # (H, W): 0 outside, 1, 2 ... in raster order
    if not labels.any():
        return None
    component = labels == np.bincount(labels[labels > 0]).argmax()
    columns, rows = np.flatnonzero(component.any(axis=0)), np.flatnonzero(component.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
