"""Class activation maps: the method of "Learning Deep Features for Discriminative Localization", Zhou et al. 2016.

    f_k(x, y)   activation of unit k of the last convolutional layer at cell (x, y): the feature maps
    w_k^c       softmax weight of class c for unit k
    F_k         f_k averaged over the cells: global average pooling
    S_c         sum_k w_k^c F_k: the logit of class c                         equation (1)
    M_c(x, y)   sum_k w_k^c f_k(x, y): the class activation map of class c    equation (2)

so S_c is the average of M_c over the cells. Arrays are (N, H, W, ...): images, rows, columns.
"""

from quiet import keras  # first, to keep TensorFlow's start-up log off the console

# isort: split
import matplotlib
import numpy as np
from keras import layers, ops
from skimage import measure

POOLINGS = {"average": ("GlobalAveragePooling2D", ops.mean), "max": ("GlobalMaxPooling2D", ops.max)}


def class_activation_map(feature_maps, softmax_weights, classes=None):
    """Equation (2): M_c(x, y) = sum_k w_k^c f_k(x, y). No bias, no ReLU: M_c may be negative.

    Args:
        feature_maps: f_k, (N, H, W, K).
        softmax_weights: w_k^c, (K, C).
        classes: One class per image, N integers in 0..C-1; None for all classes.

    Returns:
        (N, H, W, C), or (N, H, W) when `classes` are given.

    Raises:
        ValueError: A class is not in 0..C-1, or their number is not N.
    """
    if classes is None:
        return ops.matmul(feature_maps, softmax_weights)  # (N, H, W, K) @ (K, C) -> (N, H, W, C)
    classes, count = np.asarray(classes), softmax_weights.shape[1]
    if classes.shape != (feature_maps.shape[0],) or classes.min() < 0 or classes.max() >= count:
        raise ValueError(f"classes must be {feature_maps.shape[0]} integers in 0..{count - 1}, not {classes}")
    weights = ops.take(softmax_weights, classes, axis=1)  # (K, N)
    return ops.einsum("nhwk,kn->nhw", feature_maps, weights)


def class_activation_model(model, pooling="average"):
    """Turns a classifier into a model that gives logits and class activation maps in one forward pass.

    Args:
        model: Keras model of the form convolutions -> GlobalAveragePooling2D -> (Dropout) -> Dense, the Dense layer
            with or without bias and softmax. Its layers are used, not copied: the maps follow its training.
        pooling: "max" for a model with GlobalMaxPooling2D in that place: the comparison of the paper's section 3.2.

    Returns:
        Keras model from the same images (N, h, w, channels) to [S_c (N, C), M_c (N, H, W, C)], both float32. Of a
        Dense layer with bias b_c, S_c is the average of M_c plus b_c; of max pooling there is no such identity.

    Raises:
        ValueError: The model has another form.
    """
    outputs = getattr(model, "outputs", None) or []
    tail, tensors = [], outputs  # the layers that end the model, last first, to the first not Dense and not Dropout
    while len(tensors) == 1 and (not tail or isinstance(tail[-1], (layers.Dense, layers.Dropout))):
        tail.append(tensors[0]._keras_history.operation)
        tensors = keras.tree.flatten(tail[-1].input)
    form = [type(layer).__name__ for layer in reversed(tail) if not isinstance(layer, layers.Dropout)]
    wanted, pool = POOLINGS[pooling]
    if form != [wanted, "Dense"] or tail[-1].data_format != "channels_last":
        found = " -> ".join(form) or (f"{len(outputs)} outputs" if outputs else "no layer that is known yet")
        raise ValueError(
            f"no class activation map of model {model.name!r}: it ends in {found}; "
            f"needed is convolutions -> {wanted} (channels last) -> (Dropout) -> Dense"
        )
    dense, feature_maps = tail[0], tail[-1].input
    scores_and_maps = ScoresAndMaps(dense, pool, name="scores_and_maps")(feature_maps)
    cam = keras.Model(model.input, scores_and_maps, name=f"{model.name}_cam")
    # XLA's convolutions on a CPU are several times slower than TensorFlow's own.
    cam.compile(jit_compile=False if keras.backend.backend() == "tensorflow" else "auto")
    return cam


class ScoresAndMaps(layers.Layer):
    """Feature maps f_k (N, H, W, K) -> logits S_c (N, C) and class activation maps M_c (N, H, W, C)."""

    def __init__(self, dense, pool, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        self.dense, self.pool = dense, pool

    def call(self, feature_maps):
        pooled = self.pool(feature_maps, axis=(1, 2))  # F_k: (N, K)
        scores = ops.matmul(pooled, self.dense.kernel)  # S_c: (N, C)
        if self.dense.use_bias:
            scores = scores + self.dense.bias
        return scores, class_activation_map(feature_maps, self.dense.kernel)


def upsample(maps, height, width):
    """Upsamples maps (N, H, W) or (N, H, W, C) to `height` x `width`: bilinear, half-pixel centres (section 2)."""
    if len(maps.shape) == 3:
        return upsample(maps[..., None], height, width)[..., 0]
    return ops.image.resize(maps, (height, width), interpolation="bilinear", data_format="channels_last")


def normalize(maps):
    """Scales each map of (..., H, W) to [0, 1] by its minimum and maximum; a constant map gives zeros.

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


def overlay(image, heatmap, colormap="jet", opacity=0.5, invert=True):
    """Lays a heatmap over the inverted image.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3) uint8.
        heatmap: (H, W), 0..1: a map upsampled to the image and normalized.
        colormap: Name of a matplotlib colormap.
        opacity: Share of the heatmap in the result, 0..1.
        invert: Whether to invert the image, which makes room for the colours where it is mostly black.

    Returns:
        RGB picture (H, W, 3) uint8.
    """
    colors = 255 * matplotlib.colormaps[colormap](np.linspace(0, 1, 256, dtype=np.float32))[:, :3]  # (256, 3)
    under = image.reshape(*heatmap.shape, -1).astype(np.float32)  # (H, W, 1 or 3)
    if invert:
        under = 255 - under
    blended = opacity * colors[np.rint(255 * heatmap).astype(np.uint8)] + (1 - opacity) * under  # (H, W, 3)
    return np.rint(blended).astype(np.uint8)


def bounding_box(class_map, threshold=0.2):
    """The paper's box: around the largest connected component above 20% of the map's maximum (section 3.2).

    Args:
        class_map: M_c of one image and class, (H, W), upsampled to the image for a box in its pixels.
        threshold: Share of the maximum, 0..1.

    Returns:
        (x0, y0, x1, y1), half-open, in cells of the map; None when no cell is positive. Cells that touch at a corner
        are connected; of components of equal size the first in reading order counts.

    Raises:
        ValueError: The map has a value that is not finite.
    """
    class_map = np.asarray(class_map)
    if not np.isfinite(class_map).all():
        raise ValueError("a class activation map is not finite: weights or image have infinite or NaN values")
    maximum = class_map.max()
    if maximum <= 0:
        return None
    regions = measure.regionprops(measure.label(class_map > threshold * maximum))
    y0, x0, y1, x1 = max(regions, key=lambda region: region.area).bbox
    return x0, y0, x1, y1


if __name__ == "__main__":
    from show import main  # the command line: your own images, your own network

    main()
