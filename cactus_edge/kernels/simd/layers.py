"""Linear layers on vector tiles: which tile, over which rows and groups of channels.

A *group* is as many output channels as a tile has. Its weights stay in the first-level cache while
all rows pass; so groups are the outer loop. The last tile is moved back to end at the last row.
"""

from __future__ import annotations

from cactus_edge.kernels.arithmetic import requantize_channels
from cactus_edge.kernels.jit import kernel
from cactus_edge.kernels.rows import Tables, Workspace
from cactus_edge.kernels.simd.bitmask import bitmask_stream
from cactus_edge.kernels.simd.dense import block_tile, dense_tile, stream_tile
from cactus_edge.kernels.simd.emit import narrow, streaming, thin, wide
from cactus_edge.kernels.simd.permuted import permuted_stream, permuted_tile
from cactus_edge.kernels.simd.skipping import live_scan, skipping_tile
from cactus_edge.kernels.simd.tags import Tag
from cactus_edge.kernels.steps import (
    BLOCKS,
    MASKED_STREAM,
    PERMUTED,
    SKIPPING,
    STREAM,
    TILED,
    Step,
)

_dense_wide, _dense_narrow = dense_tile(wide), dense_tile(narrow)
_stream, _stream_nibbles = (stream_tile(streaming, nibbles=n) for n in (False, True))
_thin, _thin_nibbles = (stream_tile(thin, nibbles=n) for n in (False, True))
_blocks = block_tile(wide)
_permuted_wide, _permuted_narrow = permuted_tile(wide), permuted_tile(narrow)
_permuted_stream = permuted_stream(thin)
_masked_stream = bitmask_stream()
_scan, _scan_nibbles = (live_scan(nibbles=n) for n in (False, True))
_skipping, _skipping_nibbles = (skipping_tile(nibbles=n) for n in (False, True))

GROUP_FIELDS = 6
"""Integers of a group, see ``Step.group_table``."""
_LEAST_TILES = 4
"""A layer is divided by rows if each part has so many tiles, by which its weights are reused."""


@kernel
def vector_layer(
    tag: Tag,
    step: Step,
    tables: Tables,
    work: Workspace,
    images: int,
    part: int = 0,
    parts: int = 1,
) -> None:
    """One of so many parts of all rows of a block of images."""
    rows = max(images * step.height * step.width, step.tile)
    integers = tables.integers.ctypes.data
    bytes_ = tables.weights.ctypes.data
    arena = work.activations.ctypes.data
    windows, targets = integers + 8 * step.windows, integers + 8 * step.targets
    fused = step.fused != 0
    epilogue = work.epilogue
    epilogue[0], epilogue[1], epilogue[2] = step.target_zero, step.lower, step.upper
    epilogue[3], epilogue[4], epilogue[5] = step.channels, 0, step.group_channels
    finish = epilogue.ctypes.data
    tiles = -(-rows // step.tile)
    first_group, last_group, first_tile, last_tile = 0, step.groups, 0, tiles
    if tiles >= _LEAST_TILES * parts or step.groups < parts:
        first_tile, last_tile = tiles * part // parts, tiles * (part + 1) // parts
    else:
        first_group = step.groups * part // parts
        last_group = step.groups * (part + 1) // parts
    live = work.positions.ctypes.data
    if step.opcode == SKIPPING:
        list_live(tag, step, tables, arena, windows, live)
    for group in range(first_group, last_group):
        channel = group * step.group_channels
        entry = step.group_table + group * GROUP_FIELDS
        weights = bytes_ + tables.integers[entry]
        bias = bytes_ + step.bias + 4 * channel
        scales = bytes_ + step.factors + 4 * channel if fused else 0
        if not fused:
            epilogue[4] = work.accumulators.ctypes.data - 4 * channel
        for number in range(first_tile, last_tile):
            row = min(number * step.tile, rows - step.tile)
            window, target = windows + 8 * row, targets + 8 * row
            _tile(
                tag, step, tables, entry, weights, arena, window, target, live, bias, scales,
                channel, finish,
            )  # fmt: skip
            if not fused:
                requantize_tile(step, tables, work, row, channel)


@kernel
def list_live(tag: Tag, step: Step, tables: Tables, arena: int, window: int, live: int) -> None:
    """The steps of a layer's only window that have an input, see ``simd.skipping``."""
    runs = tables.integers.ctypes.data + 8 * step.runs
    if step.nibbles:
        _scan_nibbles(tag, arena, window, runs, step.run_count, step.depth, live)
    else:
        _scan(tag, arena, window, runs, step.run_count, step.depth, live)


@kernel
def _tile(
    tag: Tag,
    step: Step,
    tables: Tables,
    entry: int,
    weights: int,
    arena: int,
    window: int,
    target: int,
    live: int,
    bias: int,
    scales: int,
    channel: int,
    finish: int,
) -> None:
    """One tile of one group."""
    integers = tables.integers
    code, small = step.opcode, step.small != 0
    if code == TILED:
        runs = integers.ctypes.data + 8 * step.runs
        if small:
            _dense_narrow(
                tag, arena, window, target, runs, step.run_count, weights, bias, scales, channel,
                finish,
            )  # fmt: skip
        else:
            _dense_wide(
                tag, arena, window, target, runs, step.run_count, weights, bias, scales, channel,
                finish,
            )  # fmt: skip
    elif code == STREAM:
        runs = integers.ctypes.data + 8 * step.runs
        count = step.run_count
        if small and step.nibbles:
            _thin_nibbles(
                tag, arena, window, target, runs, count, weights, bias, scales, channel, finish
            )
        elif small:
            _thin(tag, arena, window, target, runs, count, weights, bias, scales, channel, finish)
        elif step.nibbles:
            _stream_nibbles(
                tag, arena, window, target, runs, count, weights, bias, scales, channel, finish
            )
        else:
            _stream(tag, arena, window, target, runs, count, weights, bias, scales, channel, finish)
    elif code == MASKED_STREAM:
        runs = integers.ctypes.data + 8 * step.runs
        values = tables.weights.ctypes.data + integers[entry + 1]
        _masked_stream(
            tag, arena, window, target, runs, step.run_count, weights, values, bias, scales,
            channel, finish,
        )  # fmt: skip
    elif code == SKIPPING:
        if step.nibbles:
            _skipping_nibbles(
                tag, arena, window, target, live, weights, bias, scales, channel, finish
            )
        else:
            _skipping(tag, arena, window, target, live, weights, bias, scales, channel, finish)
    elif code == BLOCKS:
        offsets = tables.weights.ctypes.data + integers[entry + 1]
        _blocks(
            tag, arena, window, target, offsets, integers[entry + 2], weights, bias, scales,
            channel, finish,
        )  # fmt: skip
    else:
        base = tables.weights.ctypes.data
        singles, single_count = base + integers[entry + 1], integers[entry + 2]
        duals, dual_count = base + integers[entry + 3], integers[entry + 4]
        dual_stream = base + integers[entry + 5]
        if code == PERMUTED and small:
            _permuted_narrow(
                tag, arena, window, target, singles, single_count, weights, duals, dual_count,
                dual_stream, bias, scales, channel, finish,
            )  # fmt: skip
        elif code == PERMUTED:
            _permuted_wide(
                tag, arena, window, target, singles, single_count, weights, duals, dual_count,
                dual_stream, bias, scales, channel, finish,
            )  # fmt: skip
        else:
            _permuted_stream(
                tag, arena, window, target, singles, single_count, weights, duals, dual_count,
                dual_stream, bias, scales, channel, finish,
            )  # fmt: skip


@kernel
def requantize_tile(step: Step, tables: Tables, work: Workspace, row: int, channel: int) -> None:
    """What a tile left as accumulators, by the functions of ``semantics``."""
    end = min(channel + step.group_channels, step.channels)
    for i in range(step.tile):
        target = tables.integers[step.targets + row + i]
        begin = i * step.group_channels
        requantize_channels(
            step,
            tables.integers,
            work.accumulators[begin : begin + end - channel],
            work.activations[target + channel : target + end],
            channel,
        )
