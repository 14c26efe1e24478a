"""LeNet with global average pooling: the network, and nothing of data or files.

The fully connected layers of LeNet are replaced by global average pooling and one matrix of softmax weights (Zhou et
al. 2016, section 2), so that each softmax weight belongs to one feature map. 52,736 weights with one input channel.
"""

import keras
from keras import layers, ops


def lenet(channels=1, classes=10, precision="float32", pooling="average"):
    """Builds the network, with the weights of the original at its start.

    Args:
        channels: Channels of the input images.
        classes: Number of classes, C.
        precision: Keras dtype policy of the convolutions, "float32" or "mixed_bfloat16". Pooled features, softmax
            weights and logits are float32 with either.
        pooling: "average", or "max" for the comparison in the paper's section 3.2: global max pooling.

    Returns:
        Keras model from images (N, H, W, channels), 0..255, to logits S_c (N, C). The feature maps f_k
        (N, H/4, W/4, 64) are the output of its layer "feature_maps".
    """
    images = keras.Input((None, None, channels), name="images")  # (N, H, W, channels)
    x = layers.Rescaling(1 / 255, name="unit_range")(images)
    # Pooling before ReLU gives the same as ReLU before pooling, on a quarter of the cells.
    x = layers.Conv2D(32, 5, padding="same", dtype=precision, name="conv1")(x)  # (N, H, W, 32)
    x = layers.MaxPooling2D(2, padding="same", dtype=precision, name="pool1")(x)  # (N, H/2, W/2, 32)
    x = layers.ReLU(dtype=precision, name="relu1")(x)
    x = layers.Conv2D(64, 5, padding="same", dtype=precision, name="conv2")(x)  # (N, H/2, W/2, 64)
    x = layers.MaxPooling2D(2, padding="same", dtype=precision, name="pool2")(x)  # (N, H/4, W/4, 64)
    feature_maps = layers.ReLU(dtype=precision, name="feature_maps")(x)  # f_k
    global_pooling = {"average": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}[pooling]
    name = "gap" if pooling == "average" else "gmp"
    pooled = global_pooling(dtype="float32", name=name)(feature_maps)  # F_k: (N, 64)
    logits = layers.Dense(  # S_c = sum_k w_k^c F_k: (N, C)
        classes,
        use_bias=False,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        dtype="float32",
        name="softmax_weights",
    )(pooled)
    return keras.Model(images, logits, name="lenet")


def unit_variance_start(model, images):
    """Scales the weights of a new LeNet so that it learns from the first step.

    At the original's start the logits hardly differ: the average over 625 cells dilutes a digit that covers 4% of
    them, and training sits on a plateau until the weights have grown. Here the logits have unit variance over some
    images, which is what layer-sequential unit-variance initialization (LSUV, Mishkin and Matas 2016) asks of every
    layer. Only the last is asked here: with zero biases the network is homogeneous, so the scale can be spread evenly
    over the layers, one standard deviation for all weights, and steps of one size, as Adam makes them, fit each layer.

    Args:
        model: A model made by `lenet`; its weights are changed in place.
        images: (N, H, W, channels), 0..255; a few hundred.
    """
    kernels = [model.get_layer(name).kernel for name in ("conv1", "conv2", "softmax_weights")]
    for kernel in kernels:
        kernel.assign(kernel / ops.std(kernel))
    parts = [model(images[start : start + 32]) for start in range(0, len(images), 32)]  # all at once take 0.5 GB
    gain = ops.std(ops.concatenate(parts)) ** (1 / len(kernels))  # each kernel scales the logits by its own scale
    for kernel in kernels:
        kernel.assign(kernel / gain)
