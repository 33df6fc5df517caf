"""What the kernels of linear layers share: where a row reads and writes, and gathering patches.

A *row* is one output pixel of one image of a block; its *patch* are the input values that its
window reads, less the zero point, as int16. FULLY_CONNECTED has one row for each image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cactus_edge.kernels.jit import inlined, kernel
from cactus_edge.kernels.steps import Step

ByteArray = npt.NDArray[np.uint8]
Int8Array = npt.NDArray[np.int8]
Int16Array = npt.NDArray[np.int16]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

# Elements of a run that are transposed at a time: the lines they are written to stay in cache.
_BLOCK = 16


class Tables(NamedTuple):
    """What a graph is packed into; the offsets of ``Step`` point into it. Read only."""

    weights: npt.NDArray[np.int8]
    indices: npt.NDArray[np.uint16]
    integers: npt.NDArray[np.int64]


class Workspace(NamedTuple):
    """Memory of one thread.

    ``activations`` hold a block of images; the rest are scratch of one tile of rows. ``epilogue``
    are the few integers that vector tiles read when their sums are complete. ``positions`` are
    those of rows, or the list of a window's live steps, see ``simd.skipping``.
    """

    activations: npt.NDArray[np.uint8]
    patches: npt.NDArray[np.int16]
    accumulators: npt.NDArray[np.int32]
    values: npt.NDArray[np.int8]
    sums: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    epilogue: npt.NDArray[np.int64]


@inlined
def source_of(step: Step, row: int) -> int:
    """Offset of the first byte that a row's window reads."""
    image, pixel = divmod(row, step.height * step.width)
    y, x = divmod(pixel, step.width)
    return step.source + image * step.source_image + y * step.down + x * step.right


@inlined
def target_of(step: Step, row: int) -> int:
    """Offset of the first byte that a row writes."""
    image, pixel = divmod(row, step.height * step.width)
    y, x = divmod(pixel, step.width)
    return step.target + image * step.target_image + y * step.target_row + x * step.channels


@inlined
def fill_bias(step: Step, integers: Int64Array, accumulators: Int32Array) -> None:
    """Start the accumulators [channels] of a row from the bias."""
    bias = integers[step.bias : step.bias + step.channels]
    for channel in range(len(bias)):
        accumulators[channel] = np.int32(bias[channel])


@kernel
def gather_row(
    step: Step, integers: Int64Array, activations: ByteArray, start: int, patch: Int16Array
) -> None:
    """Patch [depth] of the row that starts at ``start``; the padding is left as it is."""
    depth = 0
    zero = np.int16(step.source_zero)
    for run in range(step.run_count):
        begin = start + integers[step.runs + 2 * run]
        length = integers[step.runs + 2 * run + 1]
        source = activations[begin : begin + length]
        target = patch[depth : depth + length]
        for i in range(length):
            target[i] = np.int16(source[i]) - zero
        depth += length


@kernel
def gather_columns(
    step: Step, integers: Int64Array, work: Workspace, first: int, count: int, pitch: int
) -> None:
    """Patches of ``count`` rows from ``first`` on, transposed to [depth, pitch]."""
    depth = 0
    zero = np.int16(step.source_zero)
    for row in range(count):
        work.positions[row] = source_of(step, first + row)
    for run in range(step.run_count):
        offset = integers[step.runs + 2 * run]
        length = integers[step.runs + 2 * run + 1]
        for block in range(0, length, _BLOCK):
            size = min(_BLOCK, length - block)
            target = work.patches[(depth + block) * pitch : (depth + block + size) * pitch]
            for row in range(count):
                begin = work.positions[row] + offset + block
                source = work.activations[begin : begin + size]
                for i in range(size):
                    target[i * pitch + row] = np.int16(source[i]) - zero
        depth += length


@inlined
def unpack_nibbles(packed: Int8Array, values: Int8Array) -> None:
    """Signed nibbles: the low ones are the first half of ``values``, the high ones the second."""
    half = len(packed)
    low, high = values[:half], values[half : 2 * half]
    for i in range(half):
        low[i] = np.int8(packed[i] << 4) >> 4
        high[i] = packed[i] >> 4
