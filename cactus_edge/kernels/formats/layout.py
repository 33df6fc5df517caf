"""What the packers share: groups of inputs, nibbles, non-zero weights, and sizes.

Every packer is given a matrix int8 [channels, inputs] and ``offsets`` int64 [inputs], the ascending
distances in bytes of the inputs from the start of a row's window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.kernels.jit import entry

ByteArray = npt.NDArray[np.uint8]
Int8Array = npt.NDArray[np.int8]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

LINE = 64
"""Bytes of a cache line, and of the longest load."""
_LONGEST = (1 << 31) - 256
"""Offsets from a window's start are stored as int32, and so are ends of loads."""


@dataclass(frozen=True, eq=False)
class Cover:
    """Inputs in *slots* of some consecutive bytes.

    ``runs`` int64 [n, (offset, slots)] are slots without a gap. ``columns`` int64 [inputs] is where
    each input lies in all slots one behind the other; positions that no input takes have no weight.
    """

    width: int
    runs: Int64Array
    columns: Int64Array

    @property
    def slots(self) -> int:
        """How many there are."""
        return int(self.runs[:, 1].sum())

    @property
    def offsets(self) -> Int64Array:
        """Byte distance of each slot from the window's start, int64 [slots]."""
        return np.concatenate(
            [
                np.zeros(0, np.int64),
                *(begin + self.width * np.arange(count) for begin, count in self.runs.tolist()),
            ]
        )

    @property
    def reach(self) -> int:
        """Bytes from the window's start that a kernel reads."""
        return int((self.runs[:, 0] + self.width * self.runs[:, 1]).max(initial=0))


def cover(offsets: Int64Array, width: int) -> Cover:
    """Slots of ``width`` bytes for inputs at ascending offsets.

    A gap that is shorter than a slot is read over: skipping it would save no slot.
    """
    if not offsets.size:
        return Cover(width, np.zeros((0, 2), np.int64), np.zeros(0, np.int64))
    starts = np.flatnonzero(np.concatenate([[True], np.diff(offsets) > width]))
    counts = np.diff(np.concatenate([starts, [offsets.size]]))
    inside = offsets - np.repeat(offsets[starts], counts)
    slots = inside[starts + counts - 1] // width + 1
    before = np.cumsum(slots) - slots
    return Cover(
        width,
        np.stack([offsets[starts], slots], axis=1),
        inside + np.repeat(width * before, counts),
    )


def spread(matrix: Int8Array, places: Cover, channels: int) -> Int8Array:
    """The matrix with a column for each byte of each slot, and ``channels`` rows, zeros added."""
    depth = places.slots * places.width
    if matrix.shape == (channels, depth):  # every column is at its place already
        return np.ascontiguousarray(matrix)
    spread_out = np.zeros((channels, depth), np.int8)
    spread_out[: len(matrix), places.columns] = matrix
    return spread_out


def check_offsets(offsets: Int64Array) -> None:
    """Check that offsets can be stored as int32.

    Raises:
        UnsupportedModelError: the window is 2 GB long.
    """
    if offsets.size and offsets[-1] >= _LONGEST:
        raise UnsupportedModelError(
            f"a layer reads inputs that are {offsets[-1]} bytes apart; kernels reach {_LONGEST}"
        )


def groups_of(channels: int, size: int) -> int:
    """Groups of ``size`` that hold so many channels."""
    return -(-channels // size)


def nibbles(even: Int8Array, odd: Int8Array) -> Int8Array:
    """Two arrays of weights in [-8, 7] as one: ``even`` in the low halves of the bytes.

    As signed bytes, ``byte << 4`` is 16 times the even weight and ``byte & 0xF0`` the odd one's.
    """
    return ((even.view(np.uint8) & 15) | (odd.view(np.uint8) << 4)).view(np.int8)


def closed(values: npt.NDArray[np.generic], tail: int = 0) -> ByteArray:
    """The bytes of an array, then zeros: at least ``tail``, up to a whole number of lines."""
    content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    size = -(-(content.size + tail) // LINE) * LINE
    if size == content.size:
        return content
    return np.concatenate([content, np.zeros(size - content.size, np.uint8)])


@dataclass(frozen=True, eq=False)
class Rows:
    """Non-zero weights, row by row.

    ``starts`` int64 [channels + 2]: where each channel's begin in the arrays below; the channel
    behind the last one has none and stands for padding. ``positions`` int32: the offset of the
    input of each, ascending in a channel; ``values`` int8.
    """

    starts: Int64Array
    positions: Int32Array
    values: Int8Array

    @property
    def counts(self) -> Int64Array:
        """Non-zero weights of each channel, int64 [channels]."""
        return np.diff(self.starts)[:-1]


def nonzero_rows(matrix: Int8Array, offsets: Int64Array) -> Rows:
    """The non-zero weights of a matrix.

    Raises:
        UnsupportedModelError: the window is 2 GB long.
    """
    check_offsets(offsets)
    counts = np.count_nonzero(matrix, axis=1)
    starts = np.concatenate([[0], np.cumsum(counts), [counts.sum()]]).astype(np.int64)
    # One more than there are: see ``_collect``.
    positions = np.zeros(starts[-1] + 1, np.int32)
    values = np.zeros(starts[-1] + 1, np.int8)
    # A copy, because compiled code is made once more for what cannot be written.
    _collect(np.array(matrix, order="C"), offsets.astype(np.int32), positions, values)
    return Rows(starts, positions[:-1], values[:-1])


@entry
def _collect(
    matrix: Int8Array, offsets: Int32Array, positions: Int32Array, values: Int8Array
) -> None:
    """Every weight is written, and overwritten if it was zero: no branch to mispredict."""
    end = 0
    for channel in range(len(matrix)):
        row = matrix[channel]
        for i in range(len(row)):
            positions[end] = offsets[i]
            values[end] = row[i]
            end += row[i] != 0
