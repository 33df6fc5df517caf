"""Gzip files and tape archives of strangers, in bounded memory and time.

The standard library's readers follow links, believe sizes and read headers of any length, some of
them in quadratic time; the published data sets need none of that.

References: RFC 1952; POSIX.1-1988 ``ustar``.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection

_GZIP = 31  # of zlib: a gzip header and the largest window
_SPARE = 30 << 20  # bytes
_BLOCK = 512
_MOST_MEMBERS = 64
_REGULAR = (b"0", b"\0")


def unpacked(content: bytes) -> bytes:
    """What one gzip member holds.

    Raises:
        ValueError: damaged, cut off, followed by something, or larger than twice its file and
            30 MiB, which no published data set is.
    """
    limit = 2 * len(content) + _SPARE
    machine = zlib.decompressobj(_GZIP)
    try:
        found = machine.decompress(content, limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(found) > limit:
        raise ValueError(f"unpacks to more than {limit} bytes")
    if not machine.eof or machine.unused_data:
        raise ValueError("the gzip file is cut off, or something follows it")
    return found


def members(archive: bytes, wanted: Collection[str]) -> dict[str, bytes]:
    """Regular files of a tape archive, by name.

    Raises:
        ValueError: no such archive, or it lacks one of the names.
    """
    found: dict[str, bytes] = {}
    at = 0
    for _ in range(_MOST_MEMBERS):
        header = archive[at : at + _BLOCK]
        if len(header) < _BLOCK or not any(header):
            break
        size = _octal(header[124:136])
        stated, blank = _octal(header[148:156]), header[:148] + b" " * 8 + header[156:]
        if header[257:262] != b"ustar" or stated != sum(blank):
            raise ValueError(f"no header of a tape archive at {at}")
        at += _BLOCK
        name = header[:100].rstrip(b"\0").decode("utf-8", "replace")
        if name in wanted and header[156:157] in _REGULAR and at + size <= len(archive):
            found[name] = archive[at : at + size]
        at += -(-size // _BLOCK) * _BLOCK
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(f"holds no whole regular file {missing[0]}")
    return found


def _octal(text: bytes) -> int:
    """A number of a header, not negative."""
    digits = text.strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        raise ValueError(f"{text!r} is no number of a tape archive")
    return int(digits, 8)
