"""Exact class activation maps of Keras networks of any form.

A network has one if its logits are affine in its pooled feature maps: S_c = sum_k w_k^c F_k + b_c. Which layers compute
that does not matter: the layers after the pooling, the head, give M_c + b_c when they are applied to the feature maps,
at each location, instead of to their mean. `cam.class_activation_model` is the plain case.
"""

import itertools
import math

import keras
import numpy as np
from keras import layers, ops

from experiment.files import UserError
from experiment.training import JIT_COMPILE

ACTIVATIONS = {"linear": ops.copy, "sigmoid": ops.sigmoid, "softmax": ops.softmax, "log_softmax": ops.log_softmax}


def exact_cam_model(model, output=None):
    """Turns a classifier of any form into a model that gives logits and class activation maps.

    Args:
        model: Keras model, functional or Sequential, with mean pooling, or max pooling for the comparison in section
            3.2. Other models may be nested in it. Its layers are used, not copied: the maps follow its training.
        output: Name of the output, if the model has several.

    Returns:
        Keras model from the same images (N, h, w, channels) to [S_c (N, C), M_c (N, H, W, C)], float32. S_c, before the
        last activation, is the mean of M_c plus b_c; with max pooling it is not. Its layer "logits_and_maps" is a
        `LogitsAndMaps`.

    Raises:
        UserError: The model has no exact class activation map, or several outputs of which none is chosen.
    """
    try:
        structure = getattr(model, "_outputs_struct", None)  # a Sequential model has one output, without a name
        names = sorted(structure) if isinstance(structure, dict) else getattr(model, "output_names", ["output"])
        if names.count(output) != 1 and (output or len(names) > 1):
            raise ValueError(f"choose one of its outputs: {', '.join(names)}")
        images, feature_maps, operations = find_feature_maps(model, names.index(output) if output else 0)
        if not operations:
            raise ValueError("it has no feature maps (N, H, W, K) that are pooled")
        logits_and_maps = LogitsAndMaps(operations, name="logits_and_maps")
        return keras.Model(images, logits_and_maps(feature_maps), name=f"{model.name}_cam")
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model {model.name!r} has no exact class activation map: {reason}") from None


@keras.saving.register_keras_serializable("cam")
class LogitsAndMaps(layers.Layer):
    """Feature maps f_k (N, H, W, K) -> logits S_c (N, C) and class activation maps M_c (N, H, W, C).

    `operations` are models of one operation each, from a classifier's pooling to its output. They can be of any
    kind, so random numbers tell what they compute: the pooling, the head, and the last `activation`, which is not
    applied.
    """

    def __init__(self, operations, dtype="float32", **kwargs):
        super().__init__(dtype=dtype, **kwargs)
        self.supports_jit = bool(JIT_COMPILE)
        if isinstance(operations[0], dict):  # from get_config
            operations = keras.saving.deserialize_keras_object(operations)
        kinds = {tensor.dtype for operation in operations for tensor in operation.inputs + operation.outputs}
        kinds |= {getattr(operation.operations[-1], "dtype_policy", self.dtype_policy).name for operation in operations}
        tolerance = 0.001 if kinds == {"float32"} else 0.03  # of the largest value: more if numbers are rounded
        check_pooling(operations[0], tolerance)
        self.operations = operations
        self.head, self.activation = split_off_activation(operations, tolerance)
        check_affine(self.head, tolerance)

    def call(self, feature_maps):
        pooling = self.operations[0]
        logits = run(self.head, pooling([feature_maps]))  # F_k (N, K) -> S_c (N, C)
        locations = ops.reshape(feature_maps, (-1, *pooling.output_shape[1:]))  # (N H W, K)
        maps = run(self.head, locations) - self.biases()  # M_c (N H W, C)
        return logits, ops.reshape(maps, (*ops.shape(feature_maps)[:3], maps.shape[1]))

    def biases(self):
        """b_c (1, C): S_c if all F_k are zero."""
        return run(self.head, ops.zeros((1, *self.operations[0].output_shape[1:])))

    def compute_output_spec(self, feature_maps):  # Keras would call it with a sparse tensor after x * 2, and fail
        classes = math.prod(self.operations[-1].output_shape[1:])
        shapes = [(*feature_maps.shape[:axis], classes) for axis in (1, 3)]  # (N, C), (N, H, W, C)
        return [keras.KerasTensor(shape, "float32") for shape in shapes]

    def get_config(self):
        return super().get_config() | {"operations": keras.saving.serialize_keras_object(self.operations)}


def run(operations, x):
    """Applies operations to x; returns (N, C) float32."""
    for operation in operations:
        x = operation([x], training=False)
    return ops.cast(ops.reshape(x, (-1, math.prod(x.shape[1:]))), "float32")


def find_feature_maps(model, index=0):
    """Images, last feature maps (N, H, W, K), and the operations from there to an output, see `find_pooling`.

    Raises:
        ValueError: There are none, or they do not cover the whole image.
    """
    if not known_outputs(model):
        raise ValueError("its layers are not known; it must be functional or Sequential, and built")
    feature_maps, operations = find_pooling(model.outputs[index])
    if feature_maps is None:
        raise ValueError("it has no feature maps (N, H, W, K)")
    check_whole_image(model)
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input, feature_maps, operations


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
        if isinstance(operation, layers.GlobalAveragePooling2D) and inputs[0].shape[1:3] == (1, 1):
            raise ValueError("its feature maps are 1 x 1, so there is nothing to map; give larger images")
        if len(inputs) > 1:
            raise ValueError(f"layer {operation.name!r}, after the pooling, has {len(inputs)} inputs")
        operations = (inner if nested else [keras.Model(inputs, tensor, name=operation.name)]) + operations
        tensor = inputs[0]
    return tensor, operations


def check_whole_image(model):
    """Raises a ValueError if a layer crops or pads the images, so that a map would not cover the whole image."""
    for layer in model._flatten_layers(include_self=False):
        crops = isinstance(layer, layers.CenterCrop | layers.RandomCrop)
        if isinstance(layer, layers.Resizing):
            crops = layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio
        if isinstance(layer, layers.Cropping2D):  # of images, not of feature maps as in NASNet
            crops = layer._inbound_nodes[0].input_tensors[0].shape[-1] in (1, 3)
        if crops:
            raise ValueError(f"layer {layer.name!r} crops or pads the image, so a map would not fit the image")


def check_pooling(pooling, tolerance):
    """Raises a ValueError if an operation is neither the mean nor the maximum over the locations."""
    shape = [8, *(size or 5 for size in pooling.input_shape[1:])]
    x = np.random.default_rng(0).normal(1, 2, shape).astype(np.float32)
    if not any(is_close(pooling([x]), pool(x, axis=(1, 2)), tolerance) for pool in (ops.mean, ops.max)):
        raise ValueError(f"layer {pooling.name!r} takes neither mean nor maximum of feature maps (N, H, W, K)")


def split_off_activation(operations, tolerance):
    """The operations from F_k to S_c, and the name of the last activation, which is an operation or a part of one."""
    pooling, *operations = operations
    x = np.random.default_rng(0).normal(size=[8, *pooling.output_shape[1:]])
    x = (x.T * np.geomspace(0.01, 1, 8)).T.astype(np.float32)
    output = run(operations, x)
    for index in range(len(operations) - 1, -1, -1):
        operation, head = operations[index], operations[:index]
        if operation.weights:
            fused = callable(getattr(operation.operations[-1], "activation", None))
            head = [*head, without_activation(operation) if fused else operation]
        logits = run(head, x)
        for name, function in ACTIVATIONS.items():
            if is_close(output, function(logits), tolerance) and (name != "linear" or operation.weights):
                return head, name
        if operation.weights:
            break
    return operations, "linear"


def check_affine(head, tolerance):
    """Raises a ValueError if an operation is not affine: f(x) + f(y) = f(x + y) + f(0)."""
    for operation, scale in itertools.product(head, (0.1, 1, 10, 100)):
        x, y = scale * np.random.default_rng(0).normal(size=(2, 8, *operation.input_shape[1:])).astype(np.float32)
        fx, fy, fxy, f0 = ops.split(run([operation], np.concatenate([x, y, x + y, 0 * x])), 4)
        if not is_close(fx + fy - f0, fxy, tolerance):
            raise ValueError(f"layer {operation.name!r}, between pooling and logits, is not affine")


def without_activation(operation):
    """The same model of one layer, with the same weights, but with no activation."""
    layer = operation.operations[-1]
    linear = object.__new__(type(layer))  # a copy that shares the weights
    vars(linear).update(vars(layer), activation=keras.activations.linear, _inbound_nodes=[], _outbound_nodes=[])
    return keras.Model(operation.inputs, linear(*operation.inputs), name=operation.name)


def is_close(found, expected, tolerance):
    found, expected = (ops.convert_to_numpy(ops.cast(ops.reshape(x, -1), "float32")) for x in (found, expected))
    return found.shape == expected.shape and np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
