"""Training on several workers by Keras's own engine, `keras.distribution` on the JAX backend.

Not by `tf.distribute`: with Keras 3.15 its MultiWorkerMirroredStrategy does not work (docs/performance.md).
"""

import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, start, write_data

STEPS, BATCH_SIZE, WORKERS = 6, 8, 2


def train(data, part, parts):
    """Trains as mnist.py does, on one of the contiguous parts of each batch; saves losses and weights."""
    import keras

    if parts > 1:
        keras.distribution.initialize()  # by the environment variables KERAS_DISTRIBUTION_...
        # Every worker has its share of the batch already.
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))

    import mnist
    from data.dataset import load_dataset

    keras.utils.set_random_seed(0)
    settings = mnist.parse_arguments(["--steps", str(STEPS), "--precision", "float32"])
    images, _ = load_dataset(data)
    one_hot = keras.utils.to_categorical(images.labels, 10)
    model = mnist.lenet(location_dropout=settings.location_dropout)
    mnist.prepare_training(model, settings, images.images)
    losses = []
    for step in range(STEPS):
        indices = mnist.batch_indices(step, BATCH_SIZE, len(one_hot), settings.order, settings.seed)
        batch = np.array_split(indices, parts)[part]
        losses.append(model.train_on_batch(images.images[batch], one_hot[batch])[0])
    np.savez(data / f"{part}_of_{parts}.npz", losses, *model.get_weights())


def worker(data, part=0, parts=1, **environment):
    """Starts a process that trains."""
    environment |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT}
    return start(__file__, data, part, parts, **environment)


def result(process, data, part=0, parts=1):
    """Loss at each step, and the weights at the end."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    with np.load(data / f"{part}_of_{parts}.npz") as file:
        return [file[name] for name in file.files]


@pytest.mark.slow
def test_two_workers_train_as_one(tmp_path):
    pytest.importorskip("jax")
    images = np.random.default_rng(0).integers(0, 256, (40, 20, 24), dtype=np.uint8)
    data = write_data(tmp_path, images, np.arange(40) % 10)
    with worker(data) as process:
        alone = result(process, data)  # extracts the tarball
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free, and free again now
    environment = {"KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}"}
    environment |= {"KERAS_DISTRIBUTION_NUM_PROCESSES": WORKERS}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(worker(data, part, WORKERS, **environment, KERAS_DISTRIBUTION_PROCESS_ID=part))
            for part in range(WORKERS)
        ]
        for part, process in enumerate(processes):
            for values, expected in zip(result(process, data, part, WORKERS), alone, strict=True):
                np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    assert len(alone[0]) == STEPS


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
