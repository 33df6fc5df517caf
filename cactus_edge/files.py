"""Files are written to a temporary name beside the target and renamed: never half a file.

Also where the power fails: the content is on the disk before the name is.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

from cactus_edge.errors import OutputError, UsageError

_log = logging.getLogger(__name__)


def refuse_existing(path: Path, force: bool) -> None:
    """Raise OutputError when ``path`` exists and ``force`` is not given; call it before work."""
    try:
        exists = path.exists() or path.is_symlink()
        if exists and path.is_dir():
            raise OutputError(f"{path} is a folder; give the name of a file")
        if exists and not path.is_file():
            raise OutputError(f"{path} is not a regular file")
        if exists and not force:
            raise OutputError(f"{path} exists already; use --force to replace it")
        parent = path.parent
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror})") from None
    if not parent.is_dir():
        raise OutputError(f"{path}: cannot write, {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{path}: cannot write in {parent}")


@contextmanager
def writing(path: Path, *, force: bool = False, mode: int = 0o666) -> Generator[BinaryIO]:
    """A binary stream whose content appears at ``path`` only when the block ends without error.

    ``mode``: the permissions, from which the process's mask takes away.

    Raises:
        OutputError: ``path`` exists and ``force`` is not given, or it cannot be written.
    """
    refuse_existing(path, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror})") from None
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(descriptor)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(mode & ~mask)
        if force or not _linked(temporary, path):
            temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: cannot write ({error.strerror})") from None
        raise


def _linked(temporary: Path, path: Path) -> bool:
    """Name the file ``path``, unless another process was faster; False: no links here."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise OutputError(f"{path} was made by another process meanwhile; use --force") from None
    except OSError as error:  # a file system without links, such as FAT
        _log.info("%s: cannot be linked (%s)", path, error.strerror)
        return False
    temporary.unlink()
    return True


def write(path: Path, data: bytes, *, force: bool = False, mode: int = 0o666) -> None:
    """``data`` at ``path``, all of it or nothing; see ``writing``."""
    with writing(path, force=force, mode=mode) as stream:
        stream.write(data)


@contextmanager
def owning(folder: Path) -> Generator[None]:
    """``folder``, made if needed, for this process alone; it is free again when the process ends.

    Raises:
        OutputError: another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be used as a folder ({error.strerror})") from None
    try:
        if descriptor is not None and not own(descriptor, folder):
            raise OutputError(
                f"{folder}: another process is writing there; wait for it, stop it, or give "
                "another folder"
            )
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def own(descriptor: int, path: Path) -> bool:
    """Take an open file or folder for this process, until it is closed; False: another has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks, such as some network shares
        _log.info("%s: cannot be locked (%s)", path, error.strerror)
    return True


def read(path: Path, what: str) -> bytes:
    """The bytes of ``path``.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such {what}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot read the {what} ({error.strerror})") from None
