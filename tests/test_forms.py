"""exact_maps.py with the forms of networks that have an exact class activation map, and some that have not."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import keras
import numpy as np
import pytest
from keras import layers, ops

from experiment.exact_maps import ACTIVATIONS, exact_cam_model
from experiment.files import UserError
from experiment.predict import Network

SIZE, UNITS, CLASSES = 16, 6, 4
gap = layers.GlobalAveragePooling2D


def convolutions(channels=UNITS, size=SIZE, name=None):
    """Input and feature maps, some of them negative."""
    images = keras.Input((size, size, 3), name=name)
    return images, layers.Conv2D(channels, 3, strides=2, activation="elu", bias_initializer="random_normal")(images)


def apply(parts, x):
    for part in parts:
        x = part(x)
    return x


def classifier(end=list, **arguments):
    """A network of these feature maps and the layers that a function gives."""
    images, feature_maps = convolutions(**arguments)
    return keras.Model(images, apply(end(), feature_maps))


def sequential(*parts):
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), *parts])


def dense(activation=None, classes=CLASSES, **arguments):
    return layers.Dense(classes, activation=activation, **{"bias_initializer": "random_normal"} | arguments)


def conv(**arguments):
    return layers.Conv2D(CLASSES, 1, bias_initializer="random_normal", **arguments)


def nested_backbone(end, *parts):
    images = keras.Input((SIZE, SIZE, 3))
    return keras.Model(images, apply([classifier(end), *parts], images))


def wrapped_by_augmentation():
    images = keras.Input((None, None, 3))
    x = layers.RandomFlip()(layers.Rescaling(1 / 2)(layers.Resizing(SIZE, SIZE)(images)))
    return keras.Model(images, FORMS["functional"]()(x))


def wrapped_twice():
    """With layers of the same name."""
    inner = classifier(lambda: [gap(name="pool"), dense("softmax", name="same")])
    images = keras.Input((SIZE, SIZE, 3))
    middle = keras.Model(images, inner(layers.Conv2D(3, 1, name="same")(images)), name="same")
    images = keras.Input((SIZE, SIZE, 3), name="pool")
    return keras.Model(images, middle(layers.Conv2D(3, 1, name="same_1")(images)))


def two_inputs():
    first, f = convolutions(name="first")
    second, g = convolutions(name="second")
    return keras.Model({"first": first, "second": second}, dense("softmax")(gap()(layers.Add()([f, g]))))


# What comes after the feature maps.
ENDS = {
    "functional": lambda: [gap(), dense("softmax")],
    "softmax_as_an_activation_layer": lambda: [gap(), dense(), layers.Activation("softmax")],
    "softmax_as_an_operation": lambda: [gap(), dense(), ops.softmax],
    "log_softmax": lambda: [gap(), dense(), ops.log_softmax],
    "after_a_multiplication": lambda: [lambda f: f * 2.0, gap(), dense("softmax")],  # sparse, says Keras 3.15
    "linear_activation_layer": lambda: [gap(), dense("linear"), layers.Activation("linear")],
    "mobilenet": lambda: [
        gap(keepdims=True),
        layers.Dropout(0.1),
        conv(),
        layers.Reshape((CLASSES,)),
        layers.Activation("softmax"),
    ],
    "convolution_with_softmax_and_flatten": lambda: [gap(keepdims=True), conv(activation="softmax"), layers.Flatten()],
    "dropout_after_the_dense_layer": lambda: [gap(), dense(), layers.Dropout(0.5)],
    "average_pooling_over_the_whole_map": lambda: [layers.AveragePooling2D(7), layers.Flatten(), dense("softmax")],
    "mean_as_an_operation": lambda: [partial(ops.mean, axis=[-3, -2]), dense("softmax")],
    "one_sigmoid": lambda: [gap(), dense("sigmoid", classes=1)],
    "several_sigmoids": lambda: [gap(), dense(), layers.Activation("sigmoid")],
    "large_biases": lambda: [layers.Rescaling(1000), gap(), dense(bias_initializer=keras.initializers.Constant(300))],
    "no_bias": lambda: [gap(), dense(use_bias=False)],
    "one_by_one_convolution_before_the_pooling": lambda: [conv(), gap(), layers.Softmax()],
    "squeezenet": lambda: [conv(activation="relu"), gap(), layers.Softmax()],
    "noise_and_batch_normalization": lambda: [
        gap(),
        layers.Flatten(),
        layers.AlphaDropout(0.5),
        layers.BatchNormalization(moving_mean_initializer="random_normal", gamma_initializer="random_normal"),
        layers.Dropout(0.5),
        dense("softmax"),
    ],
    "second_linear_dense_layer": lambda: [gap(), dense(classes=7), dense("softmax")],
    "scaled_logits": lambda: [gap(), dense(), lambda x: x / 2.5 + 1, layers.Softmax()],
    "layer_of_its_own": lambda: [gap(), Gated()],
}
FORMS = {name: partial(classifier, end) for name, end in ENDS.items()}
FORMS |= {
    "images_of_any_size": partial(classifier, lambda: [gap(), dense()], size=None),
    "sequential": lambda: sequential(layers.Conv2D(UNITS, 3), gap(), layers.Dropout(0.5), dense("softmax")),
    "sequential_with_a_nested_head": lambda: sequential(
        layers.Conv2D(UNITS, 3), gap(), keras.Sequential([layers.Dropout(0.5), dense("softmax")])
    ),
    "nested_in_sequential": lambda: sequential(classifier(), gap(), dense("softmax")),
    "nested_backbone_that_pools": lambda: nested_backbone(lambda: [gap()], dense("softmax")),
    "nested_backbone_pooled_outside": lambda: nested_backbone(list, gap(), dense("softmax")),
    "wrapped_by_augmentation_and_resizing": wrapped_by_augmentation,
    "wrapped_twice_with_layers_of_the_same_name": wrapped_twice,
    "two_inputs": two_inputs,
}


@keras.saving.register_keras_serializable("test_forms")
class Gated(layers.Layer):
    """Its activation is applied to its input."""

    def __init__(self, activation=None, name="culprit", **arguments):
        super().__init__(name=name, **arguments)
        self.activation = activation

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], CLASSES))

    def call(self, inputs):
        return ops.matmul(keras.activations.get(self.activation)(inputs), self.w)


def inputs_of(model, count=3):
    rng = np.random.default_rng(0)
    shapes = {tensor.name: (count, *(n or SIZE for n in tensor.shape[1:])) for tensor in model.inputs}
    arrays = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))


def call(model, images):
    """The outputs of a model, as arrays; `predict` would trace it first, which takes longer."""
    return keras.tree.map_structure(ops.convert_to_numpy, model(images, training=False))


def assert_exact(cam_model, expected, images, tolerance=1e-5, call=call):
    """Scores or probabilities are the network's own, and S_c - mean M_c is the same for all images: b_c."""
    scores, maps = call(cam_model, images)
    activation = ACTIVATIONS[cam_model.get_layer("logits_and_maps").activation]
    np.testing.assert_allclose(ops.convert_to_numpy(activation(scores)), expected, rtol=tolerance, atol=tolerance)
    biases = scores - maps.mean(axis=(1, 2))
    zeros = ops.convert_to_numpy(cam_model.get_layer("logits_and_maps").biases())
    np.testing.assert_allclose(biases, np.broadcast_to(zeros, biases.shape), atol=tolerance * np.abs(scores).max())
    assert maps.std() > 0.01


@pytest.mark.parametrize("name", FORMS)
def test_exact(name):
    keras.utils.set_random_seed(1)
    model = FORMS[name]()
    images = inputs_of(model)
    expected = call(model, images)
    cam_model = exact_cam_model(model)
    assert_exact(cam_model, expected, images)
    np.testing.assert_allclose(call(model, images), expected)  # untouched


FEW = ("functional", "noise_and_batch_normalization", "nested_backbone_that_pools")


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in FORMS]
)
def test_saved_and_loaded(name, tmp_path):
    """The model, and the model of its maps; and a copy of that."""
    keras.utils.set_random_seed(1)
    model = FORMS[name]()
    images, cam_model = inputs_of(model), exact_cam_model(model)
    expected = call(model, images)
    model.save(tmp_path / "model.keras")
    cam_model.save(tmp_path / "cam.keras")
    loaded = exact_cam_model(keras.models.load_model(tmp_path / "model.keras"))
    assert_exact(loaded, expected, images, call=keras.Model.predict_on_batch)  # in a graph, as `Network` does
    assert_exact(keras.models.load_model(tmp_path / "cam.keras"), expected, images)
    clone = keras.models.clone_model(cam_model)
    clone.set_weights(cam_model.get_weights())
    assert_exact(clone, expected, images)


@pytest.mark.parametrize("name", [*FEW, "sequential", "mobilenet", "second_linear_dense_layer"])
def test_the_maps_follow_the_training(name):
    keras.utils.set_random_seed(1)
    model = FORMS[name]()
    images = inputs_of(model, 8)
    cam_model = exact_cam_model(model)
    before = call(cam_model, images)[1]
    model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy", run_eagerly=True)
    for _ in range(3):
        model.train_on_batch(images, np.arange(8) % CLASSES)
    assert_exact(cam_model, call(model, images), images)
    assert np.abs(call(cam_model, images)[1] - before).max() > 0.01


def test_several_threads_get_right_results():
    """Of the network, whose last layer has a softmax, and of its maps."""
    keras.utils.set_random_seed(1)
    model = FORMS["functional"]()
    images = ops.convert_to_tensor(inputs_of(model))
    cam_model = exact_cam_model(model)

    def compute(_):
        return [call(model, images), *call(cam_model, images)]

    expected = compute(0)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(compute, range(50)):
            np.testing.assert_equal(found, expected)


@pytest.mark.parametrize("mode", ["mixed_bfloat16", "mixed_float16", "int8", "int4"])
def test_rounded_heads(mode):
    keras.utils.set_random_seed(1)
    if mode.startswith("mixed"):
        keras.config.set_dtype_policy(mode)
    try:
        model = classifier(lambda: [gap(), dense(), layers.Activation("softmax", dtype="float32")])
    finally:
        keras.config.set_dtype_policy("float32")
    if mode.startswith("int"):
        model.quantize(mode)
    images = inputs_of(model)
    assert_exact(exact_cam_model(model), call(model, images), images, 0.01)


def test_max_pooling():
    keras.utils.set_random_seed(1)
    model = classifier(lambda: [layers.GlobalMaxPooling2D(), dense()])
    images = inputs_of(model)
    scores, maps = call(exact_cam_model(model), images)
    np.testing.assert_allclose(scores, call(model, images), rtol=1e-5, atol=1e-6)
    feature_maps = call(keras.Model(model.input, model.layers[1].output), images)
    np.testing.assert_allclose(maps, feature_maps @ np.asarray(model.layers[-1].kernel), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [None, ["zeta", "alpha"]], ids=["list", "dict"])
def test_one_of_several_outputs(names):
    """In a list they have the names of their layers, in a dict those that it gives."""
    images, f = convolutions()
    pooled = gap()(f)
    outputs = [dense("softmax", name="b")(pooled), dense(name="a", classes=3)(pooled)]
    model = keras.Model(images, dict(zip(names, outputs, strict=True)) if names else outputs)
    with pytest.raises(UserError, match=f"choose one of its outputs: {'alpha, zeta' if names else 'b, a'}"):
        Network(model)
    images = inputs_of(model)
    for name, output in zip(names or ["b", "a"], outputs, strict=True):
        assert_exact(Network(model, output=name).cam_model, call(keras.Model(model.input, output), images), images)


def functional_with_a_call_of_its_own():
    class Scaled(keras.Model):
        def call(self, inputs, training=None, mask=None):
            return super().call(inputs / 2, training=training)

    images, f = convolutions()
    return Scaled(images, dense()(gap()(f)))


def two_poolings(f):
    return layers.Concatenate(name="culprit")([gap()(f), layers.GlobalMaxPooling2D()(f)])


def outputs_of_the_same_name():
    images, f = convolutions()
    inner = keras.Model(images, [dense()(gap()(f)), dense()(gap()(f))], name="inner")
    images = keras.Input((SIZE, SIZE, 3))
    return keras.Model(images, inner(images))


# Networks without exact maps: what the error says, and what comes after the feature maps; "culprit" is the reason.
REFUSED_ENDS = {
    "layer 'culprit', between pooling and logits, is not affine": {
        "hidden_relu": lambda: [gap(), layers.Dense(20, activation="relu", name="culprit"), dense()],
        "layer_normalization": lambda: [gap(), layers.LayerNormalization(name="culprit"), dense()],
        "relu_at_the_end": lambda: [gap(), layers.Dense(4, activation="relu", name="culprit")],
        "softmax_in_groups": lambda: [gap(), dense(), layers.Reshape((2, 2)), layers.Softmax(name="culprit")],
        "another_softmax": lambda: [
            gap(),
            dense(classes=1000, kernel_initializer=keras.initializers.RandomNormal(stddev=3)),
            layers.Lambda(lambda x: ops.softmax(x / 1.2), name="culprit"),
        ],
        "activation_before_the_weights": lambda: [gap(), Gated(keras.activations.softmax)],
        "activation_by_name": lambda: [gap(), Gated("softmax")],
        "almost_linear": lambda: [gap(), dense(), layers.LeakyReLU(0.97, name="culprit"), dense()],
    },
    "layer 'culprit' takes neither mean nor maximum": {
        "flatten": lambda: [layers.Flatten(name="culprit"), dense()],
        "pooling_of_a_part": lambda: [layers.AveragePooling2D(100, name="culprit"), layers.Flatten(), dense()],
    },
    "layer 'culprit', after the pooling, has 2 inputs": {"two_poolings": lambda: [two_poolings, dense()]},
    "it has no feature maps": {"segmentation": lambda: [conv()]},
}
REFUSED = [
    pytest.param(partial(classifier, end, size=227), text, id=name)
    for text, ends in REFUSED_ENDS.items()
    for name, end in ends.items()
]
NOT_KNOWN = "must be functional or Sequential, and built"


@pytest.mark.parametrize(
    ("build", "text"),
    [
        *REFUSED,
        (lambda: keras.Sequential([keras.Input((5,)), layers.Dense(3)]), "it has no feature maps"),
        (lambda: keras.Sequential([layers.Dense(3)]), NOT_KNOWN),
        (type("Net", (keras.Model,), {"call": lambda self, x: x}), NOT_KNOWN),
        (functional_with_a_call_of_its_own, NOT_KNOWN),
        (outputs_of_the_same_name, "choose one of its outputs: inner, inner"),
    ],
)
def test_no_exact_map(build, text):
    with pytest.raises(UserError, match=f"has no exact class activation map: .*{text}") as error:
        exact_cam_model(build())
    assert "\n" not in str(error.value)
