"""Lists and reads the files of a folder or of an archive: a .tar as it is, a .tar.gz after it is unpacked to a .tar."""

import gzip
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from experiment.files import UserError, acquire_lock, atomic_write

# What tarfile and gzip raise for a broken archive.
BROKEN = tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RecursionError, ValueError, IndexError, OverflowError


class File(NamedTuple):
    """A file of a folder or archive: its name there, and its `size` bytes from `offset` on in `path`."""

    name: str
    path: Path
    offset: int
    size: int
    width: int = 0  # pixels of a photo, upright
    height: int = 0


def list_files(archive):
    """The files of a folder or archive, as `File`s, and the names of its folders.

    Raises:
        UserError: It is missing or broken, or cannot be unpacked.
    """
    if not archive.exists():
        raise UserError(f"{archive} is missing; give a folder or an archive of photos by --data")
    if archive.is_dir():
        paths = [(path.relative_to(archive).as_posix(), path) for path in archive.rglob("*")]
        files = [File(name, path, 0, path.stat().st_size) for name, path in paths if path.is_file()]
        return files, [name for name, path in paths if path.is_dir()]
    try:
        tar = unpack(archive)
        with tarfile.open(tar, "r:") as file:
            members = [(member.name.removeprefix("./").lstrip("/"), member) for member in file]
            file.fileobj.seek(file.offset)
            if file.fileobj.read(512) != bytes(512):  # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"it breaks off after {len(members):,} files")
    except BROKEN as error:
        raise UserError(f"{archive} is not a complete .tar or .tar.gz ({error}); get it again") from None
    except OSError as error:
        reason = f"{archive} cannot be read, or unpacked beside itself ({error.strerror})"
        raise UserError(f"{reason}; unpack it elsewhere, and give the folder by --data") from None
    files = [File(name, tar, member.offset_data, member.size) for name, member in members if member.isreg()]
    return files, [name for name, member in members if member.isdir()]


def unpack(archive):
    """Path of the .tar: `archive` itself, or NAME.tar.gz.unpacked.tar, to which NAME.tar.gz is unpacked once."""
    tar = archive.with_name(f"{archive.name}.unpacked.tar")
    with archive.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":  # not compressed
            return archive
        if tar.exists() and tar.stat().st_mtime >= archive.stat().st_mtime:
            return tar
        file.seek(0)
        with (
            acquire_lock(archive.with_name(f"{archive.name}.lock")),
            tqdm.wrapattr(file, "read", archive.stat().st_size, desc=f"unpacking {archive}", disable=None) as shown,
            gzip.open(shown) as unpacked,
            atomic_write(tar) as part,
            part.open("wb") as target,
        ):
            shutil.copyfileobj(unpacked, target, 1 << 20)
    return tar


def read_bytes(file):
    """The content of a file."""
    with file.path.open("rb") as source:
        source.seek(file.offset)
        return source.read(file.size)
