"""AlexNet with global average pooling (GAP).

The convolutions are those of torchvision's AlexNet ("One weird trick for parallelizing convolutional neural networks",
Krizhevsky 2014), whose ImageNet weights are public. As in Zhou et al. 2016, section 3, what comes after conv5 is
replaced by a 3x3 convolution of 1024 units, global average pooling, and one matrix of softmax weights.
"""

from functools import partial

import keras
from keras import layers, ops

SHORT_SIDE = 256  # pixels to which a photo is scaled on its short side
CROP_SIDE = 224  # pixels of the square that is cropped from it for training: feature maps of 13 x 13 locations
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0..1, RGB
# Convolutions with ImageNet weights: torchvision's name, and the shape there, (out, in, height, width).
CONVOLUTIONS = {
    "conv1": ("features.0", (64, 3, 11, 11)),
    "conv2": ("features.3", (192, 64, 5, 5)),
    "conv3": ("features.6", (384, 192, 3, 3)),
    "conv4": ("features.8", (256, 384, 3, 3)),
    "conv5": ("features.10", (256, 256, 3, 3)),
}


def alexnet(classes, precision="float32", location_dropout=0.3):
    """Builds the network with random weights.

    Args:
        classes: Number of classes, C.
        precision: Keras dtype policy of the convolutions, "float32" or "mixed_bfloat16". Pooled features, softmax
            weights and logits are float32 with either.
        location_dropout: Share of the locations before the last convolution that are hidden in training. Not in the
            paper, ours; whether it helps depends on the label smoothing, see docs/choosing-settings.md.

    Returns:
        Keras model from RGB images (N, H, W, 3), 0..255, to logits S_c (N, C). The feature maps f_k (N, h, w, 1024)
        are the output of its layer "feature_maps"; 13 x 13 locations for 224 x 224 pixels.
    """

    # With stride 1 "same" pads all sides alike, as PyTorch does; before conv1 the padding is a layer.
    options = {"padding": "same", "activation": "relu", "kernel_initializer": "he_normal", "dtype": precision}
    conv = partial(layers.Conv2D, **options)
    images = keras.Input((None, None, 3), name="images")  # (N, H, W, 3)
    mean, variance = [255 * x for x in MEAN], [(255 * x) ** 2 for x in STD]
    x = layers.Normalization(mean=mean, variance=variance, name="normalization")(images)
    x = layers.ZeroPadding2D(2, name="padding1")(x)
    x = conv(64, 11, strides=4, padding="valid", name="conv1")(x)  # (N, 55, 55, 64) of 224 x 224 pixels
    x = layers.MaxPooling2D(3, 2, dtype=precision, name="pool1")(x)  # (N, 27, 27, 64)
    x = conv(192, 5, name="conv2")(x)  # (N, 27, 27, 192)
    x = layers.MaxPooling2D(3, 2, dtype=precision, name="pool2")(x)  # (N, 13, 13, 192)
    x = conv(384, 3, name="conv3")(x)
    x = conv(256, 3, name="conv4")(x)
    x = conv(256, 3, name="conv5")(x)  # (N, 13, 13, 256)
    x = layers.Dropout(location_dropout, (None, None, None, 1), dtype=precision, name="location_dropout")(x)
    feature_maps = conv(1024, 3, name="feature_maps")(x)  # f_k: (N, 13, 13, 1024)
    pooled = layers.GlobalAveragePooling2D(dtype="float32", name="gap")(feature_maps)  # F_k: (N, 1024)
    pooled = layers.Dropout(0.5, name="dropout")(pooled)  # as in AlexNet's own classifier
    logits = layers.Dense(classes, use_bias=False, dtype="float32", name="softmax_weights")(pooled)  # S_c: (N, C)
    return keras.Model(images, logits, name="alexnet")


def set_convolutions(model, weights):
    """Gives conv1 to conv5 the weights of torchvision's network.

    Args:
        model: A model made by `alexnet`; its weights are changed in place.
        weights: Arrays by torchvision's names, as in `weight_shapes`.
    """
    for name, (feature, _) in CONVOLUTIONS.items():
        kernel, bias = weights[f"{feature}.weight"], weights[f"{feature}.bias"]
        model.get_layer(name).set_weights([ops.transpose(kernel, (2, 3, 1, 0)), bias])  # -> (height, width, in, out)


def weight_shapes():
    """The shapes of torchvision's weights by their names."""
    kernels = {f"{feature}.weight": shape for feature, shape in CONVOLUTIONS.values()}
    return kernels | {f"{feature}.bias": shape[:1] for feature, shape in CONVOLUTIONS.values()}
