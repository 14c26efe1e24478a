"""Files that are whole or not there, and folders that one process uses at a time."""

import os
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

PART = "part."  # names that begin with it are of files being written


@contextmanager
def complete_file(path):
    """Gives a path to write to; what is written there gets the name `path` at the end, or never.

    Raises:
        OSError: It cannot be written; names the file, as a full disk does not.
    """
    part = path.with_name(PART + path.name)
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def hold(path):
    """Holds the lock file `path` for this process.

    Returns:
        The open file. It is held until that is closed, or the process ends, however it ends.

    Raises:
        BlockingIOError: Another process holds it; the message names that process.
    """
    file = path.open("a+")
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            file.close()
            raise BlockingIOError(f"process {holder} uses {path.parent}; wait for it, or stop it") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
