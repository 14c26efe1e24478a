"""Class activation maps: the method of "Learning Deep Features for Discriminative Localization", Zhou et al. 2016.

    f_k(x, y)   activation of unit k of the last convolutional layer at location (x, y): the feature maps
    w_k^c       softmax weight of class c for unit k
    F_k         mean of f_k over the locations: global average pooling
    S_c         sum_k w_k^c F_k: the logit of class c                         equation (1)
    M_c(x, y)   sum_k w_k^c f_k(x, y): the class activation map of class c    equation (2)

so S_c is the mean of M_c over the locations. Arrays are (N, H, W, ...): images, rows, columns. The paper has no
counterpart to `LogitsAndMaps` and its helpers, which find f_k, w_k^c and b_c in any Keras model.
"""

import itertools
import math

import keras
import matplotlib
import numpy as np
from keras import layers, ops
from skimage import measure

# XLA's convolutions on a CPU are several times slower than TensorFlow's own.
JIT_COMPILE = False if keras.backend.backend() == "tensorflow" else "auto"
ACTIVATIONS = {"linear": ops.copy, "sigmoid": ops.sigmoid, "softmax": ops.softmax, "log_softmax": ops.log_softmax}
PROBE = 256  # an F_k that makes w_k^c F_k large against rounding errors of b_c


def class_activation_map(feature_maps, softmax_weights):
    """Equation (2): M_c(x, y) = sum_k w_k^c f_k(x, y). No bias, no ReLU: M_c may be negative.

    Args:
        feature_maps: f_k, (N, H, W, K).
        softmax_weights: w_k^c, (K, C).

    Returns:
        M_c, (N, H, W, C).
    """
    return ops.matmul(feature_maps, softmax_weights)  # (N, H, W, K) @ (K, C) -> (N, H, W, C)


def class_activation_model(model, output=None):
    """Turns a classifier into a model that gives logits and class activation maps in one forward pass.

    The logits must be affine in the pooled feature maps: S_c = sum_k w_k^c F_k + b_c. The layers after the pooling, the
    head, are asked for w_k^c and b_c, so it does not matter which layers they are.

    Args:
        model: Keras model, functional or Sequential, with mean pooling, or max pooling for the comparison in section
            3.2. Other models may be nested in it. Its layers are used, not copied: the maps follow its training.
        output: Name of the output, if the model has several.

    Returns:
        Keras model from the same images (N, h, w, channels) to [S_c (N, C), M_c (N, H, W, C)], float32. S_c, before the
        last activation, is the mean of M_c plus b_c; with max pooling it is not.

    Raises:
        ValueError: The model has no exact class activation map, or several outputs of which none is chosen.
    """
    try:
        if not known_outputs(model):
            raise ValueError("its layers are not known; it must be functional or Sequential, and built")
        structure = getattr(model, "_outputs_struct", None)  # a Sequential model has one output, without a name
        names = sorted(structure) if isinstance(structure, dict) else getattr(model, "output_names", ["output"])
        if names.count(output) != 1 and (output or len(names) > 1):
            raise ValueError(f"choose one of its outputs: {', '.join(names)}")
        feature_maps, operations = find_pooling(model.outputs[names.index(output) if output else 0])
        if feature_maps is None or not operations:
            raise ValueError("it has no feature maps (N, H, W, K) that are pooled")
        logits_and_maps = LogitsAndMaps(operations, name="logits_and_maps")
        logits_and_maps.check()
        images = model.inputs if isinstance(model, keras.Sequential) else model.input
        return keras.Model(images, logits_and_maps(feature_maps), name=f"{model.name}_cam")
    except ValueError as error:
        raise ValueError(f"model {model.name!r} has no exact class activation map: {error}") from None


def known_outputs(model):
    """Outputs of a model whose layers are all there is: functional or Sequential, with no `call` of its own."""
    return getattr(model, "outputs", None) if type(model).call.__module__.startswith("keras.") else None


def find_pooling(tensor):
    """Goes back from `tensor` to the last feature maps; returns them, and a model of each operation in between."""
    operations = []
    while not (len(tensor.shape) == 4 and tensor.shape[1:3] != (1, 1)):
        operation, node, index = tensor._keras_history
        inputs = operation._inbound_nodes[node].input_tensors
        if not inputs:
            return None, operations
        nested = known_outputs(operation)  # of a model in the model
        if nested:
            feature_maps, inner = find_pooling(nested[index])
            if feature_maps is not None:
                return keras.Model(operation.inputs, feature_maps)(inputs), inner + operations
        if len(inputs) > 1:
            raise ValueError(f"layer {operation.name!r}, after the pooling, has {len(inputs)} inputs")
        operations = (inner if nested else [keras.Model(inputs[0], tensor, name=operation.name)]) + operations
        tensor = inputs[0]
    return tensor, operations


def is_close(found, expected, tolerance):
    found, expected = (ops.convert_to_numpy(ops.cast(ops.reshape(x, -1), "float32")) for x in (found, expected))
    return found.shape == expected.shape and np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@keras.saving.register_keras_serializable("cam")
class LogitsAndMaps(layers.Layer):
    """Feature maps f_k (N, H, W, K) -> logits S_c (N, C) and class activation maps M_c (N, H, W, C).

    `operations` are models of one operation each, from a classifier's pooling to its output; `activation` names the
    last activation, which is not applied.
    """

    def __init__(self, operations, dtype="float32", **kwargs):
        super().__init__(dtype=dtype, **kwargs)
        self.supports_jit = bool(JIT_COMPILE)
        if isinstance(operations[0], dict):  # from get_config
            operations = keras.saving.deserialize_keras_object(operations)
        self.operations, self.head, self.activation, self.fused = operations, operations[1:], "linear", None
        kinds = {tensor.dtype for operation in operations for tensor in operation.inputs + operation.outputs}
        kinds |= {getattr(operation.operations[-1], "dtype_policy", self.dtype_policy).name for operation in operations}
        self.tolerance = 0.001 if kinds == {"float32"} else 0.03  # of the largest value: more if numbers are rounded

        pooling, rng = operations[0], np.random.default_rng(0)
        x = rng.normal(1, 2, [8, *(size or 5 for size in pooling.input_shape[1:])]).astype(np.float32)
        if not any(is_close(pooling(x), pool(x, axis=(1, 2)), self.tolerance) for pool in (ops.mean, ops.max)):
            raise ValueError(f"layer {pooling.name!r} takes neither mean nor maximum of feature maps (N, H, W, K)")
        x = (rng.normal(size=[8, *pooling.output_shape[1:]]).T * np.geomspace(0.01, 1, 8)).T.astype(np.float32)
        output = self.run(self.head, x)
        for index in range(len(operations) - 1, 0, -1):  # the last activation: an operation, or a part of a layer
            operation, layer = operations[index], operations[index].operations[-1]
            self.head = operations[1 : index + bool(operation.weights)]
            self.fused = layer if operation.weights and callable(getattr(layer, "activation", None)) else None
            logits = self.run(self.head, x)
            name = next((n for n, f in ACTIVATIONS.items() if is_close(output, f(logits), self.tolerance)), None)
            if name is None:
                self.head, self.fused = operations[1:], None
            self.activation = name or "linear"
            if operation.weights or name != "linear":
                break

    def call(self, feature_maps):
        pooled = self.operations[0](feature_maps)  # F_k: (N, K)
        logits = self.run(self.head, pooled)  # S_c, equation (1): (N, C)
        softmax_weights, _ = self.softmax_weights_and_biases()
        return logits, class_activation_map(feature_maps, softmax_weights)

    def softmax_weights_and_biases(self):
        """w_k^c (K, C) and b_c (C,): S_c is b_c if all F_k are zero, and F_k w_k^c + b_c if only F_k is not."""
        shape = self.operations[0].output_shape[1:]  # (K,) or (1, 1, K)
        pooled = PROBE * ops.eye(shape[-1] + 1, shape[-1])  # each F_k alone, and zeros
        logits = self.run(self.head, ops.reshape(pooled, (-1, *shape)))
        return (logits[:-1] - logits[-1]) / PROBE, logits[-1]

    def run(self, operations, x):
        """Applies operations of the head to x, without the last activation; returns (N, C)."""
        activation = getattr(self.fused, "activation", None)
        try:
            if self.fused:
                self.fused.activation = keras.activations.linear
            for operation in operations:
                x = operation(x, training=False)
        finally:
            if self.fused:
                self.fused.activation = activation
        return ops.cast(ops.reshape(x, (-1, math.prod(x.shape[1:]))), "float32")

    def check(self):
        """Raises a ValueError if an operation of the head is not affine: f(x) + f(y) = f(x + y) + f(0)."""
        for operation, scale in itertools.product(self.head, (0.1, 1, 10, 100)):
            x, y = scale * np.random.default_rng(0).normal(size=(2, 8, *operation.input_shape[1:])).astype(np.float32)
            fx, fy, fxy, f0 = (self.run([operation], z) for z in (x, y, x + y, 0 * x))
            if not is_close(fx + fy - f0, fxy, self.tolerance):
                raise ValueError(f"layer {operation.name!r}, between pooling and logits, is not affine")

    def get_config(self):
        return super().get_config() | {"operations": keras.saving.serialize_keras_object(self.operations)}


def zero_mean_over_classes(softmax_weights):
    """Subtracts from w_k^c (K, C) its mean over the classes, for each unit k. A Keras constraint for training.

    Softmax, and so prediction and loss, does not change when the same map is added to the maps of all classes. Gradient
    descent leaves that common part as it is; Adam, whose steps do not sum to zero over the classes, makes it drift.
    With it removed, M_c shows the evidence for class c relative to the other classes.
    """
    return softmax_weights - ops.mean(softmax_weights, axis=1, keepdims=True)


def upsample(maps, height, width):
    """Upsamples maps (N, H, W) or (N, H, W, C) to `height` x `width`: bilinear, half-pixel centres (section 2)."""
    if len(maps.shape) == 3:
        return upsample(maps[..., None], height, width)[..., 0]
    return ops.convert_to_numpy(ops.image.resize(maps, (height, width), "bilinear", data_format="channels_last"))


def normalize(maps):
    """Scales each map of (..., H, W) to [0, 1], float32, by its minimum and maximum; a constant map becomes zeros.

    Raises:
        ValueError: A map has a value that is not finite.
    """
    maps = np.asarray(maps, np.float64)  # in which the difference of two float32 cannot overflow
    if not np.isfinite(maps).all():
        raise ValueError("a class activation map is not finite: weights or image have infinite or NaN values")
    low, high = maps.min(axis=(-2, -1), keepdims=True), maps.max(axis=(-2, -1), keepdims=True)
    return ((maps - low) / np.where(high > low, high - low, 1)).astype(np.float32)


def overlay(image, heatmap, colormap="jet", opacity=0.5, invert=None):
    """Overlays a heatmap on an image; returns RGB (H, W, 3) uint8.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3) uint8.
        heatmap: (H, W), 0..1: a map upsampled to the size of the image, and normalized.
        colormap: Name of a matplotlib colormap.
        opacity: Opacity of the heatmap, 0..1.
        invert: Whether to invert the image first; by default a grey one is, so that black does not darken the colours.
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
    if not labels.any():
        return None
    component = labels == np.bincount(labels[labels > 0]).argmax()
    columns, rows = np.flatnonzero(component.any(axis=0)), np.flatnonzero(component.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
