"""Dense weights: a kernel broadcasts four input bytes and multiplies them for C channels at once.

::

    inputs of a window     runs                    weights of a group, one step behind the other
    ####### ... #####      (offset 0, steps 2)     | channel 0: wwww | channel 1: wwww | ... C - 1
       7     gap  5        (offset o, steps 2)     | channel 0: www0 | channel 1: www0 | ... C - 1
                                                   | ...

A step is four consecutive bytes. As nibbles a step is eight, and a byte holds a weight of each of
its halves: ``byte << 4`` is 16 times the weight of the first four inputs, ``byte & 0xF0`` that of
the last four, so that accumulators are 16 times too large and need 16 times the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge.kernels.formats.layout import (
    ByteArray,
    Int8Array,
    Int64Array,
    closed,
    cover,
    groups_of,
    nibbles,
    spread,
)

STEP = 4


@dataclass(frozen=True, eq=False)
class Dense:
    """Packed weights.

    Attributes:
        weights: uint8, in order [group][step of all runs][channel of the group][4].
        runs: int64 [n, (offset, steps)], the same for all groups.
        groups: how many; the channels that fill up the last one have zero weights.
        channels: output channels of a group.
        steps: of all runs.
        step_bytes: input bytes of a step: 4, 8 for nibbles, or four for each phase.
        nibbles: whether a byte holds two weights.
        reach: bytes from the start of a window that a kernel reads.
    """

    weights: ByteArray
    runs: Int64Array
    groups: int
    channels: int
    steps: int
    step_bytes: int
    nibbles: bool
    reach: int


def pack_dense(
    matrix: Int8Array,
    offsets: Int64Array,
    channels: int,
    *,
    nibble: bool = False,
    phases: int = 1,
) -> Dense:
    """Pack a matrix.

    Args:
        matrix: int8 [channels of the layer, inputs]; in [-8, 7] for nibbles.
        offsets: int64 [inputs], ascending byte offsets from the window's start.
        channels: of a group, the lanes of a register times the registers of a tile.
        nibble: two weights in a byte.
        phases: four bytes each, so many of which a kernel takes in a turn; even for nibbles, where
            1 stands for 2.
    """
    phases = max(phases, 2 if nibble else 1)
    step = STEP * phases
    places = cover(offsets, step)
    groups = groups_of(len(matrix), channels)
    parts = spread(matrix, places, groups * channels).reshape(groups, channels, -1, phases, STEP)
    # Transposed as int32: four weights at a time.
    ordered = np.ascontiguousarray(parts).view(np.int32)[..., 0].transpose(0, 2, 3, 1)
    words = np.ascontiguousarray(ordered).view(np.int8)
    if nibble:
        words = nibbles(words[:, :, 0::2], words[:, :, 1::2])
    return Dense(
        weights=closed(words),
        runs=places.runs,
        groups=groups,
        channels=channels,
        steps=places.slots,
        step_bytes=step,
        nibbles=nibble,
        reach=places.reach,
    )
