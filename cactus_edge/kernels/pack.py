"""Weights as the kernels read them: zeros, dead channels and unread inputs dropped, int4 packed.

A layer is brought to one form, a matrix [channels, inputs] with the byte distance of each input
from the start of a row's window, and then packed densely or sparsely. Both layouts skip inputs
that no weight reads and channels that have no weights.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cactus_edge.graph import Conv2D, FullyConnected, Int8Array, Int64Array, Linear
from cactus_edge.kernels.demand import Demand, Layout, TableBuilder
from cactus_edge.kernels.dense import CHANNELS, TILE
from cactus_edge.kernels.place import Placement
from cactus_edge.kernels.sparse import FEW, SEGMENT, VECTOR
from cactus_edge.kernels.steps import DENSE, SPARSE, Step

_DENSE_DEPTH = 64
"""Dense patches are padded to a multiple of this, so that loops have no scalar rest."""
_GAP = 8
"""So many unread inputs between two read ones are gathered rather than skipped."""
_LARGEST_TILE = 128
_COLUMN_ELEMENTS = 1 << 18
"""Size of a tile of transposed patches, int16: half a megabyte, for a second-level cache."""

# Time of a sparse multiplication in units of a dense one, for tiles of at least so many rows.
# Measured on one core of an AMD Zen 5 with AVX-512, layers of 64 to 3136 inputs.
_SPARSE_COST = ((128, 1.6), (64, 2.2), (32, 3.2), (FEW, 5.0), (0, 10.0))


def window_offsets(op: Conv2D, source: Placement, channels: int) -> Int64Array:
    """Byte distances [kh, kw, channels] of a window's inputs from its first one."""
    if source.elements is not None:  # a single pixel that shares the memory of what it reshapes
        return source.elements.reshape(1, 1, -1)
    height, width = op.weights.values.shape[1:3]
    rows = np.arange(height, dtype=np.int64)[:, None, None] * op.dilation[0] * source.row
    columns = np.arange(width, dtype=np.int64)[None, :, None] * op.dilation[1] * channels
    within = np.arange(channels, dtype=np.int64) if source.positions is None else source.positions
    return rows + columns + within


def pack_linear(
    builder: TableBuilder, op: Linear, base: Step, source: Placement, rows: int, layout: Layout
) -> tuple[Step, Demand]:
    """The step of a CONV_2D or FULLY_CONNECTED.

    Args:
        builder: receives weights and tables.
        op: the layer.
        base: its step, complete but for what depends on the weights.
        source: where its input lies.
        rows: output pixels of a block of images.
        layout: dense, sparse, or the one that should be faster for so many rows.
    """
    matrix = op.weights.values.reshape(op.channels, -1)
    if isinstance(op, Conv2D):
        offsets = window_offsets(op, source, op.weights.values.shape[3]).reshape(-1)
    else:
        offsets = source.offsets()
    kept = _kept_inputs(matrix.any(axis=0))
    runs = _runs(kept, offsets[kept])
    matrix = matrix[:, kept]
    # A convolution reads its weights once for many rows, FULLY_CONNECTED for few.
    nibbles = isinstance(op, FullyConnected) and op.weights.bits <= 4
    step = replace(
        base, runs=builder.integers(runs), run_count=len(runs), nibbles=int(nibbles), depth=0
    )
    if layout is Layout.AUTO:
        layout = fastest(matrix, rows)
    if layout is Layout.SPARSE:
        return _pack_sparse(builder, matrix, step, rows)
    return _pack_dense(builder, matrix, step)


def fastest(matrix: Int8Array, rows: int) -> Layout:
    """The layout that should be faster for a matrix [channels, inputs] and so many rows."""
    tile = min(rows, _tile_rows(matrix.shape[1], rows))
    ratio = next(cost for least, cost in _SPARSE_COST if tile >= least)
    dense = matrix.any(axis=1).sum() * -(-matrix.shape[1] // _DENSE_DEPTH) * _DENSE_DEPTH
    return Layout.SPARSE if ratio * np.count_nonzero(matrix) < dense else Layout.DENSE


def pack_nibbles(values: Int8Array) -> Int8Array:
    """Int8 [..., n] in [-8, 7], n even, as bytes [..., n / 2]: the second half in high nibbles."""
    half = values.shape[-1] // 2
    low, high = values[..., :half].view(np.uint8), values[..., half:].view(np.uint8)
    return ((low & 15) | (high << 4)).view(np.int8)


def _kept_inputs(live: npt.NDArray[np.bool_]) -> Int64Array:
    """Positions of inputs that are read, short gaps between them included."""
    positions = np.flatnonzero(live)
    kept = live.copy()
    distances = np.diff(positions)
    for i in np.flatnonzero((distances > 1) & (distances <= _GAP + 1)).tolist():
        kept[positions[i] : positions[i + 1]] = True
    return np.flatnonzero(kept)


def _runs(kept: Int64Array, offsets: Int64Array) -> Int64Array:
    """Runs [n, (offset, length)] of consecutive bytes."""
    if not kept.size:
        return np.zeros((0, 2), np.int64)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(offsets) != 1]))
    lengths = np.diff(np.concatenate([starts, [kept.size]]))
    return np.stack([offsets[starts], lengths], axis=1)


def _pack_dense(builder: TableBuilder, matrix: Int8Array, step: Step) -> tuple[Step, Demand]:
    live = np.flatnonzero(matrix.any(axis=1))
    count = -(-live.size // CHANNELS) * CHANNELS
    depth = -(-matrix.shape[1] // _DENSE_DEPTH) * _DENSE_DEPTH
    packed = np.zeros((count, depth), np.int8)
    packed[: live.size, : matrix.shape[1]] = matrix[live]
    # A row that only fills a pair adds its zeros to the first channel.
    filler = np.zeros(count - live.size)
    packed_step = replace(
        step,
        opcode=DENSE,
        depth=depth,
        tile=TILE,
        live=builder.integers(live, filler),
        live_count=count,
        weights=builder.weights(pack_nibbles(packed) if step.nibbles else packed),
    )
    demand = Demand(
        patches=TILE * depth,
        accumulators=TILE * step.channels,
        values=CHANNELS * depth,
    )
    return packed_step, demand


def _tile_rows(depth: int, rows: int) -> int:
    """Rows of a sparse tile, a multiple of ``VECTOR``; no more than there are or cache holds."""
    room = _COLUMN_ELEMENTS // max(depth, 1) // VECTOR * VECTOR
    return max(VECTOR, min(_LARGEST_TILE, room, -(-rows // VECTOR) * VECTOR))


def _pack_sparse(
    builder: TableBuilder, matrix: Int8Array, step: Step, rows: int
) -> tuple[Step, Demand]:
    channels, depth = matrix.shape
    segments = max(1, -(-depth // SEGMENT))
    indices: list[npt.NDArray[np.uint16]] = [np.zeros(0, np.uint16)]
    values: list[Int8Array] = [np.zeros(0, np.int8)]
    pointers: list[int] = []
    end = 0
    for segment in range(segments):
        for row in matrix[:, segment * SEGMENT : (segment + 1) * SEGMENT]:
            pointers.append(end)
            positions = np.flatnonzero(row)
            entries = row[positions]
            if step.nibbles and positions.size % 2:
                positions, entries = np.append(positions, 0), np.append(entries, np.int8(0))
            indices.append(positions.astype(np.uint16))
            values.append(pack_nibbles(entries) if step.nibbles else entries)
            end += positions.size
        pointers.append(end)
    tile = _tile_rows(depth, rows)
    packed_step = replace(
        step,
        opcode=SPARSE,
        depth=depth,
        tile=tile,
        segments=segments,
        pointers=builder.integers(pointers),
        indices=builder.indices(np.concatenate(indices)),
        weights=builder.weights(np.concatenate(values)),
    )
    demand = Demand(
        patches=depth * (tile if rows >= FEW else 1),
        accumulators=tile * channels,
        values=depth + 1,
        rows=tile,
    )
    return packed_step, demand
