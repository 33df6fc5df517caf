"""Sparse linear layers: for each output channel the non-zero weights and the inputs they read.

With many rows each weight is multiplied with a whole column of the transposed patches, a loop that
vectorises whatever the pattern of zeros; with few rows each row is a sum over gathered inputs.
Indices are 16-bit, relative to segments of 65,536 inputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cactus_edge.kernels.jit import inlined, kernel
from cactus_edge.kernels.rows import (
    Tables,
    Workspace,
    gather_columns,
    gather_row,
    source_of,
    unpack_nibbles,
)
from cactus_edge.kernels.steps import Step

SEGMENT = 1 << 16
FEW = 8
"""Fewer rows than this are computed one by one."""
VECTOR = 16
"""Columns are padded to a multiple of this many rows."""

Int8Array = npt.NDArray[np.int8]
Int16Array = npt.NDArray[np.int16]
Int32Array = npt.NDArray[np.int32]
IndexArray = npt.NDArray[np.uint16]


@kernel
def sparse(step: Step, tables: Tables, work: Workspace, first: int, count: int) -> None:
    """Accumulators of up to ``step.tile`` rows, int32 [rows, channels]."""
    if count < FEW:
        for row in range(count):
            _single_row(step, tables, work, first + row, row * step.channels)
    else:
        _tile(step, tables, work, first, count)


@kernel
def _tile(step: Step, tables: Tables, work: Workspace, first: int, count: int) -> None:
    pitch = (count + VECTOR - 1) // VECTOR * VECTOR
    gather_columns(step, tables.integers, work, first, count, pitch)
    sums = work.sums[:pitch]
    for channel in range(step.channels):
        sums[:] = np.int32(tables.integers[step.bias + channel])
        for segment in range(step.segments):
            begin, end = _unpacked(step, tables, work, segment, channel)
            indices = tables.indices[step.indices + begin : step.indices + end]
            if step.nibbles:
                values = work.values[: end - begin]
            else:
                values = tables.weights[step.weights + begin : step.weights + end]
            columns = work.patches[segment * SEGMENT * pitch :]
            _add_columns(sums, columns, pitch, indices, values)
        for row in range(count):
            work.accumulators[row * step.channels + channel] = sums[row]


@kernel
def _single_row(step: Step, tables: Tables, work: Workspace, row: int, begin: int) -> None:
    patch = work.patches[: step.depth]
    gather_row(step, tables.integers, work.activations, source_of(step, row), patch)
    for channel in range(step.channels):
        total = np.int32(tables.integers[step.bias + channel])
        for segment in range(step.segments):
            first, last = _unpacked(step, tables, work, segment, channel)
            indices = tables.indices[step.indices + first : step.indices + last]
            if step.nibbles:
                values = work.values[: last - first]
            else:
                values = tables.weights[step.weights + first : step.weights + last]
            total += _gathered_dot(patch[segment * SEGMENT :], indices, values)
        work.accumulators[begin + channel] = total


@inlined
def _unpacked(
    step: Step, tables: Tables, work: Workspace, segment: int, channel: int
) -> tuple[int, int]:
    """Range of the entries of one channel in one segment; int4 is unpacked into scratch memory."""
    pointer = step.pointers + segment * (step.channels + 1) + channel
    begin, end = tables.integers[pointer], tables.integers[pointer + 1]
    if step.nibbles:
        packed = tables.weights[step.weights + begin // 2 : step.weights + end // 2]
        unpack_nibbles(packed, work.values[: end - begin])
    return begin, end


@inlined
def _add_columns(
    sums: Int32Array, columns: Int16Array, pitch: int, indices: IndexArray, values: Int8Array
) -> None:
    """Add weight times column for each entry, four at a time to spare loads of the sums."""
    count = len(indices)
    fours = count // 4 * 4
    for j in range(0, fours, 4):
        i = indices[j] * pitch
        a = columns[i : i + pitch]
        i = indices[j + 1] * pitch
        b = columns[i : i + pitch]
        i = indices[j + 2] * pitch
        c = columns[i : i + pitch]
        i = indices[j + 3] * pitch
        d = columns[i : i + pitch]
        u, v = np.int32(values[j]), np.int32(values[j + 1])
        w, x = np.int32(values[j + 2]), np.int32(values[j + 3])
        for row in range(pitch):
            first = np.int32(np.int32(a[row]) * u) + np.int32(np.int32(b[row]) * v)
            second = np.int32(np.int32(c[row]) * w) + np.int32(np.int32(d[row]) * x)
            sums[row] = np.int32(sums[row] + first + second)
    for j in range(fours, count):
        i = indices[j] * pitch
        a = columns[i : i + pitch]
        u = np.int32(values[j])
        for row in range(pitch):
            sums[row] = np.int32(sums[row] + np.int32(np.int32(a[row]) * u))


@inlined
def _gathered_dot(patch: Int16Array, indices: IndexArray, values: Int8Array) -> np.int32:
    total = np.int32(0)
    for j in range(len(indices)):
        total = np.int32(total + np.int32(np.int32(patch[indices[j]]) * np.int32(values[j])))
    return total
