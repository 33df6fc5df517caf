"""Dense tiles: some output pixels times some registers of output channels, all sums in registers.

Every weight that is loaded serves all pixels of the tile, every activation all its channels. A tile
reads its windows where they lie in memory; nothing is gathered or transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from cactus_edge.kernels.simd.emit import I32, I64, Emitter, Shape, Value
from cactus_edge.kernels.simd.tags import emitted
from cactus_edge.kernels.simd.tiers import Tier

ShapeOf = Callable[[Tier], Shape]

_LINE = 64
_AHEAD = 4096
"""Bytes of weights that a stream asks for in advance."""


def finish(
    e: Emitter,
    totals: Sequence[Sequence[Value]],
    targets: Value,
    arena: Value,
    group: Value,
    channel: Value,
    epilogue: Value,
) -> None:
    """Requantize and write a tile.

    Args:
        e: the emitter.
        totals: sums of each pixel, one lane for each channel.
        targets: address of int64 [pixels]: where in the arena each pixel begins.
        arena: its address.
        group: address of the group's scales, float32 [channels].
        channel: int64, the group's first channel.
        epilogue: address of int64 (zero, lower, upper, channels, scratch, pitch). Where ``scratch``
            is not 0, sums are written there as int32 [pixels, pitch] for other roundings.
    """
    b = e.builder
    scratch = e.load(I64, epilogue, 32)
    with b.if_else(b.icmp_signed("==", scratch, I64(0))) as (fused, other):
        with fused:
            zero, lower, upper = (
                e.splat(b.trunc(e.load(I64, epilogue, 8 * i), I32), e.lanes) for i in range(3)
            )
            left = b.sub(e.load(I64, epilogue, 24), channel)
            width = e.lanes * len(totals[0])
            packed = [
                [
                    e.requantize(t, e.add(group, 4 * e.lanes * n), zero, lower, upper)
                    for n, t in enumerate(row)
                ]
                for row in totals
            ]
            places = [
                e.add(e.add(arena, e.load(I64, targets, 8 * m)), channel)
                for m in range(len(totals))
            ]
            with b.if_else(b.icmp_signed(">=", left, I64(width))) as (whole, part):
                with whole:
                    for place, row in zip(places, packed, strict=True):
                        for n, values in enumerate(row):
                            e.store(values, place, n * e.lanes)
                with part:
                    for place, row in zip(places, packed, strict=True):
                        for n, values in enumerate(row):
                            rest = e.add(left, -n * e.lanes)
                            e.store_some(values, e.add(place, n * e.lanes), rest)
        with other:
            pitch = e.multiply(e.load(I64, epilogue, 40), 4)
            place = e.add(scratch, e.multiply(channel, 4))
            for m, row in enumerate(totals):
                for n, values in enumerate(row):
                    e.store(values, place, 4 * e.lanes * n)
                if m + 1 < len(totals):
                    place = e.add(place, pitch)


def dense_tile(shape: ShapeOf) -> Any:
    """A tile of all steps."""

    @emitted(10)
    def tile(
        e: Emitter,
        arena: Value,
        windows: Value,
        targets: Value,
        runs: Value,
        run_count: Value,
        weights: Value,
        bias: Value,
        group: Value,
        channel: Value,
        epilogue: Value,
    ) -> None:
        """``runs`` are int64 pairs (offset in the window, steps of four bytes)."""
        pixels, registers = shape(e.tier).pixels, shape(e.tier).units * e.parts
        starts = [e.add(arena, e.load(I64, windows, 8 * m)) for m in range(pixels)]
        totals = [
            [e.variable(first_sums(e, bias, n)) for n in range(registers)] for _ in range(pixels)
        ]
        stream = e.variable(weights)
        size = 4 * e.channels
        with e.loop(run_count) as run:
            entry = e.add(runs, e.multiply(run, 16))
            offset, steps = e.load(I64, entry), e.load(I64, entry, 8)
            places = [e.add(start, offset) for start in starts]
            with e.loop(steps) as step:
                at = e.get(stream)
                loaded = [e.weights(at, size * n) for n in range(registers)]
                four = e.multiply(step, 4)
                for place, row in zip(places, totals, strict=True):
                    activations = e.spread(e.add(place, four))
                    for total, values in zip(row, loaded, strict=True):
                        e.set(total, e.dot(e.get(total), activations, values))
                e.set(stream, e.add(at, size * registers))
        rows = [e.merge([e.get(total) for total in row]) for row in totals]
        finish(e, rows, targets, arena, group, channel, epilogue)

    return tile


def stream_tile(shape: ShapeOf, *, nibbles: bool) -> Any:
    """A single window: weights are read once, so what counts is how fast they arrive.

    Steps come in multiples of the shape's phases. With ``nibbles`` a register of bytes holds two
    steps; every weight is multiplied by 16 where it lies: high nibbles are masked, low ones
    shifted.
    """

    @emitted(10)
    def tile(
        e: Emitter,
        arena: Value,
        windows: Value,
        targets: Value,
        runs: Value,
        run_count: Value,
        weights: Value,
        bias: Value,
        group: Value,
        channel: Value,
        epilogue: Value,
    ) -> None:
        """As ``dense_tile`` of one pixel."""
        b, phases, registers = e.builder, shape(e.tier).phases, shape(e.tier).units * e.parts
        start = e.add(arena, e.load(I64, windows))
        totals = [
            [
                e.variable(scaled_bias(e, bias, n, nibbles) if f == 0 else e.zero())
                for n in range(registers)
            ]
            for f in range(phases)
        ]
        stream = e.variable(weights)
        size = 4 * e.channels
        turn_bytes = size * registers * phases // (2 if nibbles else 1)
        with e.loop(run_count) as run:
            entry = e.add(runs, e.multiply(run, 16))
            place = e.add(start, e.load(I64, entry))
            with e.loop(b.sdiv(e.load(I64, entry, 8), I64(phases))) as turn:
                at = e.get(stream)
                for line in range(0, turn_bytes, _LINE):
                    e.prefetch(e.add(at, _AHEAD + line))
                here = e.add(place, e.multiply(turn, 4 * phases))
                for f in range(phases):
                    activations = e.spread(here, 4 * f)
                    for n in range(registers):
                        if nibbles:
                            packed = e.weights(at, size * (f // 2 * registers + n))
                            values = e.high_nibbles(packed) if f % 2 else e.low_nibbles(packed)
                        else:
                            values = e.weights(at, size * (f * registers + n))
                        total = totals[f][n]
                        e.set(total, e.dot(e.get(total), activations, values))
                e.set(stream, e.add(at, turn_bytes))
        finish(e, [collected(e, totals, nibbles)], targets, arena, group, channel, epilogue)

    return tile


def block_tile(shape: ShapeOf) -> Any:
    """A dense tile of which only some steps are there: those with a weight that is not zero."""

    @emitted(10)
    def tile(
        e: Emitter,
        arena: Value,
        windows: Value,
        targets: Value,
        offsets: Value,
        count: Value,
        weights: Value,
        bias: Value,
        group: Value,
        channel: Value,
        epilogue: Value,
    ) -> None:
        """``offsets`` are int32 [count]: where in the window each step's four bytes lie."""
        pixels, registers = shape(e.tier).pixels, shape(e.tier).units * e.parts
        starts = [e.add(arena, e.load(I64, windows, 8 * m)) for m in range(pixels)]
        totals = [
            [e.variable(first_sums(e, bias, n)) for n in range(registers)] for _ in range(pixels)
        ]
        size = 4 * e.channels
        with e.loop(count) as step:
            offset = e.load_int32(e.add(offsets, e.multiply(step, 4)))
            at = e.add(weights, e.multiply(step, size * registers))
            loaded = [e.weights(at, size * n) for n in range(registers)]
            for start, row in zip(starts, totals, strict=True):
                activations = e.spread(e.add(start, offset))
                for total, values in zip(row, loaded, strict=True):
                    e.set(total, e.dot(e.get(total), activations, values))
        rows = [e.merge([e.get(total) for total in row]) for row in totals]
        finish(e, rows, targets, arena, group, channel, epilogue)

    return tile


def scaled_bias(e: Emitter, bias: Value, register: int, nibbles: bool) -> Value:
    """The first sums; 16 times the bias where weights are."""
    first = first_sums(e, bias, register)
    return e.builder.shl(first, e.constant(e.sums, 4)) if nibbles else first


def collected(e: Emitter, totals: Sequence[Sequence[Value]], nibbles: bool = False) -> list[Value]:
    """Sums over the phases, one lane for each channel."""
    b = e.builder
    sums = [e.get(total) for total in totals[0]]
    for row in totals[1:]:
        sums = [b.add(a, e.get(total)) for a, total in zip(sums, row, strict=True)]
    sums = e.merge(sums)
    return [b.ashr(value, e.constant(e.sums, 4)) for value in sums] if nibbles else sums


def first_sums(e: Emitter, bias: Value, register: int) -> Value:
    """The bias in the lanes of a channel; where it has two, in the first of them."""
    if e.lanes == e.channels:
        return e.load(e.sums, bias, 4 * e.lanes * register)
    half = e.load(ir.VectorType(I32, e.channels), bias, 4 * e.channels * register)
    order = [i // 2 if i % 2 == 0 else e.channels for i in range(e.lanes)]
    none = ir.Constant(half.type, [0] * e.channels)
    return e.builder.shuffle_vector(half, none, ir.Constant(ir.VectorType(I32, e.lanes), order))
