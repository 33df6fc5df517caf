"""Linear layers on lower and upper ends.

The two ends lie in two workspaces with the same layout. A bound of an output is a sum like any
other, of one end or the other of each input, so its accumulator keeps within the layer's limits and
is requantized like any other; and requantization is monotone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from numba.extending import overload

from cactus_edge.kernels.arithmetic import requantize_channels
from cactus_edge.kernels.jit import inlined, kernel
from cactus_edge.kernels.rows import (
    Tables,
    Workspace,
    fill_bias,
    gather_row,
    source_of,
    target_of,
    unpack_nibbles,
)
from cactus_edge.kernels.simd.interval import (
    interval_permuted_tile,
    interval_tile,
    narrow_interval,
    wide_interval,
)
from cactus_edge.kernels.simd.layers import GROUP_FIELDS, requantize_tile
from cactus_edge.kernels.simd.tags import Tag, TierType
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.kernels.steps import DEPTHWISE, TILED, Step

ByteArray = npt.NDArray[np.uint8]
Int8Array = npt.NDArray[np.int8]
Int16Array = npt.NDArray[np.int16]
Int32Array = npt.NDArray[np.int32]

_wide, _narrow = interval_tile(wide_interval), interval_tile(narrow_interval)
_permuted_wide = interval_permuted_tile(wide_interval)
_permuted_narrow = interval_permuted_tile(narrow_interval)


def linear_interval(
    tag: Tag, step: Step, tables: Tables, low: Workspace, high: Workspace, images: int
) -> None:
    """All rows of a block of boxes, on the kernels of a tier; for compiled code alone."""
    raise NotImplementedError("called by compiled code alone")


@overload(linear_interval, strict=False, jit_options={"nogil": True, "error_model": "numpy"})
def _linear_interval(
    tag: TierType, step: object, tables: object, low: object, high: object, images: object
) -> Callable[[Tag, Step, Tables, Workspace, Workspace, int], None]:
    """What is compiled for a tier: only its own tiles."""

    def plain(
        tag: Tag, step: Step, tables: Tables, low: Workspace, high: Workspace, images: int
    ) -> None:
        if step.opcode == DEPTHWISE:
            depthwise_interval(step, tables, low, high, images)
        else:
            plain_interval(step, tables, low, high, images)

    def vector(
        tag: Tag, step: Step, tables: Tables, low: Workspace, high: Workspace, images: int
    ) -> None:
        if step.opcode == DEPTHWISE:
            depthwise_interval(step, tables, low, high, images)
        else:
            tiled_interval(tag, step, tables, low, high, images)

    return plain if tag.tier is Tier.PLAIN else vector


# ---------------------------------------------------------------------- vector tiles
@kernel
def tiled_interval(
    tag: Tag, step: Step, tables: Tables, low: Workspace, high: Workspace, images: int
) -> None:
    """CONV_2D and FULLY_CONNECTED, tile by tile; the last tile is moved back to the last row."""
    rows = max(images * step.height * step.width, step.tile)
    base = tables.weights.ctypes.data
    fused = step.fused != 0
    for work in (low, high):
        epilogue = work.epilogue
        epilogue[0], epilogue[1], epilogue[2] = step.target_zero, step.lower, step.upper
        epilogue[3], epilogue[4], epilogue[5] = step.channels, 0, step.group_channels
    for group in range(step.groups):
        channel = group * step.group_channels
        bias = base + step.bias + 4 * channel
        scales = base + step.factors + 4 * channel if fused else 0
        if not fused:
            for work in (low, high):
                work.epilogue[4] = work.accumulators.ctypes.data - 4 * channel
        for first in range(0, rows, step.tile):
            row = min(first, rows - step.tile)
            _tile(tag, step, tables, low, high, group, row, bias, scales)
            if not fused:
                requantize_tile(step, tables, low, row, channel)
                requantize_tile(step, tables, high, row, channel)


@kernel
def _tile(
    tag: Tag,
    step: Step,
    tables: Tables,
    low: Workspace,
    high: Workspace,
    group: int,
    row: int,
    bias: int,
    scales: int,
) -> None:
    """One tile of one group."""
    integers, base = tables.integers.ctypes.data, tables.weights.ctypes.data
    windows, targets = integers + 8 * (step.windows + row), integers + 8 * (step.targets + row)
    arena, upper_arena = low.activations.ctypes.data, high.activations.ctypes.data
    finish, upper_finish = low.epilogue.ctypes.data, high.epilogue.ctypes.data
    channel = group * step.group_channels
    entry = step.group_table + group * GROUP_FIELDS
    fields = tables.integers[entry : entry + GROUP_FIELDS]
    stream = base + fields[0]
    if step.opcode == TILED:
        runs = integers + 8 * step.runs
        if step.small != 0:
            _narrow(
                tag, arena, upper_arena, windows, targets, runs, step.run_count, stream, bias,
                scales, channel, finish, upper_finish,
            )  # fmt: skip
        else:
            _wide(
                tag, arena, upper_arena, windows, targets, runs, step.run_count, stream, bias,
                scales, channel, finish, upper_finish,
            )  # fmt: skip
        return
    singles, duals, dual_stream = base + fields[1], base + fields[3], base + fields[5]
    if step.small != 0:
        _permuted_narrow(
            tag, arena, upper_arena, windows, targets, singles, fields[2], stream, duals, fields[4],
            dual_stream, bias, scales, channel, finish, upper_finish,
        )  # fmt: skip
    else:
        _permuted_wide(
            tag, arena, upper_arena, windows, targets, singles, fields[2], stream, duals, fields[4],
            dual_stream, bias, scales, channel, finish, upper_finish,
        )  # fmt: skip


# ---------------------------------------------------------------------- loops
@kernel
def plain_interval(
    step: Step, tables: Tables, low: Workspace, high: Workspace, images: int
) -> None:
    """CONV_2D and FULLY_CONNECTED from the packing of ``kernels.dense``, row by row."""
    depth = step.depth
    live = tables.integers[step.live : step.live + step.live_count]
    least, most = low.patches[:depth], high.patches[:depth]
    for row in range(images * step.height * step.width):
        start = source_of(step, row)
        for work in (low, high):
            gather_row(step, tables.integers, work.activations, start, work.patches[:depth])
            fill_bias(step, tables.integers, work.accumulators[: step.channels])
        for i in range(step.live_count):
            if step.nibbles:
                begin = step.weights + i * (depth // 2)
                unpack_nibbles(tables.weights[begin : begin + depth // 2], low.values[:depth])
                weights = low.values[:depth]
            else:
                begin = step.weights + i * depth
                weights = tables.weights[begin : begin + depth]
            a, b = _dot_both(least, most, weights)
            low.accumulators[live[i]] += a
            high.accumulators[live[i]] += b
        _finish_row(step, tables, low, row)
        _finish_row(step, tables, high, row)


@inlined
def _dot_both(
    lower: Int16Array, upper: Int16Array, weights: Int8Array
) -> tuple[np.int32, np.int32]:
    """The least and the largest product of a box with a row of weights."""
    least = most = np.int32(0)
    for i in range(len(weights)):
        # int32 throughout: Numba widens to int64, and LLVM narrows again where it is cast back.
        w, a, b = np.int32(weights[i]), np.int32(lower[i]), np.int32(upper[i])
        least = np.int32(least + np.int32((b if w < 0 else a) * w))
        most = np.int32(most + np.int32((a if w < 0 else b) * w))
    return least, most


@kernel
def depthwise_interval(
    step: Step, tables: Tables, low: Workspace, high: Workspace, images: int
) -> None:
    """DEPTHWISE_CONV_2D, one tap at a time over all channels of a pixel."""
    channels = step.channels
    inputs = channels // step.multiplier
    for row in range(images * step.height * step.width):
        start = source_of(step, row)
        fill_bias(step, tables.integers, low.accumulators[:channels])
        fill_bias(step, tables.integers, high.accumulators[:channels])
        for tap in range(step.tap_count):
            source = start + tables.integers[step.taps + tap]
            begin = step.weights + tap * channels
            _add_tap(
                step,
                low.activations[source : source + inputs],
                high.activations[source : source + inputs],
                tables.weights[begin : begin + channels],
                low.accumulators[:channels],
                high.accumulators[:channels],
            )
        _finish_row(step, tables, low, row)
        _finish_row(step, tables, high, row)


@inlined
def _add_tap(
    step: Step,
    lower: ByteArray,
    upper: ByteArray,
    weights: Int8Array,
    least: Int32Array,
    most: Int32Array,
) -> None:
    zero = np.int32(step.source_zero)
    if step.multiplier == 1:
        for i in range(len(lower)):
            w, a, b = np.int32(weights[i]), np.int32(lower[i]), np.int32(upper[i])
            p, q = np.int32((b if w < 0 else a) - zero), np.int32((a if w < 0 else b) - zero)
            least[i] = np.int32(least[i] + np.int32(p * w))
            most[i] = np.int32(most[i] + np.int32(q * w))
        return
    channel = 0
    for i in range(len(lower)):
        a, b = np.int32(np.int32(lower[i]) - zero), np.int32(np.int32(upper[i]) - zero)
        for _ in range(step.multiplier):
            w = np.int32(weights[channel])
            least[channel] = np.int32(least[channel] + np.int32((b if w < 0 else a) * w))
            most[channel] = np.int32(most[channel] + np.int32((a if w < 0 else b) * w))
            channel += 1


@kernel
def _finish_row(step: Step, tables: Tables, work: Workspace, row: int) -> None:
    channels = step.channels
    target = target_of(step, row)
    requantize_channels(
        step,
        tables.integers,
        work.accumulators[:channels],
        work.activations[target : target + channels],
        0,
    )
