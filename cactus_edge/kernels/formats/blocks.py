"""Blocks of some channels times four input bytes: a dense kernel that skips the zero blocks.

::

    group of C channels     offsets    weights
      step 0   zero         4          | channel 0: wwww | channel 1: wwww | ... C - 1
      step 1   block        12         | channel 0: wwww | channel 1: wwww | ... C - 1
      step 2   zero
      step 3   block

Made for weights that were pruned in such blocks; ``share`` tells whether these were.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge.kernels.formats.layout import (
    ByteArray,
    Int8Array,
    Int32Array,
    Int64Array,
    check_offsets,
    closed,
    cover,
    groups_of,
    spread,
)

STEP = 4


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed weights.

    Attributes:
        weights: uint8, in order [group][block of the group][channel of the group][4].
        offsets: int32 [blocks], byte offset from the window's start of each block's inputs.
        counts: int32 [groups], blocks of each group.
        channels: output channels of a group.
        share: blocks that are not zero, of all.
        reach: bytes from the start of a window that a kernel reads.
    """

    weights: ByteArray
    offsets: Int32Array
    counts: Int32Array
    channels: int
    share: float
    reach: int


def pack_blocks(matrix: Int8Array, offsets: Int64Array, channels: int) -> Blocks:
    """Pack a matrix.

    Args:
        matrix: int8 [channels of the layer, inputs].
        offsets: int64 [inputs], ascending byte offsets from the window's start.
        channels: of a group.

    Raises:
        UnsupportedModelError: the window is 2 GB long.
    """
    check_offsets(offsets)
    places = cover(offsets, STEP)
    groups = groups_of(len(matrix), channels)
    parts = spread(matrix, places, groups * channels)
    parts = parts.reshape(groups, channels, places.slots, STEP)
    words = np.ascontiguousarray(parts).view(np.int32)[..., 0]
    present = words.any(axis=1)
    group, slot = np.nonzero(present)
    starts = places.offsets[slot]
    return Blocks(
        weights=closed(words[group, :, slot]),
        offsets=starts.astype(np.int32),
        counts=np.count_nonzero(present, axis=1).astype(np.int32),
        channels=channels,
        share=group.size / max(present.size, 1),
        reach=int(starts.max(initial=-STEP)) + STEP,
    )


def block_share(matrix: Int8Array, offsets: Int64Array, channels: int) -> float:
    """The ``share`` that ``pack_blocks`` finds, without packing."""
    places = cover(offsets, STEP)
    slots = places.columns // STEP
    groups = groups_of(len(matrix), channels)
    stored = 0
    for begin in range(0, len(matrix), channels):
        stored += np.unique(slots[matrix[begin : begin + channels].any(axis=0)]).size
    return stored / max(groups * places.slots, 1)
