"""Atomic writes, folder locks, and the error that users can fix."""

import os
import sys
import zlib
from contextlib import contextmanager

import numpy as np

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

PART = ".cam-part."  # prefix of the files that are being written


class UserError(Exception):
    """Bad input. The message is one line that names the file or setting and says what to do."""


@contextmanager
def atomic_write(path):
    """Yields a temporary path to write to, and renames it to `path` if nothing fails.

    Raises:
        OSError: The file cannot be written. The message names the file, which a full disk's does not.
    """
    part = path.with_name(PART + path.name)
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno is None:  # not of the operating system, such as gzip.BadGzipFile
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def acquire_lock(path, wait=False):
    """Locks the file `path` for this process, until the returned open file is closed or the process ends.

    Where the file system has no locks, it says so and goes on. With `wait`, it waits for a process that holds the lock.

    Raises:
        UserError: Another process holds the lock; the message names that process.
    """
    file = path.open("a+")
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            if not wait:
                file.close()
                raise UserError(f"process {holder} uses {path.parent}; wait for it, or stop it") from None
            print(f"waiting for process {holder}, which uses {path.parent}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{path.parent} cannot be locked ({error.strerror}); use it in one process only", file=sys.stderr)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def checksum(values):
    """A checksum of arrays and bytes, and of other values by their `repr`."""
    value = 0
    for part in values:
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part)
        elif not isinstance(part, bytes):
            part = repr(part).encode()
        value = zlib.crc32(part, value)
    return value
