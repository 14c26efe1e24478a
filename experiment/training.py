"""What the training of both experiments shares: seed, precision, order of the images, learning rate, constraint."""

import platform
from functools import lru_cache
from pathlib import Path

import keras
import numpy as np
from keras import ops

from experiment.process import quiet_stderr

# XLA's convolutions on a CPU are several times slower than TensorFlow's own.
JIT_COMPILE = False if keras.backend.backend() == "tensorflow" else "auto"


def set_seed(seed):
    """Makes all results depend on the seed alone, bit for bit, on one CPU and with one precision."""
    with quiet_stderr():  # Keras imports TensorFlow here, whatever the backend is
        keras.utils.set_random_seed(seed)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


def prefers_bfloat16():
    """Whether the device that trains is known to be faster with bfloat16. Among Intel's, only those with AMX are."""
    if keras.backend.backend() != "tensorflow":
        return False  # not measured
    import tensorflow as tf

    if gpus := tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0)) >= (8, 0)
    cpu = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    return "amx_bf16" in cpu or ("avx512_bf16" in cpu and "AuthenticAMD" in cpu)


def batch_indices(step, batch_size, count, order, seed):
    """Indices of the training images in the batch of a step: (batch_size,) int64, 0..count-1.

    Each image comes once per epoch, in a new random order ("shuffled") or always in file order ("file"). The indices
    depend on the arguments alone, so training can resume at any step.
    """
    epochs, positions = np.divmod(step * batch_size + np.arange(batch_size), count)
    if order == "file":
        return positions
    return np.concatenate([epoch_order(count, seed, int(e))[positions[epochs == e]] for e in np.unique(epochs)])


@lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    """Random order of all images for an epoch: (N,) int64."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def shrink(images, share=0.72):
    """Scales images (N, H, W, channels) to a share of their sides, rounded to multiples of LeNet's stride."""
    height, width = (round(share * side / 4) * 4 for side in images.shape[1:3])
    return ops.convert_to_numpy(ops.image.resize(ops.cast(images, "float32"), (height, width)))


def warmup_cosine(peak, steps, warmup):
    """Learning rate that rises to its peak in a share of the steps, `warmup`, then falls to 0 along a cosine."""
    warmup = max(1, round(warmup * steps))
    return keras.optimizers.schedules.CosineDecay(0.0, max(1, steps - warmup), warmup_target=peak, warmup_steps=warmup)


def keep_zero_mean_over_classes(layer):
    """Keeps each unit's softmax weights at a mean of zero over the classes, now and in training.

    Not in the paper, ours. Softmax, and so prediction and loss, does not change when the same map is added to the maps
    of all classes. Gradient descent leaves that common part as it is; Adam, whose steps do not sum to zero over the
    classes, makes it drift. Without it, M_c shows the evidence for class c relative to the other classes.

    Args:
        layer: The Dense layer with the softmax weights w_k^c, (K, C); its kernel is changed in place.
    """
    layer.kernel.constraint = zero_mean_over_classes
    layer.kernel.assign(zero_mean_over_classes(layer.kernel))


def zero_mean_over_classes(softmax_weights):
    """Subtracts from w_k^c (K, C) its mean over the classes, for each unit k."""
    return softmax_weights - ops.mean(softmax_weights, axis=1, keepdims=True)
