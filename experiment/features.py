"""What training on photos reads: pooled features that are kept on disk, and batches that are made ahead."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from experiment.files import checksum


def load_pooled_features(out, network, read, count, key):
    """Pooled features F_k of photos, computed, or read from the file that an earlier run has left.

    The file, features-KEY.bin, grows photo by photo: a run that is stopped in between continues where it was.

    Args:
        out: Folder of the run.
        network: Model from images to F_k (N, K).
        read: Function from the index of a photo to images that the network takes, (n, h, w, channels).
        count: Number of photos, N.
        key: What the features depend on: arrays, and other values with a `repr`.

    Returns:
        F_k, (N, n, K) float32.
    """
    path = out / f"features-{checksum(key):08x}.bin"
    for other in out.glob("features-*.bin"):
        if other != path:
            other.unlink()
    row = len(read(0)) * network.output_shape[-1]  # values of a photo
    with path.open("ab") as file:
        done = file.tell() // (4 * row)
        file.truncate(done * 4 * row)  # a kill may have left a part of a photo
        inputs = prefetch(read, range(done, count))
        for images in tqdm(inputs, "features", count, initial=done, unit=" photos", disable=None):
            file.write(np.asarray(network.predict_on_batch(images), np.float32).tobytes())
    return np.fromfile(path, np.float32).reshape(count, -1, network.output_shape[-1])


def prefetch(make, indices, ahead=4):
    """Yields make(index) for each index; two threads make the next ones meanwhile."""
    with ThreadPoolExecutor(2) as pool:
        pending = deque()
        for index in indices:
            pending.append(pool.submit(make, index))
            if len(pending) > ahead:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()
