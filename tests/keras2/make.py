"""Makes the networks in this folder: python tests/keras2/make.py, with TensorFlow 2.15."""

from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.keras import Input, Model, Sequential, layers

FOLDER = Path(__file__).parent


def transfer():
    """As in the tutorial on transfer learning: augmentation, preprocessing, and a network in the network."""
    inputs = Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.SeparableConv2D(4, 3, padding="same")(inputs))
    x = layers.LeakyReLU(0.1)(layers.Add()([x, layers.DepthwiseConv2D(3, padding="same")(x)]))
    base = Model(inputs, layers.Conv2DTranspose(4, 2, activation="relu", name="block/conv")(x))
    images = Input((8, 8, 3))
    x = Sequential([layers.RandomFlip(), layers.RandomRotation(0.1)])(images)
    x = base(tf.keras.applications.mobilenet_v2.preprocess_input(x), training=False)
    x = layers.SpatialDropout2D(0.2)(x) * 2 + 1
    return Model(images, layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(x)))


def sequential():
    convolution = layers.Conv2D(4, 3, input_shape=(8, 8, 3), kernel_regularizer="l2", bias_constraint="non_neg")
    return Sequential([convolution, layers.PReLU(shared_axes=[1, 2]), layers.GlobalMaxPooling2D(), layers.Dense(3)])


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    for make in transfer, sequential:
        model = make()
        model.set_weights([rng.uniform(0.1, 1, weights.shape) for weights in model.get_weights()])
        images = rng.uniform(0, 255, (2, *model.input_shape[1:])).astype(np.float32)
        np.savez_compressed(FOLDER / f"{make.__name__}.npz", images=images, output=model(images, training=False))
        for suffix in "keras", "h5":
            model.save(FOLDER / f"{make.__name__}.{suffix}")
