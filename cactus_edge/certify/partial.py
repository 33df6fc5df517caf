"""A certificate under way: ``OUTPUT.partial``, renamed to ``OUTPUT`` when it is whole.

What is in it is always a beginning of the finished file, cut anywhere if the machine went down; so
a run that was stopped goes on behind the last whole line, and ends with the same bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cactus_edge import files
from cactus_edge.certificate import Head, line_of, sample_of
from cactus_edge.certificate_stream import TAIL, Writer, read_line
from cactus_edge.errors import DataError, OutputError

_log = logging.getLogger(__name__)


def partial_of(output: Path) -> Path:
    """Where a certificate is kept until it is whole."""
    return output.with_name(output.name + ".partial")


def refuse(output: Path, *, resume: bool, force: bool) -> None:
    """Raise OutputError where a certificate could not be written; call it before any work."""
    files.refuse_existing(output, force)
    partial = partial_of(output)
    files.refuse_existing(partial, force or resume)


@contextmanager
def resumable(
    output: Path, head: Head, *, resume: bool, force: bool
) -> Generator[tuple[Writer, Callable[[], None]]]:
    """A writer of ``output`` and a function that makes sure of what it has written so far.

    Where the block ends without an error, the file is at ``output``; otherwise what there is stays
    in the partial file, but not after a DataError, which says that the samples are wrong. With
    ``resume`` the writer's tally tells how many samples are done.

    Raises:
        OutputError: a file is in the way, or cannot be written.
        DataError: the partial file is about something else, or is damaged.
    """
    refuse(output, resume=resume, force=force)
    partial = partial_of(output)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        stream = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise OutputError(f"{partial}: cannot write ({error.strerror})") from None
    if not (files.own(stream.fileno(), partial) and _is_at(stream, partial)):
        stream.close()
        raise OutputError(f"{partial}: another process is writing it; wait for it, or stop it")
    if not resume:
        stream.truncate()
    writer: Writer | None = None
    try:
        with stream:

            def secure() -> None:
                stream.flush()
                os.fsync(stream.fileno())

            writer = recover(stream, head, str(partial))
            yield writer, secure
            secure()
        partial.replace(output)
    except BaseException as error:
        # Nothing that could be resumed: no samples, or others than those that the head names.
        if writer is not None and (writer.tally.samples == 0 or isinstance(error, DataError)):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{partial}: cannot write ({error.strerror})") from None
        raise


def _is_at(stream: BinaryIO, path: Path) -> bool:
    """False where the file was renamed or removed before it could be taken."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def recover(stream: BinaryIO, head: Head, name: str) -> Writer:
    """A writer that goes on behind the last whole sample of ``stream``; torn rests are cut off.

    Raises:
        DataError: the stream is about something else, or is damaged before its last line.
    """
    line = read_line(stream)
    if line is not None and not line.endswith(b"\n") and line_of(head).startswith(line):
        stream.seek(0)
        stream.truncate()
        return Writer(stream, head)
    if line is None or line != line_of(head):
        raise DataError(
            f"{name}: was begun with other arguments, models, data or another version; resume with "
            "the same ones, or start again with --force"
        )
    writer = Writer(stream, head, resumed=True)
    end = len(line)
    first, count = (head.data.first, head.data.count) if head.data else (0, 0)
    while (line := read_line(stream)) is not None:
        if not line.endswith(b"\n") or line.startswith(TAIL):
            break
        done = writer.tally.samples
        try:
            index = sample_of(line).index
            writer.recall(line)
        except DataError as error:
            raise DataError(f"{name}: line {done + 2}: {error}; start again with --force") from None
        if index != first + done or done >= count:
            raise DataError(
                f"{name}: line {done + 2} is sample {index}, expected {first + done} of "
                f"{first}..{first + count - 1}; start again with --force"
            )
        end += len(line)
    stream.seek(end)
    stream.truncate()
    _log.info("%s: %d samples are done already", name, writer.tally.samples)
    return writer
