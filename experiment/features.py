"""What training on photos reads: pooled features that are kept on disk, and batches that are made ahead."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from experiment.files import checksum


def load_pooled_features(out, network, read, count, key):
    """Pooled features F_k of photos, computed, or read from the file that an earlier run has left.

    The file, features-KEY.bin, grows photo by photo: a run that is stopped in between continues where it was. Each
    photo has a checksum; from the first damaged one on, they are computed again.

    Args:
        out: Folder of the run.
        network: Model from images to F_k (N, K).
        read: Function from the index of a photo to images that the network takes, (n, h, w, channels).
        count: Number of photos, N.
        key: What the features depend on: a list of values, see `checksum`.

    Returns:
        F_k, (N, n, K) float32.
    """
    path = out / f"features-{checksum(key):08x}.bin"
    for other in out.glob("features-*.bin"):
        if other != path:
            other.unlink()
    row = np.dtype([("pooled", np.float32, (len(read(0)), network.output_shape[-1])), ("checksum", np.uint32)])
    path.touch()
    found = np.fromfile(path, row)[:count]  # a part of a photo at the end, which a kill may have left, does not count
    damaged = (index for index, (pooled, value) in enumerate(found) if checksum([pooled]) != value)
    done = next(damaged, len(found))
    with path.open("ab") as file:
        file.truncate(done * row.itemsize)
        inputs = prefetch(read, range(done, count))
        for images in tqdm(inputs, "features", count, initial=done, unit=" photos", disable=None):
            pooled = np.asarray(network.predict_on_batch(images), np.float32)
            file.write(np.array((pooled, checksum([pooled])), row).tobytes())
    return np.fromfile(path, row)["pooled"]


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
