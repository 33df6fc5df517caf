"""The table that the compiled code walks: one record of int64 fields for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter

import numpy as np
import numpy.typing as npt

# The linear layers come first.
DENSE = 0
SPARSE = 1
DEPTHWISE = 2
ADD = 3
AVERAGE = 4
MAXIMUM = 5
LOAD = 6
STORE = 7
COPY = 8
LOOKUP = 9
PAIR = 10
# Linear layers on vector tiles, see ``simd.layers``.
TILED = 11
STREAM = 12
BLOCKS = 13
PERMUTED = 14
PERMUTED_STREAM = 15
MASKED_STREAM = 16
DEPTHWISE_TILE = 17
SKIPPING = 18


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operator, or one copy from the input or to the results; unused fields are 0.

    Offsets of activations are bytes in the arena, ``*_image`` the distance of two images, ``*_row``
    of two rows of pixels. Zero points, ``lower`` and ``upper`` are in terms of the stored byte.
    Offsets of tables are elements of ``Program.integers``, ``weights`` of ``Program.weights``.
    """

    opcode: int
    # Where it reads and writes.
    source: int = 0
    source_image: int = 0
    source_row: int = 0
    source_zero: int = 0
    other: int = 0
    other_image: int = 0
    other_row: int = 0
    other_zero: int = 0
    target: int = 0
    target_image: int = 0
    target_row: int = 0
    target_zero: int = 0
    lower: int = 0
    upper: int = 255
    flip: int = 0
    """XOR of every copied byte: 128 between int8 and bytes."""
    # The output's extents; a tensor without rows has one of ``channels`` bytes.
    height: int = 1
    width: int = 1
    channels: int = 1
    # Windows: bytes from one output pixel's window to the next one's.
    down: int = 0
    right: int = 0
    multiplier: int = 1
    """Output channels for each input channel of a depthwise convolution."""
    taps: int = 0
    tap_count: int = 0
    """Depthwise: offsets of the taps; for tiles filled up to what a register multiplies at once.
    Copies: triples (source, target, length)."""
    pool: int = 0
    """(window, stride, padding before, input extent), each of height and width."""
    other_width: int = 0
    """Two inputs: bytes of a row of the second one, which repeat along the row."""
    kinds: int = 0
    """Lookups: rows of the table, which is in ``Program.weights``."""
    monotone: int = 0
    """1 where every row of a lookup's table does not decrease."""
    # Linear layers.
    runs: int = 0
    run_count: int = 0
    """Pairs (offset, length) of the input bytes that any weight reads."""
    depth: int = 0
    """Length of a patch, padded as the layout asks; of what skips dead inputs, steps of a group."""
    live: int = 0
    live_count: int = 0
    """Output channels that have weights, one for each packed row."""
    pointers: int = 0
    segments: int = 0
    tile: int = 0
    """Linear: rows that are computed together."""
    nibbles: int = 0
    """1 if weights are packed two in a byte, see ``pack.pack_nibbles``."""
    weights: int = 0
    indices: int = 0
    bias: int = 0
    rounding: int = 0
    """Linear: runs of channels (end, code), and with ``round_count`` their number. ADD: the six
    integers of ``semantics.ADD``, and the code in ``round_count``."""
    round_count: int = 0
    multipliers: int = 0
    """Multipliers of all channels, then their shifts."""
    # Vector tiles. ``bias`` is then an offset of int32 in ``Program.weights``.
    windows: int = 0
    targets: int = 0
    """For each row of a block, from the start of the arena: where its window begins, and where its
    output."""
    groups: int = 0
    group_channels: int = 0
    group_table: int = 0
    """Six integers for each group: offset of its weights, then what the kind of tile needs."""
    small: int = 0
    """1 for tiles of few channels."""
    fused: int = 0
    """1 where all channels round as FLOAT32, and tiles requantize."""
    factors: int = 0
    """Where ``fused``: float32 scales of all channels, in ``Program.weights``."""


STEP = np.dtype([(field.name, np.int64) for field in fields(Step)])
_FIELDS = attrgetter(*(field.name for field in fields(Step)))


def table(steps: Sequence[Step]) -> npt.NDArray[np.void]:
    """The records of ``steps``, in order."""
    return np.array([_FIELDS(step) for step in steps], STEP)
