"""The host's end of a board's console: requests, answers, time-outs and repetition.

A request may be sent again at any time: each does the same every time. An answer counts only with
a sequence number that this request was sent with, so those of earlier requests are dropped.
"""

from __future__ import annotations

import importlib
import struct
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cactus_edge.csource.console import ANSWER, PROTOCOL, Feature, Kind, Status
from cactus_edge.errors import MissingExtraError, ToolError, UsageError, counted
from cactus_edge.graph import BoolArray, Int64Array
from cactus_edge.validate.frames import OVERHEAD_BYTES, Decoder, Frame, encode

BAUD = 115_200
TIMEOUT = 10.0
ATTEMPTS = 5
_REPEAT = 1.0  # a board that restarts when its port is opened misses the first requests
_HELLO = struct.Struct("<HHIIIIIIII")
_FINGERPRINT = 64
_BITS_A_BYTE = 10
_GRACE = 0.5
_POLL = 0.1  # seconds; to change it port by port would renegotiate rfc2217:// each time


class Line(Protocol):
    """What pyserial's ports offer, as far as it is used here."""

    @property
    def in_waiting(self) -> int: ...  # noqa: D102

    def read(self, size: int, /) -> bytes: ...  # noqa: D102

    def write(self, data: bytes, /) -> int | None: ...  # noqa: D102


@dataclass(frozen=True)
class Hello:
    """What a board says about itself; sizes in bytes, ``tick_rate`` in Hz, 0 without a counter."""

    features: Feature
    input_bytes: int
    output_bytes: int
    layers: int
    arena_bytes: int
    arena_lower_bound: int
    table_bytes: int
    crc32: int
    tick_rate: int
    fingerprint: str
    profile: str


@dataclass(frozen=True)
class Verdict:
    """Of one input: stored logits and their bounds, ``leads`` and ``margins`` int64 [classes]."""

    ticks: int
    label: int
    certified: bool
    logits: bytes
    lower: bytes
    upper: bytes
    leads: Int64Array
    margins: Int64Array


@contextmanager
def opened(url: str, baud: int = BAUD) -> Generator[Line]:
    """A serial port by its path, or by one of pyserial's URLs (``socket://``, ``rfc2217://``).

    Raises:
        MissingExtraError: pyserial is not installed.
        UsageError: the port cannot be opened.
        ToolError: the port failed while it was used.
    """
    try:
        serial = importlib.import_module("serial")
    except ModuleNotFoundError:
        raise MissingExtraError("pyserial", "serial", "Talking to a board") from None
    try:
        port = serial.serial_for_url(url, baudrate=baud, timeout=_POLL)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{url}: cannot open the port at {baud} baud ({error}); is the board connected, and "
            "may this user read and write the port?"
        ) from None
    try:
        yield port
    except OSError as error:
        raise ToolError(
            f"{url}: the connection failed ({error}); is the board connected?"
        ) from None
    finally:
        port.close()


class Console:
    """One board at the other end of a line; ``repeated`` counts requests that were sent again."""

    def __init__(
        self,
        line: Line,
        name: str,
        *,
        baud: int = BAUD,
        timeout: float = TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Talk over ``line``.

        Args:
            line: an open port.
            name: of the port, for messages.
            baud: bits a second, by which the time of long answers is reckoned.
            timeout: seconds without an answer, beside the time that the bytes take.
            clock: seconds, rising.
        """
        self._line, self._name = line, name
        self._baud, self._timeout, self._clock = baud, timeout, clock
        self._decoder = Decoder(1 << 24)
        self._sequence = 0
        self.repeated = 0

    def hello(self) -> Hello:
        """Who is there.

        Raises:
            ToolError: nobody, or one that speaks another protocol.
        """
        payload = self._ask(Kind.HELLO, b"", 512).payload
        version = int.from_bytes(payload[:2], "little")
        if version != PROTOCOL:
            raise ToolError(
                f"{self._name}: the board speaks version {version} of the protocol, this is "
                f"version {PROTOCOL}; export the firmware again with this version of cactus-edge"
            )
        text = payload[_HELLO.size :].decode("ascii", "replace")
        if len(text) < _FINGERPRINT:
            raise ToolError(f"{self._name}: an answer to HELLO of {counted(len(payload), 'byte')}")
        _, features, *numbers = _HELLO.unpack_from(payload)
        return Hello(
            Feature(features),
            *numbers,
            fingerprint=text[:_FINGERPRINT],
            profile=text[_FINGERPRINT:],
        )

    def verify(self) -> bool:
        """Whether the CRC of weights and tables is the one that was generated."""
        return self._ask(Kind.VERIFY, b"", 0, {Status.OK, Status.CRC}).status == Status.OK

    def run(self, data: bytes, output_bytes: int) -> tuple[int, bytes]:
        """Ticks and stored logits of one input."""
        return self._outcome(self._ask(Kind.RUN, data, 4 + output_bytes))

    def layers(self, data: bytes, sizes: list[int]) -> tuple[bytes, list[bytes]]:
        """Stored logits, and the output of each operator, of which ``sizes`` are the bytes.

        Raises:
            ToolError: not all of them came, several times.
        """
        expected = sum(sizes) + OVERHEAD_BYTES * len(sizes)
        for _ in range(ATTEMPTS):
            found: dict[int, bytes] = {}
            frame = self._ask(Kind.LAYERS, data, 4 + sizes[-1] + expected, layers=found)
            parts = [found.get(index, b"") for index in range(len(sizes))]
            if [len(part) for part in parts] == sizes:
                return self._outcome(frame)[1], parts
            self.repeated += 1
        raise ToolError(
            f"{self._name}: layers are missing in {ATTEMPTS} answers; is the line noisy?"
        )

    def certify(self, data: bytes, levels: int, classes: int) -> Verdict:
        """What the board proves about all inputs within ``levels`` of this one."""
        request = struct.pack("<i", levels) + data
        payload = self._ask(Kind.CERTIFY, request, 12 + 15 * classes).payload
        if len(payload) != 12 + 15 * classes:
            raise ToolError(
                f"{self._name}: an answer to CERTIFY of {counted(len(payload), 'byte')}"
            )
        ticks, label, certified = struct.unpack_from("<Iii", payload)
        ends = [payload[12 + n * classes : 12 + (n + 1) * classes] for n in range(3)]
        leads = np.frombuffer(payload, "<i4", classes, 12 + 3 * classes).astype(np.int64)
        margins = np.frombuffer(payload, "<i8", classes, 12 + 7 * classes).astype(np.int64)
        return Verdict(ticks, label, certified == 1, *ends, leads=leads, margins=margins)

    def memory(self) -> tuple[int, int]:
        """Bytes of the deepest stack, and of the stack there is; 0 and 0 if it is not known."""
        payload = self._ask(Kind.MEMORY, b"", 8).payload
        used, available = struct.unpack("<II", payload.ljust(8, b"\0")[:8])
        return used, available

    def _outcome(self, frame: Frame) -> tuple[int, bytes]:
        return int.from_bytes(frame.payload[:4], "little"), frame.payload[4:]

    def _ask(
        self,
        kind: Kind,
        payload: bytes,
        answer_bytes: int,
        good: frozenset[Status] | set[Status] = frozenset({Status.OK}),
        layers: dict[int, bytes] | None = None,
    ) -> Frame:
        """The answer to a request, sent up to ``ATTEMPTS`` times; HELLO again and again."""
        before = self._decoder.discarded
        bits = _BITS_A_BYTE * (len(payload) + answer_bytes + 2 * OVERHEAD_BYTES)
        # Stuffing, the gaps between bytes and a board that sends slower than it may: twice as long.
        wait = self._timeout + 2 * bits / self._baud
        attempts, pause = ATTEMPTS, wait
        if kind is Kind.HELLO:
            pause = min(_REPEAT + 2 * bits / self._baud, wait)
            attempts = max(1, round(wait / pause))
        damaged, first = False, self._sequence + 1
        for attempt in range(attempts):
            self.repeated += attempt > 0 and kind is not Kind.HELLO
            self._sequence += 1
            # The zero before it ends whatever the board has received so far.
            request = Frame(kind, self._sequence & 0xFFFF, payload)
            self._line.write(b"\0" + encode(request))
            end = self._clock() + pause
            while self._clock() < end:
                for frame in self._decoder.feed(self._line.read(max(1, self._line.in_waiting))):
                    if frame.kind == ANSWER and frame.status == Status.FRAME:
                        # That may have been garbage before the request, whose answer then follows.
                        damaged, end = True, min(end, self._clock() + _GRACE)
                    if (frame.sequence - first) & 0xFFFF > self._sequence - first:
                        continue
                    if frame.kind == Kind.LAYER and layers is not None:
                        layers[int.from_bytes(frame.payload[:4], "little")] = frame.payload[4:]
                    if frame.kind != kind | ANSWER:
                        continue
                    if frame.status not in good:
                        named = _named(frame.status)
                        raise ToolError(f"{self._name}: {kind.name} ended with {named}")
                    return frame
        noise = self._decoder.discarded - before
        if damaged:
            what = f"{counted(attempts, 'request')} ({kind.name}) arrived damaged"
        elif noise:
            what = f"no answer to {kind.name}, but {counted(noise, 'byte')} outside of frames"
        else:
            what = f"no answer to {kind.name} within {wait:.1f} s"
        raise ToolError(
            f"{self._name}: {what}; check that the firmware with the console runs (export-c "
            f"--console), that {self._baud} baud are its speed, and the wiring"
        )


def equal(found: bytes, expected: Int64Array) -> BoolArray:
    """Element by element, of stored bytes and integers; all False for another number of them."""
    if len(found) != expected.size:
        return np.zeros(expected.shape, bool)
    stored = np.frombuffer(found, np.uint8).reshape(expected.shape)
    return stored == (expected & 0xFF)


def _named(status: int) -> str:
    try:
        return f"error {status} ({Status(status).name})"
    except ValueError:
        return f"error {status}"
