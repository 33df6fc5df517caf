"""Bit mask and non-zero weights: for layers whose weights stream from memory, half of them zero.

::

    group of 16 channels, step of 4 input bytes: 64 weights
      mask    1011 0000 0100 ...   bit 4 * channel + byte, lowest first
      values  w ww       w   ...   only where the bit is 1

A kernel loads 64 bytes where the step's values begin, expands them by the mask, and goes on by as
many bytes as the mask has ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cactus_edge.kernels.formats.layout import (
    LINE,
    ByteArray,
    Int8Array,
    Int64Array,
    closed,
    cover,
    groups_of,
    spread,
)

CHANNELS = 16
STEP = 4


@dataclass(frozen=True, eq=False)
class Bitmask:
    """Packed weights.

    Attributes:
        masks: uint64 [groups, steps].
        values: uint8, non-zero weights in order [group][step][channel][byte], then at least a line
            of zeros, because 64 bytes are loaded for the last step too.
        starts: int64 [groups], where each group's values begin.
        runs: int64 [n, (offset, steps)] of four input bytes, the same for all groups.
        reach: bytes from the start of a window that a kernel reads.
    """

    masks: npt.NDArray[np.uint64]
    values: ByteArray
    starts: Int64Array
    runs: Int64Array
    reach: int


def pack_bitmask(matrix: Int8Array, offsets: Int64Array) -> Bitmask:
    """Pack a matrix.

    Args:
        matrix: int8 [channels of the layer, inputs].
        offsets: int64 [inputs], ascending byte offsets from the window's start.
    """
    places = cover(offsets, STEP)
    groups = groups_of(len(matrix), CHANNELS)
    parts = spread(matrix, places, groups * CHANNELS)
    parts = parts.reshape(groups, CHANNELS, places.slots, STEP)
    ordered = np.ascontiguousarray(parts).view(np.int32)[..., 0].transpose(0, 2, 1)
    weights = np.ascontiguousarray(ordered).view(np.int8)
    present = weights != 0
    counts = np.count_nonzero(present.reshape(groups, -1), axis=1)
    masks = np.packbits(present, axis=-1, bitorder="little")
    return Bitmask(
        masks=masks.view("<u8").reshape(groups, places.slots).astype(np.uint64, copy=False),
        values=closed(weights[present], LINE),
        starts=(np.cumsum(counts) - counts).astype(np.int64),
        runs=places.runs,
        reach=places.reach,
    )
