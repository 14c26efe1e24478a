"""Lists and reads the files of a folder or of an archive: a .tar as it is, a .tar.gz after it is unpacked to a .tar."""

import gzip
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from experiment.files import UserError, acquire_lock, atomic_write


class File(NamedTuple):
    """Where a file of a folder or an archive lies: its name there, and `size` bytes from `offset` on in `path`."""

    name: str
    path: Path
    offset: int
    size: int
    width: int = 0  # pixels of a photo, upright
    height: int = 0


def list_files(archive):
    """The files of a folder or archive, as `File`s, and the names of its folders.

    Raises:
        UserError: It is missing, or broken.
    """
    if not archive.exists():
        raise UserError(f"{archive} is missing; give a folder or an archive of photos by --data")
    if archive.is_dir():
        paths = [(path.relative_to(archive).as_posix(), path) for path in archive.rglob("*")]
        files = [File(name, path, 0, path.stat().st_size) for name, path in paths if path.is_file()]
        return files, [name for name, path in paths if path.is_dir()]
    try:
        with archive.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        return list_tar(unpack(archive) if compressed else archive)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RecursionError) as error:
        raise UserError(f"{archive} is not a complete .tar or .tar.gz ({error}); get it again") from None


def list_tar(archive):
    """The files of a .tar, and the names of its folders."""
    files, folders = [], []
    with tarfile.open(archive, "r:") as members:
        for member in members:
            name = member.name.removeprefix("./").lstrip("/")
            if member.isreg():
                files.append(File(name, archive, member.offset_data, 0 if member.issparse() else member.size))
            elif member.isdir():
                folders.append(name)
        members.fileobj.seek(members.offset)
        if members.fileobj.read(512) != bytes(512):  # tarfile takes a broken header for the end
            raise tarfile.ReadError(f"it breaks off after {len(files):,} files")
    return files, folders


def unpack(archive):
    """Unpacks NAME.tar.gz once, to NAME.tar.gz.unpacked.tar beside it, and returns that path."""
    tar = archive.with_name(f"{archive.name}.unpacked.tar")
    if tar.exists() and tar.stat().st_mtime >= archive.stat().st_mtime:
        return tar
    try:
        with (
            acquire_lock(archive.with_name(f"{archive.name}.lock")),
            archive.open("rb") as file,
            tqdm.wrapattr(file, "read", archive.stat().st_size, desc=f"unpacking {archive}", disable=None) as shown,
            gzip.open(shown) as unpacked,
            atomic_write(tar) as part,
            part.open("wb") as target,
        ):
            shutil.copyfileobj(unpacked, target, 1 << 20)
    except gzip.BadGzipFile:  # an OSError, too
        raise
    except OSError as error:
        reason = f"{archive} cannot be unpacked beside itself ({error.strerror})"
        raise UserError(f"{reason}; unpack it elsewhere, and give the folder by --data") from None
    return tar


def read_bytes(file):
    """The content of a file."""
    with file.path.open("rb") as source:
        source.seek(file.offset)
        return source.read(file.size)
