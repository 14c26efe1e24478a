"""exact_maps.py with the forms of networks that have an exact class activation map, and some that have not."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import keras
import numpy as np
import pytest
from keras import layers, ops

from experiment.exact_maps import exact_cam_model

SIZE, UNITS, CLASSES = 16, 6, 4
FORMS, REFUSED = {}, {}  # by name: a function that builds a network; for REFUSED also what the error says


def form(build):
    FORMS[build.__name__] = build
    return build


def refused(*parts):
    def add(build):
        REFUSED[build.__name__] = build, parts
        return build

    return add


def convolutions(channels=UNITS, size=SIZE, name=None):
    """Input and feature maps, some of them negative."""
    images = keras.Input((size, size, 3), name=name)
    return images, layers.Conv2D(channels, 3, strides=2, activation="elu", bias_initializer="random_normal")(images)


def classifier(end, **arguments):
    images, feature_maps = convolutions(**arguments)
    return keras.Model(images, end(feature_maps))


def dense(activation=None, classes=CLASSES, **arguments):
    return layers.Dense(classes, activation=activation, bias_initializer="random_normal", **arguments)


def gap(**arguments):
    return layers.GlobalAveragePooling2D(**arguments)


# The end of a classifier, from its feature maps f to its output.
ENDS = {
    "functional": lambda f: dense("softmax")(gap()(f)),
    "softmax_as_an_activation_layer": lambda f: layers.Activation("softmax")(dense()(gap()(f))),
    "softmax_as_a_softmax_layer": lambda f: layers.Softmax()(dense()(gap()(f))),
    "softmax_as_an_operation": lambda f: ops.softmax(dense()(gap()(f))),
    "log_softmax": lambda f: ops.log_softmax(dense()(gap()(f))),
    "linear_activation_layer": lambda f: layers.Activation("linear")(dense("linear")(gap()(f))),
    "identity": lambda f: layers.Identity()(dense()(gap()(f))),
    "one_by_one_convolution_before_the_pooling": lambda f: layers.Softmax()(gap()(layers.Conv2D(CLASSES, 1)(f))),
    "squeezenet": lambda f: layers.Softmax()(gap()(layers.Conv2D(CLASSES, 1, activation="relu")(f))),
    "convolution_with_softmax_and_flatten": lambda f: layers.Flatten()(
        layers.Conv2D(CLASSES, 1, activation="softmax")(gap(keepdims=True)(f))
    ),
    "second_linear_dense_layer": lambda f: dense("softmax")(dense(classes=7)(gap()(f))),
    "dropout_after_the_dense_layer": lambda f: layers.Dropout(0.5)(dense()(gap()(f))),
    "scaled_logits": lambda f: layers.Softmax()(dense()(gap()(f)) / 2.5 + 1),
    "average_pooling_over_the_whole_map": lambda f: dense("softmax")(layers.Flatten()(layers.AveragePooling2D(7)(f))),
    "mean_as_an_operation": lambda f: dense("softmax")(ops.mean(f, axis=(1, 2))),
    "mean_as_an_operation_that_keeps_dimensions": lambda f: dense("softmax")(
        layers.Flatten()(ops.mean(f, axis=[-3, -2], keepdims=True))
    ),
    "one_sigmoid": lambda f: dense("sigmoid", classes=1)(gap()(f)),
    "several_sigmoids": lambda f: layers.Activation("sigmoid")(dense()(gap()(f))),
    "biases_that_are_large_against_the_weights": lambda f: layers.Dense(
        CLASSES, bias_initializer=keras.initializers.Constant(300)
    )(gap()(layers.Rescaling(1000)(f))),
    "no_bias": lambda f: dense(use_bias=False)(gap()(f)),
}
FORMS |= {name: partial(classifier, end) for name, end in ENDS.items()}
FORMS |= {
    "images_of_any_size": lambda: classifier(lambda f: dense()(gap()(f)), size=None),
    "sequential": lambda: keras.Sequential(
        [keras.Input((SIZE, SIZE, 3)), layers.Conv2D(UNITS, 3), gap(), layers.Dropout(0.5), dense("softmax")]
    ),
    "nested_in_sequential": lambda: keras.Sequential(
        [keras.Input((SIZE, SIZE, 3)), classifier(lambda f: f), gap(), dense("softmax")]
    ),
}


@form
def sequential_with_a_nested_head():
    head = keras.Sequential([layers.Dropout(0.5), dense("softmax")])
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), layers.Conv2D(UNITS, 3), gap(), head])


@form
def nested_backbone_that_pools():
    images, backbone = keras.Input((SIZE, SIZE, 3)), classifier(gap())
    return keras.Model(images, dense("softmax")(backbone(images)))


@form
def nested_backbone_pooled_outside():
    images, backbone = keras.Input((SIZE, SIZE, 3)), classifier(lambda f: f)
    return keras.Model(images, dense("softmax")(gap()(backbone(images))))


@form
def wrapped_by_augmentation_and_resizing():
    images = keras.Input((None, None, 3))
    x = layers.RandomFlip()(layers.Rescaling(1 / 2)(layers.Resizing(SIZE, SIZE)(images)))
    return keras.Model(images, FORMS["functional"]()(x))


@form
def wrapped_twice_with_layers_of_the_same_name():
    inner = classifier(lambda f: dense("softmax", name="same")(gap(name="pool")(f)))
    images = keras.Input((SIZE, SIZE, 3))
    middle = keras.Model(images, inner(layers.Conv2D(3, 1, name="same")(images)), name="same")
    images = keras.Input((SIZE, SIZE, 3), name="pool")
    return keras.Model(images, middle(layers.Conv2D(3, 1, name="same_1")(images)))


@form
def mobilenet():
    def end(f):
        x = layers.Dropout(0.1)(gap(keepdims=True)(f))
        x = layers.Reshape((CLASSES,))(layers.Conv2D(CLASSES, 1, bias_initializer="random_normal")(x))
        return layers.Activation("softmax")(x)

    return classifier(end)


@form
def flatten_dropout_noise_and_batch_normalization():
    def end(f):
        x = layers.Flatten()(gap()(f))
        x = layers.GaussianDropout(0.5)(layers.GaussianNoise(0.5)(layers.AlphaDropout(0.5)(x)))
        x = layers.BatchNormalization(moving_mean_initializer="random_normal", gamma_initializer="random_normal")(x)
        return dense("softmax")(layers.Dropout(0.5)(x))

    return classifier(end)


@form
def two_inputs():
    first, f = convolutions(name="first")
    second, g = convolutions(name="second")
    return keras.Model({"first": first, "second": second}, dense("softmax")(gap()(layers.Add()([f, g]))))


def compute(model, images):
    """The outputs of a model, without the time that `predict` takes to compile it."""
    return keras.tree.map_structure(np.asarray, model(images, training=False))


def inputs_of(model, count=3):
    rng = np.random.default_rng(0)
    arrays = {
        i.name: rng.normal(size=(count, *(n or SIZE for n in i.shape[1:]))).astype("float32") for i in model.inputs
    }
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))


FUNCTIONS = {"linear": lambda x: x, "softmax": ops.softmax, "sigmoid": ops.sigmoid, "log_softmax": ops.log_softmax}


def assert_exact(cam_model, expected, images, tolerance=1e-5):
    """Scores or probabilities are the network's own, and S_c - mean M_c is the same for all images: b_c."""
    scores, maps = compute(cam_model, images)
    activation = FUNCTIONS[cam_model.get_layer("logits_and_maps").activation]
    np.testing.assert_allclose(ops.convert_to_numpy(activation(scores)), expected, rtol=tolerance, atol=tolerance)
    biases = scores - maps.mean(axis=(1, 2))
    zeros = ops.convert_to_numpy(cam_model.get_layer("logits_and_maps").softmax_weights_and_biases()[1])
    np.testing.assert_allclose(biases, np.broadcast_to(zeros, biases.shape), atol=tolerance * np.abs(scores).max())
    assert maps.std() > 0.01


@pytest.mark.parametrize("build", FORMS.values(), ids=FORMS)
def test_exact(build, tmp_path):
    """In memory, and saved and loaded: the model, and the model of its maps."""
    keras.utils.set_random_seed(1)
    model = build()
    images = inputs_of(model)
    expected = compute(model, images)
    cam_model = exact_cam_model(model)
    assert_exact(cam_model, expected, images)
    model.save(tmp_path / "model.keras")
    cam_model.save(tmp_path / "cam.keras")
    assert_exact(exact_cam_model(keras.models.load_model(tmp_path / "model.keras")), expected, images)
    assert_exact(keras.models.load_model(tmp_path / "cam.keras"), expected, images)
    clone = keras.models.clone_model(cam_model)
    clone.set_weights(cam_model.get_weights())
    assert_exact(clone, expected, images)
    np.testing.assert_allclose(compute(model, images), expected)  # untouched


@pytest.mark.parametrize("build", [FORMS["functional"], FORMS["sequential"], nested_backbone_that_pools, mobilenet])
def test_the_maps_follow_the_training(build):
    keras.utils.set_random_seed(1)
    model = build()
    images = inputs_of(model, 8)
    cam_model = exact_cam_model(model)
    before = compute(cam_model, images)[1]
    model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(images, np.arange(8) % CLASSES, epochs=3, verbose=0)
    assert_exact(cam_model, compute(model, images), images)
    assert np.abs(compute(cam_model, images)[1] - before).max() > 0.01


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        *((name, True) for name in ("functional", "no_bias", "several_sigmoids", "mobilenet")),
        *((name, True) for name in ("convolution_with_softmax_and_flatten", "nested_backbone_that_pools")),
        *((name, True) for name in ("sequential_with_a_nested_head",)),
        *((name, False) for name in ("scaled_logits", "second_linear_dense_layer", "squeezenet")),
        *((name, False) for name in ("flatten_dropout_noise_and_batch_normalization",)),
    ],
)
def test_the_kernel_is_read_where_the_head_is_one_layer(name, is_read):
    layer = exact_cam_model(FORMS[name]()).get_layer("logits_and_maps")
    assert (layer.kernel_layer is not None) == is_read


def test_several_threads_get_right_results():
    """Of the network, whose last layer has a softmax, and of its maps."""
    keras.utils.set_random_seed(1)
    model = FORMS["functional"]()
    images = ops.convert_to_tensor(inputs_of(model))
    cam_model = exact_cam_model(model)
    expected = [np.asarray(output) for output in (model(images), *cam_model(images))]

    def call_both(_):
        return [np.asarray(output) for output in (model(images), *cam_model(images))]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(call_both, range(200)):
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mode", ["mixed_bfloat16", "mixed_float16", "int8", "int4"])
def test_rounded_heads(mode):
    keras.utils.set_random_seed(1)
    if mode.startswith("mixed"):
        keras.config.set_dtype_policy(mode)
    try:
        model = classifier(lambda f: layers.Activation("softmax", dtype="float32")(dense()(gap()(f))))
    finally:
        keras.config.set_dtype_policy("float32")
    if mode.startswith("int"):
        model.quantize(mode)
    images = inputs_of(model)
    assert_exact(exact_cam_model(model), compute(model, images), images, 0.01)


def test_max_pooling():
    keras.utils.set_random_seed(1)
    model = classifier(lambda f: dense()(layers.GlobalMaxPooling2D()(f)))
    images = inputs_of(model)
    scores, maps = compute(exact_cam_model(model), images)
    np.testing.assert_allclose(scores, compute(model, images), rtol=1e-5, atol=1e-6)
    feature_maps = compute(keras.Model(model.input, model.layers[1].output), images)
    np.testing.assert_allclose(maps, feature_maps @ np.asarray(model.layers[-1].kernel), rtol=1e-4, atol=1e-5)


def test_one_of_several_outputs():
    images, f = convolutions()
    pooled = gap()(f)
    model = keras.Model(images, {"a": dense(name="a")(pooled), "b": dense("softmax", name="b")(pooled)})
    with pytest.raises(ValueError, match="a, b"):
        exact_cam_model(model)
    images = inputs_of(model)
    assert_exact(exact_cam_model(model, "b"), compute(model, images)["b"], images)


REFUSED |= {
    "hidden_relu": (
        partial(classifier, lambda f: dense()(layers.Dense(20, activation="relu", name="hidden")(gap()(f)))),
        (
            "hidden",
            "not affine",
        ),
    ),
    "layer_normalization": (
        partial(classifier, lambda f: dense()(layers.LayerNormalization(name="norm")(gap()(f)))),
        (
            "norm",
            "not affine",
        ),
    ),
    "relu_at_the_end": (
        partial(classifier, lambda f: layers.Dense(4, activation="relu", name="last")(gap()(f))),
        (
            "last",
            "not affine",
        ),
    ),
    "concatenated_poolings": (
        partial(
            classifier, lambda f: dense()(layers.Concatenate(name="both")([gap()(f), layers.GlobalMaxPooling2D()(f)]))
        ),
        (
            "both",
            "2 inputs",
        ),
    ),
    "flatten": (
        partial(classifier, lambda f: dense()(layers.Flatten(name="flat")(f))),
        (
            "flat",
            "takes neither mean nor maximum",
        ),
    ),
    "segmentation": (partial(classifier, lambda f: layers.Conv2D(3, 1)(f)), ("it has no feature maps",)),
    "softmax_in_groups": (
        partial(classifier, lambda f: layers.Softmax(name="softmax")(layers.Reshape((2, 2))(dense()(gap()(f))))),
        (
            "softmax",
            "not affine",
        ),
    ),
    "activation_before_the_weights": (
        partial(classifier, lambda f: Gated(keras.activations.softmax)(gap()(f))),
        (
            "gated",
            "not affine",
        ),
    ),
    "activation_by_name": (
        partial(classifier, lambda f: Gated("softmax")(gap()(f))),
        (
            "gated",
            "not affine",
        ),
    ),
    "pooling_of_a_part_of_the_maps": (
        partial(
            classifier, lambda f: dense()(layers.Flatten()(layers.AveragePooling2D(100, name="part")(f))), size=227
        ),
        (
            "part",
            "takes neither mean nor maximum",
        ),
    ),
    "almost_linear": (
        partial(classifier, lambda f: dense()(layers.LeakyReLU(0.97, name="leaky")(dense()(gap()(f))))),
        (
            "leaky",
            "not affine",
        ),
    ),
    "no_pooling": (lambda: keras.Sequential([keras.Input((5,)), layers.Dense(3)]), ("it has no feature maps",)),
    "not_built": (lambda: keras.Sequential([layers.Dense(3)]), ("must be functional or Sequential",)),
}


@refused("must be functional or Sequential")
def subclassed():
    class Net(keras.Model):
        def call(self, x):
            return x

    return Net()


@refused("must be functional or Sequential")
def functional_with_a_call_of_its_own():
    class Scaled(keras.Model):
        def call(self, inputs, training=None, mask=None):
            return super().call(inputs / 2, training=training)

    images, f = convolutions()
    return Scaled(images, dense()(gap()(f)))


@refused("calibrated", "not affine")
def another_softmax():
    head = dense(classes=1000, kernel_initializer=keras.initializers.RandomNormal(stddev=3))
    return classifier(lambda f: layers.Lambda(lambda x: ops.softmax(x / 1.2), name="calibrated")(head(gap()(f))))


class Gated(layers.Layer):
    """Its activation is applied to its input."""

    def __init__(self, activation=None):
        super().__init__(name="gated")
        self.activation = activation

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], CLASSES))

    def call(self, inputs):
        return ops.matmul(keras.activations.get(self.activation)(inputs), self.w)


@refused("choose one of its outputs: inner, inner")
def outputs_of_the_same_name():
    images, f = convolutions()
    inner = keras.Model(images, [dense()(gap()(f)), dense()(gap()(f))], name="inner")
    images = keras.Input((SIZE, SIZE, 3))
    return keras.Model(images, inner(images))


def test_a_layer_of_its_own_without_activation():
    model = classifier(lambda f: Gated()(gap()(f)))
    images = inputs_of(model)
    assert_exact(exact_cam_model(model), compute(model, images), images)


def test_outputs_have_the_names_of_their_dict():
    images, f = convolutions()
    pooled = gap()(f)
    model = keras.Model(images, {"zeta": dense(name="a")(pooled), "alpha": dense("softmax", name="b")(pooled)})
    images = inputs_of(model)
    expected = compute(model, images)
    for name in ("zeta", "alpha"):
        assert_exact(exact_cam_model(model, name), expected[name], images)


@pytest.mark.parametrize(("build", "parts"), REFUSED.values(), ids=REFUSED)
def test_no_exact_map(build, parts):
    with pytest.raises(ValueError, match="has no exact class activation map: ") as error:
        exact_cam_model(build())
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
