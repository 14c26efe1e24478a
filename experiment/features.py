"""What training on photos reads: pooled features that are kept on disk, and batches that are made ahead."""

import itertools
import os
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from experiment.distribution import device_count, predict_on_batch, process_count
from experiment.files import checksum

AT_A_TIME = 4  # photos in a forward pass of one device


def load_pooled_features(out, network, read, sizes, key):
    """Pooled features F_k of photos, computed, or read from the file that an earlier run has left.

    A run that is stopped in between continues where it was. In the file, features-KEY.bin, each photo has a checksum;
    damaged ones are computed again, with those of the same forward pass.

    Args:
        out: Folder of the run.
        network: Model from images to F_k (N, K).
        read: Function from the index of a photo to images that the network takes, (n, h, w, channels).
        sizes: Size of each photo, N values. Those of about the same size are computed together.
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
    limit = AT_A_TIME * (device_count() if process_count() == 1 else 1)
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    batches = [order[start : start + limit] for start in range(0, len(order), limit)]
    batches = [batch for batch in batches if not all(done[index] for index in batch)]
    count = sum(map(len, batches))
    inputs = prefetch(read, itertools.chain(*batches))
    with path.open("r+b") as file, tqdm(None, "features", count, unit=" photos", disable=None) as progress:
        for batch in batches:
            of_shape = defaultdict(list)
            for index in batch:
                images = next(inputs)
                of_shape[images.shape].append((index, images))
            for group in of_shape.values():
                indices, images = zip(*group, strict=True)
                features = np.asarray(predict_on_batch(network, np.concatenate(images)), np.float32)
                for index, pooled in zip(indices, np.split(features, len(group)), strict=True):
                    file.seek(index * row.itemsize)
                    file.write(np.array((pooled, checksum([pooled])), row).tobytes())
            progress.update(len(batch))
    return np.fromfile(path, row, len(sizes))["pooled"]


def prefetch(make, items):
    """Yields make(item) for each item; as many threads as there are processors make the next ones meanwhile."""
    threads, pending = os.cpu_count(), deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > threads + 2:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
