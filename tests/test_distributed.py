"""Training on several workers by Keras's own engine, `keras.distribution` on the JAX backend.

Not by `tf.distribute`: with Keras 3.15 its MultiWorkerMirroredStrategy does not work (docs/performance.md).
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
    """Trains as mnist.py does, on one of the contiguous parts of each batch; saves losses and weights."""
    sys.path.insert(0, str(ROOT))
    import keras

    if parts > 1:
        keras.distribution.initialize()  # by the environment variables KERAS_DISTRIBUTION_...
        # Every worker has its share of the batch already.
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))

    from cam import JIT_COMPILE, zero_mean_over_classes
    from data.dataset import load_dataset
    from experiment.schedule import batch_indices, warmup_cosine
    from lenet import lenet, lsuv_init

    keras.utils.set_random_seed(0)
    images, _ = load_dataset(data)
    one_hot = keras.utils.to_categorical(images.labels, 10)
    model = lenet(location_dropout=0.3)
    lsuv_init(model, images.images)
    kernel = model.get_layer("softmax_weights").kernel
    kernel.constraint = zero_mean_over_classes
    kernel.assign(kernel.constraint(kernel))
    optimizer = keras.optimizers.AdamW(warmup_cosine(0.01, STEPS, 0.2), 0.01, beta_2=0.99)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.03)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=JIT_COMPILE)
    losses = []
    for step in range(STEPS):
        batch = np.array_split(batch_indices(step, BATCH_SIZE, len(one_hot), "shuffled", 0), parts)[part]
        losses.append(model.train_on_batch(images.images[batch], one_hot[batch])[0])
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
