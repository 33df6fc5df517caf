"""Large arrays stay in their ``.npz`` file: members that are not packed are mapped, not read.

What is mapped is compared with the archive's checksum once, in blocks. Its pages are then given
back, and come again as they are used: a split of any size takes the memory of the part in use.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

LEAST = 1 << 24
"""Bytes of an array that is mapped; smaller ones are read."""
_BLOCK = 1 << 20
_LOCAL_HEADER = 30  # bytes before the member's name, of which the last four are two lengths
_ENCRYPTED = 1


def mapped(path: Path, archive: ZipFile, member: str) -> npt.NDArray[np.generic] | None:
    """An array of an archive as a read-only view of the file.

    Args:
        path: the archive's.
        archive: opened.
        member: name of the ``.npy`` in it.

    Returns:
        None where it has to be read: packed, small, in Fortran order, or not what its header says.

    Raises:
        OSError: the file cannot be mapped.
        ValueError: no array, one that is cut off, or bytes that the archive's checksum is not of.
    """
    info = archive.getinfo(member)
    plain = info.compress_type == ZIP_STORED and not info.flag_bits & _ENCRYPTED
    if not plain or info.file_size < LEAST:
        return None
    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            return None
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        header = stream.tell()
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if fortran or dtype.hasobject or header + size != info.file_size:
        return None
    with path.open("rb") as file:
        file.seek(info.header_offset)
        lengths = file.read(_LOCAL_HEADER)[-4:]
        start = info.header_offset + _LOCAL_HEADER
        start += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content = np.frombuffer(whole, np.uint8)[start : start + info.file_size]
    checksum = 0
    for block in blocks(content):
        checksum = zlib.crc32(block, checksum)
    if checksum != info.CRC:
        raise ValueError(f"Bad CRC-32 for file '{member}'")
    return np.frombuffer(whole, dtype, size // dtype.itemsize, start + header).reshape(shape)


def mapping(array: npt.NDArray[np.generic]) -> mmap.mmap | None:
    """The mapped file behind an array; None where the array is in memory."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None


def blocks(array: npt.NDArray[np.generic]) -> Iterator[memoryview]:
    """The bytes of an array in C order; of a mapped one no more than a block is in memory."""
    if mapping(array) is None or not array.flags.c_contiguous:
        yield np.ascontiguousarray(array).data
        return
    content = array.reshape(-1).view(np.uint8)
    for begin in range(0, content.size, _BLOCK):
        yield content[begin : begin + _BLOCK].data
        forget(array)


def forget(array: npt.NDArray[np.generic]) -> None:
    """Give the pages of a mapped file back; where that cannot be said, the system decides."""
    whole = mapping(array)
    if whole is not None and hasattr(mmap, "MADV_DONTNEED"):
        whole.madvise(mmap.MADV_DONTNEED)
