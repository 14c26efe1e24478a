"""What training on photos reads: pooled features that are kept on disk, and batches that are made ahead."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from experiment.distribution import device_count, predict_on_batch
from experiment.files import checksum

AT_A_TIME = 4  # photos in a forward pass of one device


def load_pooled_features(out, network, read, sizes, key):
    """Pooled features F_k of photos, computed, or read from the file that an earlier run has left.

    A run that is stopped in between continues where it was. In the file, features-KEY.bin, each photo has a checksum;
    damaged ones are computed again.

    Args:
        out: Folder of the run.
        network: Model from images to F_k (N, K).
        read: Function from the index of a photo to images that the network takes, (n, h, w, channels).
        sizes: Size of each photo, N values. Those of one size are computed together, so `read` gives them one shape.
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
    done = [checksum([pooled]) == value for pooled, value in np.fromfile(path, row, len(sizes))]
    done += [False] * (len(sizes) - len(done))
    batches = [batch for batch in batch_by_size(sizes, AT_A_TIME * device_count()) if not all(done[i] for i in batch)]

    def read_batch(batch):
        return batch, np.concatenate([read(index) for index in batch])

    count = sum(map(len, batches))
    with path.open("r+b") as file, tqdm(None, "features", count, unit=" photos", disable=None) as progress:
        for batch, images in prefetch(read_batch, batches):
            features = np.asarray(predict_on_batch(network, images), np.float32)
            for index, pooled in zip(batch, features.reshape(len(batch), *row["pooled"].shape), strict=True):
                file.seek(index * row.itemsize)
                file.write(np.array((pooled, checksum([pooled])), row).tobytes())
            progress.update(len(batch))
    return np.fromfile(path, row, len(sizes))["pooled"]


def batch_by_size(sizes, limit):
    """Batches of at most `limit` indices of the same size."""
    batches = []
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        if batches and len(batches[-1]) < limit and sizes[batches[-1][0]] == sizes[index]:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def prefetch(make, items):
    """Yields make(item) for each item; as many threads as there are processors make the next ones meanwhile."""
    threads = os.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > threads + 2:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()
