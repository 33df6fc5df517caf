"""Files are written to a temporary name beside the target and renamed: never half a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cactus_edge.errors import OutputError, UsageError


def refuse_existing(path: Path, force: bool) -> None:
    """Raise OutputError when ``path`` exists and ``force`` is not given; call it before work."""
    try:
        exists = path.exists() or path.is_symlink()
        if exists and not force:
            raise OutputError(f"{path} exists already; use --force to replace it")
        if exists and not path.is_file():
            raise OutputError(f"{path} is not a regular file")
        parent = path.parent
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror})") from None
    if not parent.is_dir() or not os.access(parent, os.W_OK):
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
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(mode & ~mask)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: cannot write ({error.strerror})") from None
        raise


def write(path: Path, data: bytes, *, force: bool = False, mode: int = 0o666) -> None:
    """``data`` at ``path``, all of it or nothing; see ``writing``."""
    with writing(path, force=force, mode=mode) as stream:
        stream.write(data)


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
