"""Certificates as streams: written and read line by line, in constant memory.

Contract of the file: a head, one line for each sample, a tail, each ended by one newline; nothing
before, between or behind. The reader refuses whatever is longer than a line may be before it
decodes it, and says which line is wrong. It does not judge the claim: that is ``check``'s.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cactus_edge.certificate import (
    FORMAT,
    LINE_LIMIT,
    VERSION,
    Brief,
    Head,
    Sample,
    Summary,
    Tail,
    Tally,
    head_of,
    line_of,
    sample_of,
    tail_of,
)
from cactus_edge.errors import DataError, UsageError

__all__ = ["Certificate", "Reader", "Writer", "load", "reading", "write"]

_VERSIONED = re.compile(rb'\{"format":"([^"\\]{1,60})","version":(\d{1,9})[,}]')
TAIL = b'{"summary":'
"""What a tail begins with, and no sample."""


class Writer:
    """Appends lines to a binary stream; the same samples make the same bytes.

    Attributes:
        tally: what was written so far.
    """

    def __init__(self, stream: BinaryIO, head: Head, *, resumed: bool = False) -> None:
        """Write the first line; ``resumed``: the stream has it already."""
        self._stream = stream
        self._attacked = bool(head.search.attack)
        self.tally = Tally()
        line = line_of(head)
        if len(line) > LINE_LIMIT:
            raise UsageError(f"the certificate's head takes {len(line)} bytes, over {LINE_LIMIT}")
        self.tally.head(line)
        if not resumed:
            stream.write(line)

    def recall(self, line: bytes) -> Brief:
        """Take in a sample's line that the stream has already.

        Raises:
            DataError: it is no sample.
        """
        return self.tally.sample(line)

    def append(self, line: bytes) -> Brief:
        """Write a sample's line, newline included.

        Raises:
            DataError: it is no sample, or too long.
        """
        if len(line) > LINE_LIMIT:
            raise DataError(f"a sample's line takes {len(line)} bytes, over {LINE_LIMIT}")
        brief = self.tally.sample(line)
        self._stream.write(line)
        return brief

    def finish(self) -> Summary:
        """Write the last line."""
        tail = self.tally.tail(self._attacked)
        self._stream.write(line_of(tail))
        return tail.summary


class Reader:
    """Reads a certificate once, from its head to its tail.

    Attributes:
        name: of the file, for messages.
        head: decoded when the reader is made.
        tail: known when all lines were read.
        tally: what the lines that were read amount to.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        """Read the head.

        Raises:
            DataError: the stream does not begin with the head of a certificate of this version.
        """
        self._stream = stream
        self._number = 0
        self.name = name
        self.tail: Tail | None = None
        self.tally = Tally()
        line = self._line()
        if line.rstrip() == b"{":
            raise DataError(
                f"{name}: not a certificate, whose lines are one JSON object each; a "
                "certificate.json beside a model has its head and summary only, and the model's "
                "README.md says how to make the certificate"
            )
        versioned = _VERSIONED.match(line)
        if versioned and (versioned[1], int(versioned[2])) != (FORMAT.encode(), VERSION):
            raise DataError(
                f"{name}: {versioned[1].decode(errors='replace')!r} version {int(versioned[2])}; "
                f"this tool reads {FORMAT!r} version {VERSION}; certify again"
            )
        try:
            self.head = head_of(line)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        if (self.head.format, self.head.version) != (FORMAT, VERSION):
            raise DataError(f"{name}: not a certificate: format {self.head.format!r}")
        self.tally.head(line)

    def lines(self) -> Iterator[bytes]:
        """The samples' lines, as bytes with their newline; afterwards ``tail`` is known.

        Raises:
            DataError: a line is no sample, too long or cut off, the tail is missing, or something
                follows it.
        """
        while not (line := self._line()).startswith(TAIL):
            try:
                self.tally.sample(line)
            except DataError as error:
                raise DataError(f"{self._where()}: {error}") from None
            yield line
        try:
            self.tail = tail_of(line)
        except DataError as error:
            raise DataError(f"{self._where()}: {error}") from None
        if self._stream.read(1):
            raise DataError(f"{self._where()}: something follows the certificate's tail")

    def samples(self) -> Iterator[Sample]:
        """The samples, decoded; see ``lines``."""
        for line in self.lines():
            try:
                sample = sample_of(line)
            except DataError as error:
                raise DataError(f"{self._where()}: {error}") from None
            yield sample

    def problems(self) -> list[str]:
        """What of the tail does not follow from the lines; call it when all lines were read."""
        assert self.tail is not None, "not all lines were read"
        found: list[str] = []
        if self.tail.digest != self.tally.digest(self.tail.summary):
            found.append("digest: the certificate was changed after it was written")
        if self.tail.summary != self.tally.summary(bool(self.head.search.attack)):
            found.append("summary: does not follow from the samples")
        return found

    def _where(self) -> str:
        return f"{self.name}: line {self._number}"

    def _line(self) -> bytes:
        line = read_line(self._stream)
        self._number += 1
        if line is None:
            raise DataError(f"{self._where()}: longer than {LINE_LIMIT} bytes, not a certificate")
        if not line.endswith(b"\n"):
            what = "is cut off" if line else "is missing: the certificate has no end"
            if self._number == 1:
                what = "is no head: not a certificate"
            raise DataError(f"{self._where()} {what}")
        return line


def read_line(stream: BinaryIO) -> bytes | None:
    """The next line, without newline where the stream ends before one; None: it is too long."""
    line = stream.readline(LINE_LIMIT + 1)
    return line if len(line) <= LINE_LIMIT else None


@contextmanager
def reading(path: Path) -> Generator[Reader]:
    """A reader of a certificate's file.

    Raises:
        UsageError: the file cannot be read.
        DataError: it is not a certificate of this version.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such certificate") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot read the certificate ({error.strerror})") from None
    with stream:
        yield Reader(stream, str(path))


@dataclass(frozen=True)
class Certificate:
    """A certificate that is small enough to be held in memory."""

    head: Head
    samples: tuple[Sample, ...]
    tail: Tail


def load(path: Path) -> Certificate:
    """Read a whole certificate into memory.

    Raises:
        UsageError: the file cannot be read.
        DataError: it is not a whole certificate of this version.
    """
    with reading(path) as reader:
        samples = tuple(reader.samples())
        assert reader.tail is not None
        return Certificate(reader.head, samples, reader.tail)


def write(stream: BinaryIO, head: Head, samples: Iterable[Sample]) -> Summary:
    """Write a whole certificate of samples that come one by one."""
    writer = Writer(stream, head)
    for sample in samples:
        writer.append(line_of(sample))
    return writer.finish()
