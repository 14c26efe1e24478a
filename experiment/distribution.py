"""Training on all devices of a machine, and on several machines, by `keras.distribution` on the JAX backend.

On several machines, each process runs the same command and trains on its part of every batch. All make the same
evaluations. The first process writes the run folder; the others write to a temporary one, which they delete.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

from experiment.files import UserError

temporary = contextlib.ExitStack()  # has the temporary folder of this process


def connect():
    """Connects the processes, if the environment variables KERAS_DISTRIBUTION_... say that there are several.

    Raises:
        UserError: The backend is not JAX, a variable is missing or wrong, or the processes do not find each other.
    """
    if "KERAS_DISTRIBUTION_NUM_PROCESSES" not in os.environ:
        return
    if keras.backend.backend() != "jax":
        raise UserError("KERAS_DISTRIBUTION_...: several processes need KERAS_BACKEND=jax")
    import jax

    jax.config.update("jax_enable_recoverability", True)  # or JAX would abort all processes if one of them ends
    try:
        keras.distribution.initialize()
    except Exception as error:  # JAX raises several kinds
        raise UserError(f"KERAS_DISTRIBUTION_...: the processes cannot be connected ({error})") from None


def use_all_devices(settings):
    """Makes models that are built from now on train on all devices.

    Raises:
        UserError: A batch cannot be divided among the devices.
    """
    if keras.backend.backend() != "jax":
        return
    count, batch_size = device_count(), settings.batch_size
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
    if keras.backend.backend() != "jax":
        return 1
    import jax

    return jax.process_count()


def own_part(batch):
    """The part of a batch, an array (B, ...), that this process trains on."""
    if process_count() == 1:
        return batch
    import jax

    return np.array_split(batch, jax.process_count())[jax.process_index()]


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
    """Gives the files of that names in the run folder of the first process to the others, in a temporary folder.

    That folder becomes their `settings.out`, and they print nothing any more.
    """
    if process_count() == 1:
        return
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all

    first = jax.process_index() == 0
    if not first:
        print(f"process {jax.process_index()} trains with process 0, which reports and writes --out", flush=True)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        settings.out = Path(temporary.enter_context(tempfile.TemporaryDirectory()))
    for name in names:
        path, content = settings.out / name, b""
        if first and path.exists() and not settings.fresh:
            content = path.read_bytes()
        size = int(broadcast_one_to_all(np.int32(len(content))))
        content = np.frombuffer(content or bytes(size), np.uint8)
        content = np.asarray(broadcast_one_to_all(content)).tobytes()
        if size and not first:
            path.write_bytes(content)


def finish():
    """Ends the processes together, for JAX aborts those that are still connected when the first one is gone."""
    if process_count() == 1:
        return
    import jax
    from jax.experimental.multihost_utils import sync_global_devices

    temporary.close()
    sync_global_devices("finished")
    if jax.process_index() > 0:
        os._exit(0)
