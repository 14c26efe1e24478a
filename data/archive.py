"""Lists and reads the files of a folder, of a .tar as it is, or of a .tar.gz after it is unpacked to a .tar."""

import gzip
import os
import posixpath
import shutil
import tarfile
import unicodedata
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
    part: str = ""  # of a photo: "train" or "test", or "" if the sets are not separate
    folder: str = ""  # that of its class
    width: int = 0  # pixels, upright
    height: int = 0


def list_files(archive):
    """The files of a folder, a .tar or a .tar.gz, as `File`s; raises a UserError if it is missing or broken.

    Links are followed, in an archive to its own files. One that leads to no file is listed, too, but cannot be read.
    """
    if not archive.exists():
        raise UserError(f"{archive} is missing; give a folder or a .tar of photos by --data")
    if archive.is_dir():
        paths = [(path, path.stat().st_size if path.exists() else 0) for path in walk(archive)]
        return [File(path.relative_to(archive).as_posix(), path, 0, size) for path, size in paths]
    try:
        path = unpack(archive)
        with tarfile.open(path, "r:") as tar:
            members = {posixpath.normpath(member.name).lstrip("/"): member for member in tar}
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):  # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"it breaks off after {len(members):,} files")
    except BROKEN as error:
        hint = "unpack an archive of another kind, and give the folder by --data"
        raise UserError(f"{archive} is not a complete .tar or .tar.gz ({error}); {hint}") from None
    except OSError as error:
        reason = f"{archive} cannot be read, or unpacked beside itself ({error.strerror})"
        raise UserError(f"{reason}; unpack it elsewhere, and give the folder by --data") from None
    files = []
    for name, member in members.items():
        if member.issym():
            member = members.get(posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname)), member)
        elif member.islnk():
            member = members.get(posixpath.normpath(member.linkname), member)
        if not member.isdir():
            size = member.size if member.isreg() and not member.issparse() else 0  # nothing else can be read
            files.append(File(name, path, member.offset_data, size))
    return files


def unpack(archive):
    """Path of the .tar: `archive` itself, or NAME.tar.gz.unpacked.tar, to which NAME.tar.gz is unpacked once."""
    tar, time = archive.with_name(f"{archive.name}.unpacked.tar"), archive.stat().st_mtime_ns
    with archive.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":  # not compressed
            return archive
        file.seek(0)
        with acquire_lock(archive.with_name(f"{archive.name}.lock"), wait=True):
            if tar.exists() and tar.stat().st_mtime_ns == time:  # unpacked from this archive
                return tar
            shown = tqdm.wrapattr(file, "read", archive.stat().st_size, desc=f"unpacking {archive}", disable=None)
            with shown as packed, gzip.open(packed) as unpacked, atomic_write(tar) as part:
                with part.open("wb") as target:
                    shutil.copyfileobj(unpacked, target, 1 << 20)
                os.utime(part, ns=(time, time))
    return tar


def walk(folder, above=()):
    """Yields the paths of all files below a folder; links are followed unless they lead in a circle."""
    above = *above, folder.resolve()
    for path in folder.iterdir():
        if path.is_file() or not path.exists():
            yield path
        elif path.is_dir() and path.resolve() not in above:
            yield from walk(path, above)


def printable(name):
    """A name as one line of text: control characters become spaces, and bytes that are not text "?"."""
    replaced = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "?"}
    return "".join(replaced.get(unicodedata.category(character), character) for character in name)


def read_bytes(file):
    """The content of a file."""
    with file.path.open("rb") as source:
        source.seek(file.offset)
        return source.read(file.size)
