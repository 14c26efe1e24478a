"""The state of a training run on disk: two files with checksums, of which one is always whole."""

import json

import numpy as np

from experiment.files import UserError, atomic_write

# Not keras.callbacks.BackupAndRestore: its HDF5 files have no checksums, so a flipped bit becomes another weight.
CHECKPOINT, PREVIOUS = "checkpoint.npz", "checkpoint.previous.npz"


class Checkpoint:
    """All that training changes: weights, dropout's random state, optimizer state, and the progress of the run."""

    def __init__(self, folder, model):
        self.folder = folder
        model.optimizer.build(model.trainable_variables)
        self.variables = [*model.variables, *model.optimizer.variables]

    def save(self, progress):
        """Saves the variables, and `progress`, a dict for JSON. The checkpoint before is kept, too."""
        path = self.folder / CHECKPOINT
        with atomic_write(path) as part:
            with part.open("wb") as file:
                np.savez(file, np.array(json.dumps(progress)), *(np.asarray(variable) for variable in self.variables))
            if path.exists():
                path.replace(self.folder / PREVIOUS)

    def restore(self):
        """Restores the newest checkpoint that is whole; returns its progress, or None if there is no checkpoint."""
        found = [self.folder / name for name in (CHECKPOINT, PREVIOUS) if (self.folder / name).exists()]
        for path in found:
            try:
                with np.load(path, allow_pickle=False) as file:
                    progress, *values = [file[name] for name in file.files]
                progress = json.loads(str(progress))
                if [value.shape for value in values] != [variable.shape for variable in self.variables]:
                    raise ValueError(f"{path} is of another model")
            except Exception:  # zipfile and NumPy raise a dozen kinds for a damaged file
                print(f"{path} is damaged", flush=True)
                continue
            for variable, value in zip(self.variables, values, strict=True):
                variable.assign(value)
            for damaged in found[: found.index(path)]:
                damaged.unlink()  # or it would become the previous one
            return progress
        if found:
            raise UserError(f"{self.folder} has no checkpoint that can be read; start over with --fresh")
        return None
