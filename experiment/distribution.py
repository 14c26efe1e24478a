"""Training on all devices of a machine, and on several machines, by `keras.distribution` on the JAX backend.

On several machines, each process runs the same command and trains on its part of every batch. All make the same
evaluations. The first process writes the run folder; each other one writes to a temporary folder, which it deletes.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

from experiment.files import UserError

temporary = contextlib.ExitStack()  # deletes the temporary folder, if this process has one


def connect():
    """Connects the processes, if the environment variables KERAS_DISTRIBUTION_... say that there are several.

    Raises:
        UserError: The backend is not JAX, another variable is missing or wrong, or the processes cannot be connected.
    """
    count = os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES")
    if count is None:
        return
    if keras.backend.backend() != "jax":
        raise UserError("KERAS_DISTRIBUTION_...: several processes need KERAS_BACKEND=jax")
    import jax

    jax.config.update("jax_enable_recoverability", True)  # or JAX would abort all processes if one of them ends
    print(f"waiting until {count} processes are connected", flush=True)
    try:
        keras.distribution.initialize()
    except Exception as error:  # JAX raises several kinds
        raise UserError(f"KERAS_DISTRIBUTION_...: the processes cannot be connected ({error})") from None


def use_all_devices(settings):
    """Distributes the models that are built after this call over all devices.

    Raises:
        UserError: A batch cannot be divided among the devices, or the machines have different numbers of them.
    """
    if keras.backend.backend() != "jax":
        return
    import jax

    count, batch_size = device_count(), settings.batch_size
    if count != process_count() * jax.local_device_count():
        raise UserError("all machines must have the same number of devices")
    if batch_size % count:
        fits = [size for size in (batch_size // count * count, -(-batch_size // count) * count) if size]
        sizes = " or ".join(map(str, fits))
        raise UserError(f"--batch-size {batch_size} cannot be divided among {count} devices; {sizes} can")
    if count > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))


def device_count():
    """Number of devices that train, of all processes."""
    return len(keras.distribution.list_devices()) if keras.backend.backend() == "jax" else 1


def process_count():
    """Number of processes that train one network."""
    return int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES", 1))


def process_index():
    """Index of this process among them, from 0."""
    return int(os.environ.get("KERAS_DISTRIBUTION_PROCESS_ID", 0))


def own_part(batch):
    """The part of a batch, an array (B, ...), that this process trains on."""
    return np.array_split(batch, process_count())[process_index()]


def predict_on_batch(model, images):
    """`model.predict_on_batch` of images (N, H, W, channels) on all devices of this machine.

    The batch is padded with zeros to a multiple of the number of devices. Of several machines, each computes all of it.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or process_count() > 1:
        return model.predict_on_batch(images)
    padding = -len(images) % device_count()
    padded = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
    layout = distribution.get_data_layout(padded.shape)
    outputs = model.predict_on_batch(keras.distribution.distribute_tensor(padded, layout))
    return keras.tree.map_structure(lambda output: output[: len(images)], outputs)


def share_run(settings, names):
    """Copies files of the run folder of the first process to a temporary folder of each other process.

    That folder becomes their `settings.out`, and they print nothing from then on. With one process, nothing is done.
    """
    if process_count() == 1:
        return
    from jax.experimental.multihost_utils import broadcast_one_to_all

    first = process_index() == 0
    if not first:
        print(f"process {process_index()} trains; process 0 reports and writes --out", flush=True)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        settings.out = Path(temporary.enter_context(tempfile.TemporaryDirectory()))
        settings.fresh = False  # the first process has emptied the run folder
    for name in names:
        path, content = settings.out / name, b""
        if first and path.exists():
            content = path.read_bytes()
        size = int(broadcast_one_to_all(np.int32(len(content))))
        if size:
            content = broadcast_one_to_all(np.frombuffer(content or bytes(size), np.uint8))
            if not first:
                path.write_bytes(np.asarray(content).tobytes())


def finish():
    """Ends the processes together, for JAX aborts those that are still connected when the first one is gone."""
    if process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("finished")
        if process_index() > 0:
            leave(0)


def leave(code):
    """Ends this process. Of several processes, it does not wait for the others, as JAX would."""
    temporary.close()
    if process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
