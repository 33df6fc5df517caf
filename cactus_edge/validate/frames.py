"""Frames of the console's protocol, see docs/console.md: bytes on the line, and back.

A frame is a header (kind, status, sequence number, length of the payload), the payload and a
CRC-32, stuffed so that no byte of it is zero, and a zero behind it. So a receiver that lost its
place finds the next frame behind the next zero, and needs no clock for that.

Source: Cheshire and Baker, "Consistent Overhead Byte Stuffing", IEEE/ACM Transactions on Networking
7(2), 1999.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

_HEADER = struct.Struct("<BBHI")
_CRC = struct.Struct("<I")
_LONGEST = 254
OVERHEAD_BYTES = _HEADER.size + _CRC.size + 3
"""What a frame has on the line beside its payload and one byte for each 254."""


@dataclass(frozen=True)
class Frame:
    """``kind`` and ``status`` are bytes, ``sequence`` has 16 bits."""

    kind: int
    sequence: int
    payload: bytes = b""
    status: int = 0


def encode(frame: Frame) -> bytes:
    """On the line, the zero behind it included."""
    content = _HEADER.pack(frame.kind, frame.status, frame.sequence, len(frame.payload))
    content += frame.payload
    return _stuffed(content + _CRC.pack(zlib.crc32(content))) + b"\0"


def decode(stuffed: bytes) -> Frame | None:
    """What stood before a zero; None if it is no frame."""
    content = _unstuffed(stuffed)
    if content is None or len(content) < _HEADER.size + _CRC.size:
        return None
    content, crc = content[: -_CRC.size], content[-_CRC.size :]
    kind, status, sequence, length = _HEADER.unpack_from(content)
    payload = content[_HEADER.size :]
    if _CRC.unpack(crc)[0] != zlib.crc32(content) or length != len(payload):
        return None
    return Frame(kind, sequence, payload, status)


def _stuffed(content: bytes) -> bytes:
    parts: list[bytes] = []
    for run in content.split(b"\0"):
        full = len(run) // _LONGEST * _LONGEST
        parts += [b"\xff" + run[n : n + _LONGEST] for n in range(0, full, _LONGEST)]
        parts.append(bytes([len(run) - full + 1]) + run[full:])
    return b"".join(parts)


def _unstuffed(stuffed: bytes) -> bytes | None:
    parts: list[bytes] = []
    position = 0
    while position < len(stuffed):
        code = stuffed[position]
        block = stuffed[position + 1 : position + code]
        if code == 0 or len(block) != code - 1:
            return None
        position += code
        parts.append(block)
        if code != _LONGEST + 1 and position < len(stuffed):
            parts.append(b"\0")
    return b"".join(parts)


class Decoder:
    """Frames from bytes as they come; ``discarded`` counts bytes that were part of none.

    What grows beyond ``limit`` bytes without a zero is given up, so that a line that never stops
    takes no memory.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open = bytearray()
        self.discarded = 0

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that end in ``data``."""
        frames: list[Frame] = []
        *ended, rest = data.split(b"\0")
        for part in ended:
            stuffed = bytes(self._open) + part
            self._open.clear()
            frame = decode(stuffed)
            if frame is not None:
                frames.append(frame)
            else:
                self.discarded += len(stuffed)
        self._open += rest
        if len(self._open) > self._limit:
            self.discarded += len(self._open)
            self._open.clear()
        return frames
