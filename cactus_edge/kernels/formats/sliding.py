"""Gathering steps for FULLY_CONNECTED: one row, so that weights stream from memory once.

::

    bases      where each step's 128 bytes of inputs begin
    stream     | 64 indices | 64 weights |                two bytes for a weight
    nibbles    | 64 indices | 64 indices | 64 bytes |     two steps, a byte and a half for a weight

The format of ``permuted`` with one register and steps of one kind, whose window is two loads at
consecutive addresses. As nibbles the weights of two steps share 64 bytes: ``byte << 4`` is 16 times
the weight of the first step, ``byte & 0xF0`` that of the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge.kernels.formats.layout import (
    LINE,
    ByteArray,
    Int8Array,
    Int32Array,
    Int64Array,
    closed,
    nibbles,
)
from cactus_edge.kernels.formats.permuted import EFFORT, Permuted, Shape, pack_permuted
from cactus_edge.kernels.formats.windows import SLOTS

WINDOW = 2 * LINE


@dataclass(frozen=True, eq=False)
class Sliding:
    """Packed weights.

    Attributes:
        lanes: channels of a group, of one register.
        window: bytes that the indices reach.
        counts: int32 [groups], steps of each group, an even number for nibbles.
        bases: int32 [steps], byte offset from the start of the row's window.
        stream: uint8 [step][2][channel of the group][4], indices and weights; for nibbles
            [two steps][3][channel of the group][4], indices of both and weights.
        order: int64 [channels], the channel of the layer at each packed position.
        nibbles: whether a byte holds two weights.
        fill: slots that hold a weight, of all.
        reach: bytes from the start of a window that a kernel reads.
    """

    lanes: int
    window: int
    counts: Int32Array
    bases: Int32Array
    stream: ByteArray
    order: Int64Array
    nibbles: bool
    fill: float
    reach: int


def pack_sliding(
    matrix: Int8Array,
    offsets: Int64Array,
    *,
    lanes: int = 16,
    window: int = WINDOW,
    alignment: int = LINE,
    nibble: bool = False,
    keep_order: bool = False,
    effort: int = EFFORT,
) -> Sliding:
    """Pack a matrix; the same one always gives the same result.

    Args:
        matrix: int8 [channels of the layer, inputs]; in [-8, 7] for nibbles.
        offsets: int64 [inputs], ascending byte offsets from the window's start.
        lanes: channels of a register.
        window: bytes that a permutation reaches, a power of two.
        alignment: windows begin at multiples of it. Whole lines are fastest while the weights stay
            in the second-level cache; beyond, fewer steps count, which 16 or 1 gives (measured on
            Zen 4 with 512 x 32768 weights, 5 to 30 % of them not zero: 2 to 7 % of the time).
        nibble: two weights in a byte.
        keep_order: leave the channels in their order, which takes more steps.
        effort: steps of a lane that the search for better groups may try.

    Raises:
        UnsupportedModelError: the window is 2 GB long.
    """
    shape = Shape(lanes=lanes, registers=1, window=window, alignment=alignment, dual=False)
    packed = pack_permuted(matrix, offsets, shape, keep_order=keep_order, effort=effort)
    counts, bases, stream = packed.counts[:, 0], packed.offsets, packed.stream
    if nibble:
        counts, bases, stream = _paired(packed)
    return Sliding(
        lanes=lanes,
        window=window,
        counts=np.ascontiguousarray(counts),
        bases=bases,
        stream=stream,
        order=packed.order,
        nibbles=nibble,
        fill=np.count_nonzero(matrix) / max(bases.size * SLOTS * lanes, 1),
        reach=packed.reach,
    )


def _paired(packed: Permuted) -> tuple[Int32Array, Int32Array, ByteArray]:
    """Counts, bases and stream for nibbles; a group with an odd number of steps gets another."""
    size = SLOTS * packed.shape.channels
    steps = packed.stream[: packed.offsets.size * 2 * size].reshape(-1, 2, size)
    counts = packed.counts[:, 0]
    odd_ends = np.cumsum(counts)[counts % 2 == 1]
    # The added steps read where the one before does, and have no weights.
    bases = np.insert(packed.offsets, odd_ends, packed.offsets[odd_ends - 1])
    steps = np.insert(steps, odd_ends, np.uint8(0), axis=0)
    indices = steps[:, 0].reshape(-1, 2 * size)
    weights = steps[:, 1].view(np.int8)
    pairs = nibbles(weights[0::2], weights[1::2]).view(np.uint8)
    return counts + counts % 2, bases, closed(np.concatenate([indices, pairs], axis=1))
