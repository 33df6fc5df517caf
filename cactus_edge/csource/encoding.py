"""How the weights of a layer lie in flash.

Four layouts, chosen for each layer by size or forced:

- ``INT8``: one byte per weight, in blocks of output channels, inside a block by groups of four
  taps, inside a group channel by channel, so that one pointer walks over the table in the order of
  use and one word has four taps of a channel. The up to three taps that are left follow tap by tap.
- ``INT4``: the same with two bytes for four taps, the earlier tap in the low nibble. First bytes of
  two channels lie side by side, then their second ones: one word has four taps of both channels.
  Blocks of an odd width have first the first bytes of all channels, then the second ones.
- ``SPARSE8``: for each output channel its non-zero weights alone, two bytes each: the distance
  from the previous one and the value.
- ``SPARSE4``: the same in one byte, distance in the low nibble and value in the high one.

A distance that does not fit is walked in steps with weight 0, so no decoder ever branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from cactus_edge.errors import UsageError
from cactus_edge.graph import Int8Array, frozen_array

Counts = npt.NDArray[np.int64]


class Layout(Enum):
    """A weight layout, or ``AUTO``: the smallest that can hold the values."""

    AUTO = "auto"
    INT8 = "int8"
    INT4 = "int4"
    SPARSE8 = "sparse8"
    SPARSE4 = "sparse4"

    @property
    def sparse(self) -> bool:
        """Whether only non-zero weights are stored."""
        return self in (Layout.SPARSE8, Layout.SPARSE4)

    @property
    def packed(self) -> bool:
        """Whether a weight takes a nibble."""
        return self in (Layout.INT4, Layout.SPARSE4)


@dataclass(frozen=True)
class Encoding:
    """``values`` int8, the table; ``counts`` int64 [out], entries per channel of a sparse one."""

    layout: Layout
    block: int
    values: Int8Array
    counts: Counts

    @property
    def size(self) -> int:
        """Bytes in flash."""
        return self.values.size + self.counts.size * count_width(self.counts)


def count_width(counts: Counts) -> int:
    """Bytes of the unsigned type that holds every count."""
    most = int(counts.max(initial=0))
    return 1 if most < 1 << 8 else 2 if most < 1 << 16 else 4


def encode(
    matrix: Int8Array, layout: Layout, block: int, *, where: str, sparse: bool = True
) -> Encoding:
    """The table of one layer.

    Args:
        matrix: int8 [out, taps].
        layout: forced, or AUTO for the smallest; the first in the order above wins a tie.
        block: output channels that are interleaved in a dense layout.
        where: the layer's name, for the error.
        sparse: False rules sparse layouts out; a forced one becomes its dense counterpart.

    Raises:
        UsageError: a nibble is forced on values outside [-8, 7].
    """
    fits = int(matrix.min()) >= -8 and int(matrix.max()) <= 7
    if layout.packed and not fits:
        raise UsageError(
            f"{where}: weights {int(matrix.min())}..{int(matrix.max())} do not fit layout "
            f"'{layout.value}' (-8..7); use 'auto', 'int8' or 'sparse8'"
        )
    if layout is Layout.AUTO:
        possible = [k for k in Layout if k is not Layout.AUTO and (fits or not k.packed)]
        possible = [k for k in possible if sparse or not k.sparse]
    elif layout.sparse and not sparse:
        possible = [Layout.INT4 if layout.packed else Layout.INT8]
    else:
        possible = [layout]
    encodings = [
        _sparse(matrix, kind) if kind.sparse else _dense(matrix, kind, block) for kind in possible
    ]
    return min(encodings, key=lambda encoding: encoding.size)


def blocks(channels: int, block: int) -> list[tuple[int, int, int]]:
    """``(start, end, width)``: full blocks, then what remains as one narrower block."""
    full = channels - channels % block
    runs = [(0, full, block), (full, channels, channels - full)]
    return [run for run in runs if run[0] < run[1]]


def place(layout: Layout, width: int, channel: int, unit: int) -> int:
    """Where byte ``unit`` (a tap, or a pair of taps) of a channel lies in a dense group of four."""
    if not layout.packed:
        return 4 * channel + unit
    if width % 2:
        return width * unit + channel
    return channel // 2 * 4 + 2 * unit + channel % 2


def group_units(layout: Layout) -> int:
    """Bytes of a channel in a group of four taps."""
    return 2 if layout.packed else 4


def _dense(matrix: Int8Array, layout: Layout, block: int) -> Encoding:
    values, units = matrix, group_units(layout)
    if layout.packed:
        even = np.pad(matrix, ((0, 0), (0, matrix.shape[1] % 2)))
        values = (even[:, 0::2] & 15) | (even[:, 1::2] << 4)
    full = matrix.shape[1] // 4 * units
    parts: list[Int8Array] = []
    for start, end, width in blocks(matrix.shape[0], block):
        order = np.argsort([place(layout, width, c, u) for c in range(width) for u in range(units)])
        for first in range(start, end, width):
            rows = values[first : first + width]
            groups = rows[:, :full].reshape(width, -1, units).swapaxes(0, 1)
            parts += [
                groups.reshape(-1, width * units)[:, order].reshape(-1),
                rows[:, full:].T.reshape(-1),
            ]
    table = frozen_array(np.concatenate(parts), np.int8)
    return Encoding(layout, block, table, np.zeros(0, np.int64))


def _sparse(matrix: Int8Array, layout: Layout) -> Encoding:
    longest = 15 if layout.packed else 255
    parts: list[Int8Array] = []
    counts = np.zeros(matrix.shape[0], np.int64)
    for channel, row in enumerate(matrix):
        (positions,) = np.nonzero(row)
        distances = np.diff(positions, prepend=0)
        steps = np.maximum((distances - 1) // longest, 0)
        ends = np.cumsum(steps + 1) - 1
        counts[channel] = steps.sum() + positions.size
        distance = np.full(int(counts[channel]), longest)
        value = np.zeros(int(counts[channel]), np.int64)
        distance[ends] = distances - longest * steps
        value[ends] = row[positions]
        pairs = (value << 4) | distance if layout.packed else np.stack([distance, value], axis=1)
        parts.append(pairs.astype(np.int8).reshape(-1))
    table = frozen_array(np.concatenate(parts), np.int8)
    return Encoding(layout, 1, table, counts)
