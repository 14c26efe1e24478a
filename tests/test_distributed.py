"""Training on several workers by Keras's own engine, `keras.distribution` on the JAX backend.

Not by `tf.distribute`: with Keras 3.15 its MultiWorkerMirroredStrategy does not work with `fit` (README).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_data

STEPS, BATCH_SIZE, WORKERS = 6, 8, 2


def train(data, part, parts):
    """Trains on the images part, part + parts, part + 2 parts ... of each batch; saves losses and weights."""
    sys.path.insert(0, str(ROOT))
    import keras

    if parts > 1:
        keras.distribution.initialize()  # by the environment variables KERAS_DISTRIBUTION_...
        # Every worker has its share of the batch already.
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))

    from types import SimpleNamespace

    from data.dataset import load_dataset
    from lenet import lenet, unit_variance_start
    from mnist import RECIPES, make_batch
    from training import Batches, Order, centre_on_classes

    def share(step):
        return tuple(values[part::parts] for values in make_batch(images, order, settings, STEPS, step))

    keras.utils.set_random_seed(0)
    images, _ = load_dataset(data)
    order = Order("stratified", images.labels, 0)
    model = lenet()
    unit_variance_start(model, images.images)
    centre_on_classes(model)
    model.compile(keras.optimizers.Adam(0.01), keras.losses.CategoricalCrossentropy(from_logits=True))
    settings = SimpleNamespace(**RECIPES["default"] | {"batch_size": BATCH_SIZE}, recipe="default", seed=0)
    losses = []
    record = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(float(logs["loss"])))
    model.fit(Batches(share, 0, STEPS), shuffle=False, verbose=0, callbacks=[record])
    np.savez(data / f"{part}_of_{parts}.npz", losses, *model.get_weights())


def start(data, part=0, parts=1, **environment):
    return subprocess.Popen(
        [sys.executable, __file__, data, str(part), str(parts)],
        env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"} | environment,
        stderr=(data / f"{part}_of_{parts}.log").open("w"),
    )


def result(process, data, part=0, parts=1):
    """Loss at each step, and the weights at the end."""
    assert process.wait(timeout=300) == 0, (data / f"{part}_of_{parts}.log").read_text()
    with np.load(data / f"{part}_of_{parts}.npz") as file:
        return [file[name] for name in file.files]


def test_two_workers_train_as_one(tmp_path):
    pytest.importorskip("jax")
    data = write_data(
        tmp_path, np.random.default_rng(0).integers(0, 256, (40, 20, 24), dtype=np.uint8), np.arange(40) % 10
    )
    alone = result(start(data), data)  # extracts the tarball
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free, and free again now
    workers = [
        start(
            data,
            part,
            WORKERS,
            KERAS_DISTRIBUTION_JOB_ADDRESSES=f"127.0.0.1:{port}",
            KERAS_DISTRIBUTION_NUM_PROCESSES=str(WORKERS),
            KERAS_DISTRIBUTION_PROCESS_ID=str(part),
        )
        for part in range(WORKERS)
    ]
    try:
        for part, worker in enumerate(workers):
            for values, expected in zip(result(worker, data, part, WORKERS), alone, strict=True):
                np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    finally:
        for worker in workers:
            worker.kill()  # one waits for the other for ever
    assert len(alone[0]) == STEPS


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
