"""The state of a training run on disk: it continues from there, bit for bit, however it ended.

settings.json             the settings of the run; with others it is not continued
checkpoint.npz            weights, state of the optimizer, and running means of loss and accuracy, with checksums
checkpoint.previous.npz   the one before
lock                      number of the process that uses the folder
"""

import json
import signal

import keras
import numpy as np

from files import PART, complete_file, hold

SETTINGS, CHECKPOINT, PREVIOUS, LOCK = "settings.json", "checkpoint.npz", "checkpoint.previous.npz", "lock"
NOT_COMPARED = ("out", "fresh", "epochs", "evaluate")  # settings that do not change what a run computes

# Signals to stop that came before the training. The exit that such a signal causes was seen to get lost, once, while
# Keras and TensorFlow made the model ready; so the training asks again.
received = []


class SettingError(ValueError):
    """A setting, or what it names, cannot be used; the message says which and what to do."""


def claim(out, settings, clear):
    """Makes the output folder this process's own, for a new run or the one that it holds.

    Args:
        out: Path of the folder.
        settings: Settings of the run by name.
        clear: Function of `out` that deletes an earlier run, or None to continue it.

    Returns:
        The open lock file: the folder is claimed as long as that is open.

    Raises:
        SettingError: The folder cannot be written, or holds a run with other settings.
        BlockingIOError: Another process uses it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = hold(out / LOCK)
    except BlockingIOError:
        raise
    except OSError as error:
        raise SettingError(f"--out {out} cannot be written ({error.strerror}); give another folder") from None
    folders = [out, *(folder for folder in out.glob("*/") if not (folder / LOCK).exists())]  # of no other run
    for folder in folders:
        for part in folder.glob(PART + "*"):  # of a run that was killed as it wrote
            part.unlink()
    if clear:
        for name in (CHECKPOINT, PREVIOUS):
            (out / name).unlink(missing_ok=True)
        clear(out)
        (out / SETTINGS).unlink(missing_ok=True)  # last: what is left after a kill is not taken for another run's
    own = {name: str(value) for name, value in settings.items() if name not in NOT_COMPARED}
    if (out / SETTINGS).exists():
        try:
            earlier = dict(json.loads((out / SETTINGS).read_text()))
        except (ValueError, TypeError):
            raise SettingError(f"{out / SETTINGS} is damaged; start over with --fresh") from None
        for name in own:
            if own[name] != earlier.get(name):
                raise SettingError(
                    f"{out} holds a run with --{name.replace('_', '-')} {earlier.get(name)}, not {own[name]}: "
                    "continue it with that, give another --out, or start over with --fresh"
                )
    else:
        with complete_file(out / SETTINGS) as path:
            path.write_text(json.dumps(own, indent=1))
    return lock


def make_repeatable(seed):
    """Makes what follows depend on the seed alone, on one machine and with one precision: bit for bit."""
    keras.utils.set_random_seed(seed)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


class State(keras.callbacks.Callback):
    """Keras callback: restores the state, saves it when asked, and ends the training in good order.

    A signal to stop (Ctrl-C, or SIGTERM) lets the step end, and the state is saved. A loss that is not finite ends the
    training at once, and the state saved last stays.

    Args:
        folder: Path of the output folder.
        model: The model that is going to be trained, compiled.

    Attributes:
        step: Steps done, those of earlier, interrupted runs included.
        signal: Number of the signal that stopped the training, or None.

    Raises:
        SettingError: There is a state, but none that can be used.
    """

    # Keras has BackupAndRestore; its HDF5 files have no checksums, so that a flipped bit becomes another weight.

    def __init__(self, folder, model):
        super().__init__()
        self.folder, self.signal, self.saved = folder, None, None
        model.optimizer.build(model.trainable_variables)
        found = [folder / name for name in (CHECKPOINT, PREVIOUS) if (folder / name).exists()]
        for path in found:
            try:
                with np.load(path, allow_pickle=False) as file:
                    self.saved = [file[name] for name in file.files]
                break
            except Exception:  # zipfile and NumPy raise a dozen kinds for a damaged file
                print(f"{path} is damaged")
        if found:
            self.restore(model)
            for damaged in found[: found.index(path)]:
                damaged.unlink()  # or it would become the one before
        self.step = int(model.optimizer.iterations)

    def restore(self, model):
        wanted = variables(model)
        try:
            # Keras makes the running means when training starts; until then there are fewer variables than values.
            for variable, value in zip(wanted, (self.saved or [])[: len(wanted)], strict=True):
                variable.assign(value)
        except (ValueError, TypeError):
            raise SettingError(
                f"{self.folder} has no state of this run that can be read; start over with --fresh"
            ) from None

    def save(self):
        path = self.folder / CHECKPOINT
        with complete_file(path) as part:
            with part.open("wb") as file:
                np.savez(file, *(np.asarray(variable) for variable in variables(self.model)))
            if path.exists():
                path.replace(self.folder / PREVIOUS)

    def on_train_begin(self, logs=None):
        if received:
            raise SystemExit(128 + received[0])

        def stop(number, frame):
            self.signal = number

        self.handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_epoch_begin(self, epoch, logs=None):
        if self.saved:
            self.restore(self.model)  # again, because Keras has just reset the running means

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # while it trains, Keras keeps the weights elsewhere
        if not np.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {self.step:,}; start over with --fresh and a smaller "
                "--learning-rate"
            )
        if self.signal:
            self.save()
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def variables(model):
    """All that training changes, in a fixed order: weights, states of dropout's random generators, and the rest."""
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables]
