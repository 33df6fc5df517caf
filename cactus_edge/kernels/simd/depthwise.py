"""Depthwise tiles: some output pixels times some registers of channels, all sums in registers.

Each channel has an input of its own, so nothing is broadcast: a load takes the same tap of all
channels, and as many taps as a dot product adds to a sum are brought together byte by byte::

    tap 0    a0 b0 c0 d0 ...                 a register:  a0 a1 a2 a3 | b0 b1 b2 b3 | c0 c1 ...
    tap 1    a1 b1 c1 d1 ...                 weights:     w0 w1 w2 w3 | w0 w1 w2 w3 | w0 w1 ...
    tap 2    a2 b2 c2 d2 ...
    tap 3    a3 b3 c3 d3 ...

A lane is one channel on every tier. Where a dot product adds pairs (``AVX2``, ``NEON``), taps are
taken two at a time. All groups of channels of a tile are computed before the next tile, so that
other roundings than FLOAT32 find the sums of whole pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from cactus_edge.kernels.arithmetic import requantize_channels
from cactus_edge.kernels.jit import kernel
from cactus_edge.kernels.rows import Tables, Workspace
from cactus_edge.kernels.simd.dense import ShapeOf, finish
from cactus_edge.kernels.simd.emit import (
    I8,
    I32,
    I64,
    Emitter,
    Value,
    depthwise_narrow,
    depthwise_wide,
    products_of,
)
from cactus_edge.kernels.simd.tags import Tag, emitted
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.kernels.steps import Step

_ZIPPED = 8
"""Bytes of either vector that one instruction brings together, on all tiers but AVX512."""


def depthwise_tile(shape: ShapeOf) -> Any:
    """A tile of all taps."""

    @emitted(10)
    def tile(
        e: Emitter,
        arena: Value,
        windows: Value,
        targets: Value,
        taps: Value,
        tap_count: Value,
        weights: Value,
        bias: Value,
        group: Value,
        channel: Value,
        epilogue: Value,
    ) -> None:
        """``taps`` are int64 offsets in the window, a multiple of ``products_of`` the tier."""
        pixels, units, together = shape(e.tier).pixels, shape(e.tier).units, products_of(e.tier)
        begin = e.add(arena, channel)
        starts = [e.add(begin, e.load(I64, windows, 8 * m)) for m in range(pixels)]
        totals = [
            [e.variable(e.load(e.sums, bias, 4 * e.lanes * n)) for n in range(units)]
            for _ in range(pixels)
        ]
        row_kind = ir.VectorType(I8, units * e.lanes)
        size = e.bytes.count
        with e.loop(e.builder.sdiv(tap_count, I64(together))) as turn:
            entry = e.add(taps, e.multiply(turn, 8 * together))
            at = e.add(weights, e.multiply(turn, size * units))
            offsets = [e.load(I64, entry, 8 * i) for i in range(together)]
            loaded = [e.weights(at, size * n) for n in range(units)]
            for start, row in zip(starts, totals, strict=True):
                inputs = [e.load(row_kind, e.add(start, offset)) for offset in offsets]
                for total, found, values in zip(row, interleaved(e, inputs), loaded, strict=True):
                    e.set(total, e.dot(e.get(total), e.activations(found), values))
        sums = [[e.get(total) for total in row] for row in totals]
        finish(e, sums, targets, arena, group, channel, epilogue)

    return tile


def interleaved(e: Emitter, rows: Sequence[Value]) -> list[Value]:
    """Registers of bytes with one of each row in every lane.

    Rows are ``products_of`` vectors of as many bytes, a multiple of ``lanes``.
    """
    width = rows[0].type.count
    if e.tier is Tier.AVX512:
        # Two rows fill a register: one permutation of two registers brings four rows together.
        a, b = (_shuffled(e, rows[i], rows[i + 1], range(2 * width)) for i in (0, 2))
        places = [column + width * row for column in range(width) for row in range(4)]
        size = e.bytes.count
        return [_shuffled(e, a, b, places[i : i + size]) for i in range(0, len(places), size)]
    registers: list[Value] = []
    piece = min(_ZIPPED, width)
    for begin in range(0, width, piece):
        first, *more = (
            _zipped(e, rows[i], rows[i + 1], begin, piece, 1) for i in range(0, len(rows), 2)
        )
        for start in range(0, piece, e.lanes):
            if more:
                registers.append(_zipped(e, first, more[0], 2 * start, e.lanes, 2))
            else:
                order = range(2 * start, 2 * (start + e.lanes))
                registers.append(_shuffled(e, first, first, order))
    return registers


def _zipped(e: Emitter, a: Value, b: Value, begin: int, count: int, size: int) -> Value:
    """``count`` times ``size`` bytes of one vector and of the other, in turn."""
    order = [
        first + i
        for place in range(begin, begin + count * size, size)
        for first in (place, a.type.count + place)
        for i in range(size)
    ]
    return _shuffled(e, a, b, order)


def _shuffled(e: Emitter, a: Value, b: Value, order: Sequence[int]) -> Value:
    """The elements of two vectors at these places."""
    places = ir.Constant(ir.VectorType(I32, len(order)), list(order))
    return e.builder.shuffle_vector(a, b, places)


_wide, _narrow = depthwise_tile(depthwise_wide), depthwise_tile(depthwise_narrow)


@kernel
def depthwise_tiles(
    tag: Tag, step: Step, tables: Tables, work: Workspace, images: int, part: int, parts: int
) -> None:
    """One of so many parts of all rows of a block of images; see ``pack.pack_taps``."""
    wanted = images * step.height * step.width
    rows = max(wanted, step.tile)
    channels, size = step.channels, step.group_channels
    pitch = max(channels, size)
    integers, bytes_ = tables.integers.ctypes.data, tables.weights.ctypes.data
    arena = work.activations.ctypes.data
    fused = step.fused != 0
    epilogue = work.epilogue
    epilogue[0], epilogue[1], epilogue[2] = step.target_zero, step.lower, step.upper
    epilogue[3], epilogue[5] = channels, pitch
    epilogue[4] = 0 if fused else work.accumulators.ctypes.data
    finish_ = epilogue.ctypes.data
    taps, count = integers + 8 * step.taps, step.tap_count
    tiles = -(-rows // step.tile)
    for number in range(tiles * part // parts, tiles * (part + 1) // parts):
        row = min(number * step.tile, rows - step.tile)
        window, target = integers + 8 * (step.windows + row), integers + 8 * (step.targets + row)
        for group in range(step.groups):
            # The last group is moved back to end at the last channel.
            channel = max(min(group * size, channels - size), 0)
            weights = bytes_ + step.weights + group * size * count
            bias = bytes_ + step.bias + 4 * channel
            scales = bytes_ + step.factors + 4 * channel if fused else 0
            if step.small != 0:
                _narrow(
                    tag, arena, window, target, taps, count, weights, bias, scales, channel, finish_
                )
            else:
                _wide(
                    tag, arena, window, target, taps, count, weights, bias, scales, channel, finish_
                )
        if not fused:
            for i in range(min(step.tile, wanted)):
                begin = tables.integers[step.targets + row + i]
                requantize_channels(
                    step,
                    tables.integers,
                    work.accumulators[i * pitch : i * pitch + channels],
                    work.activations[begin : begin + channels],
                    0,
                )
