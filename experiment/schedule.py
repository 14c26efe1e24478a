"""The order of the training images, the learning rate, and the choice of some steps."""

from functools import lru_cache

import keras
import numpy as np


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


def warmup_cosine(peak, steps, warmup):
    """Learning rate that rises to its peak in a share of the steps, `warmup`, then falls to 0 along a cosine."""
    warmup = max(1, round(warmup * steps))
    return keras.optimizers.schedules.CosineDecay(0.0, max(1, steps - warmup), warmup_target=peak, warmup_steps=warmup)


def spread(count, chosen):
    """Positions in a list of `count`, about `chosen` of them at about equal ratios: the first, the last, many early."""
    return np.unique(np.geomspace(1, count, chosen).round().astype(int)) - 1
