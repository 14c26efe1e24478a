"""LeNet with global average pooling (GAP).

The fully connected layers of LeNet are replaced by global average pooling and one matrix of softmax weights (Zhou et
al. 2016, section 2), so that each softmax weight belongs to one feature map. 52,736 weights with one input channel.
"""

import keras
import numpy as np
from keras import layers, ops

# In rows and in columns, location i of the feature maps covers the 16 pixels starting at 4 i - 6.
RECEPTIVE_FIELD = {"start": -6, "stride": 4, "length": 16}


def lenet(channels=1, classes=10, precision="float32", pooling="average", location_dropout=0.0):
    """Builds the network with initial weights as in the repository of 2017.

    Args:
        channels: Channels of the input images.
        classes: Number of classes, C.
        precision: Keras dtype policy of the convolutions, "float32" or "mixed_bfloat16". Pooled features, softmax
            weights and logits are float32 with either.
        pooling: "average", or "max" for the comparison in the paper's section 3.2: global max pooling.
        location_dropout: Share of the locations of the feature maps that are hidden in training, all units at once.
            Not in the paper, ours: it forces each class to use the whole digit, not just the most telling stroke. In
            the spirit of Hide-and-Seek (Singh and Lee 2017), which hides patches of the image.

    Returns:
        Keras model from images (N, H, W, channels), 0..255, to logits S_c (N, C). The feature maps f_k
        (N, H/4, W/4, 64), rounded up, are the output of its layer "feature_maps".
    """
    images = keras.Input((None, None, channels), name="images")  # (N, H, W, channels)
    x = layers.Rescaling(1 / 255, name="rescaling")(images)
    # Pooling before ReLU gives the same as ReLU before pooling, at a quarter of the locations.
    x = layers.Conv2D(32, 5, padding="same", dtype=precision, name="conv1")(x)  # (N, H, W, 32)
    x = layers.MaxPooling2D(2, padding="same", dtype=precision, name="pool1")(x)  # (N, H/2, W/2, 32)
    x = layers.ReLU(dtype=precision, name="relu1")(x)
    x = layers.Conv2D(64, 5, padding="same", dtype=precision, name="conv2")(x)  # (N, H/2, W/2, 64)
    x = layers.MaxPooling2D(2, padding="same", dtype=precision, name="pool2")(x)  # (N, H/4, W/4, 64)
    feature_maps = layers.ReLU(dtype=precision, name="feature_maps")(x)  # f_k
    noise_shape = (None, None, None, 1)  # all units of a location are hidden together
    x = layers.Dropout(location_dropout, noise_shape, dtype=precision, name="location_dropout")(feature_maps)
    if pooling == "average":
        pooled = layers.GlobalAveragePooling2D(dtype="float32", name="gap")(x)  # F_k: (N, 64)
    else:
        pooled = layers.GlobalMaxPooling2D(dtype="float32", name="gmp")(x)
    logits = layers.Dense(  # S_c = sum_k w_k^c F_k: (N, C)
        classes,
        use_bias=False,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        dtype="float32",
        name="softmax_weights",
    )(pooled)
    return keras.Model(images, logits, name="lenet")


def scale_to_unit_logits(model, images):
    """Scales the initial weights so that the network learns from the first step.

    With the initial weights of 2017 the logits hardly differ: the mean over 625 locations dilutes a digit that
    covers 4% of them, and training stays on a plateau until the weights have grown. Here the logits get unit variance,
    as LSUV initialization (Mishkin and Matas 2016) does in every layer, and all kernels the same standard deviation, so
    that Adam's steps fit each layer.

    Args:
        model: A model made by `lenet`; its weights are changed in place.
        images: (N, H, W, channels), 0..255; a few hundred.
    """
    kernels = [model.get_layer(name).kernel for name in ("conv1", "conv2", "softmax_weights")]
    for kernel in kernels:
        kernel.assign(kernel / ops.std(kernel))
    batches = np.array_split(images, -(-len(images) // 32))  # all at once take 0.5 GB
    logits = ops.concatenate([model(batch) for batch in batches])
    gain = ops.std(logits) ** (1 / len(kernels))  # biases are 0: g times all three kernels is g^3 times the logits
    for kernel in kernels:
        kernel.assign(kernel / gain)
