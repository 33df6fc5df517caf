"""Sparse tiles: each output channel picks its inputs out of chunks that all channels share.

A register holds four non-zero weights of each channel, and another one the places of their inputs
in a chunk of the window. One permutation and one dot product compute four products of every
channel, whatever the pattern of zeros. A *single* step picks from one chunk, a *dual* step from two
(AVX512). See ``formats``.
"""

from __future__ import annotations

from typing import Any

from cactus_edge.kernels.simd.dense import ShapeOf, collected, finish, first_sums
from cactus_edge.kernels.simd.emit import I64, Emitter, Value
from cactus_edge.kernels.simd.tags import emitted
from cactus_edge.kernels.simd.tiers import Tier

_LINE = 64
_AHEAD = 4096


def permuted_tile(shape: ShapeOf) -> Any:
    """A tile of many windows; all registers of channels share each chunk."""

    @emitted(13)
    def tile(
        e: Emitter,
        arena: Value,
        windows: Value,
        targets: Value,
        singles: Value,
        single_count: Value,
        single_stream: Value,
        duals: Value,
        dual_count: Value,
        dual_stream: Value,
        bias: Value,
        group: Value,
        channel: Value,
        epilogue: Value,
    ) -> None:
        """``singles`` int32 [n] and ``duals`` int32 [n, 2]: where in the window chunks begin.

        Streams are bytes [n, 2, registers, bytes of a register]: places, then weights.
        """
        pixels, registers = shape(e.tier).pixels, shape(e.tier).units * e.parts
        starts = [e.add(arena, e.load(I64, windows, 8 * m)) for m in range(pixels)]
        totals = [
            [e.variable(first_sums(e, bias, n)) for n in range(registers)] for _ in range(pixels)
        ]
        size = 4 * e.channels
        with e.loop(single_count) as step:
            offset = e.load_int32(e.add(singles, e.multiply(step, 4)))
            at = e.add(single_stream, e.multiply(step, 2 * size * registers))
            places = [e.weights(at, size * n) for n in range(registers)]
            weights = [e.weights(at, size * (registers + n)) for n in range(registers)]
            for start, row in zip(starts, totals, strict=True):
                chunk = e.add(start, offset)
                for n, total in enumerate(row):
                    found = e.permute(chunk, places[n])
                    e.set(total, e.dot(e.get(total), found, weights[n]))
        if e.tier is Tier.AVX512:
            with e.loop(dual_count) as step:
                entry = e.add(duals, e.multiply(step, 8))
                offsets = [e.load_int32(entry, 4 * i) for i in (0, 1)]
                at = e.add(dual_stream, e.multiply(step, 2 * size * registers))
                places = [e.weights(at, size * n) for n in range(registers)]
                weights = [e.weights(at, size * (registers + n)) for n in range(registers)]
                for start, row in zip(starts, totals, strict=True):
                    chunks = [e.weights(e.add(start, offset)) for offset in offsets]
                    for n, total in enumerate(row):
                        found = e.permute_two(chunks, places[n])
                        e.set(total, e.dot(e.get(total), found, weights[n]))
        rows = [e.merge([e.get(total) for total in row]) for row in totals]
        finish(e, rows, targets, arena, group, channel, epilogue)

    return tile


def permuted_stream(shape: ShapeOf) -> Any:
    """A single window and one unit of channels."""

    @emitted(13)
    def tile(
        e: Emitter,
        arena: Value,
        windows: Value,
        targets: Value,
        singles: Value,
        single_count: Value,
        single_stream: Value,
        duals: Value,
        dual_count: Value,
        dual_stream: Value,
        bias: Value,
        group: Value,
        channel: Value,
        epilogue: Value,
    ) -> None:
        """As ``permuted_tile``."""
        start = e.add(arena, e.load(I64, windows))
        phases = shape(e.tier).phases
        totals = [
            [e.variable(first_sums(e, bias, n) if f == 0 else e.zero()) for n in range(e.parts)]
            for f in range(phases)
        ]
        _stream(e, start, totals, singles, single_count, single_stream, chunks=1)
        if e.tier is Tier.AVX512:
            _stream(e, start, totals, duals, dual_count, dual_stream, chunks=2)
        finish(e, [collected(e, totals)], targets, arena, group, channel, epilogue)

    return tile


def _stream(
    e: Emitter,
    start: Value,
    totals: list[list[Value]],
    offsets: Value,
    count: Value,
    stream: Value,
    *,
    chunks: int,
) -> None:
    """All steps of one kind, in turn for each set of sums."""
    size = 4 * e.channels

    def step(number: Value, row: list[Value]) -> None:
        entry = e.add(offsets, e.multiply(number, 4 * chunks))
        at = e.add(stream, e.multiply(number, 2 * size * e.parts))
        for line in range(0, 2 * size * e.parts, _LINE):
            e.prefetch(e.add(at, _AHEAD + line))
        begins = [e.add(start, e.load_int32(entry, 4 * i)) for i in range(chunks)]
        for n, total in enumerate(row):
            places, weights = (e.weights(at, size * (i * e.parts + n)) for i in (0, 1))
            if chunks == 2:
                found = e.permute_two([e.weights(begin) for begin in begins], places)
            else:
                found = e.permute(begins[0], places)
            e.set(total, e.dot(e.get(total), found, weights))

    turns = e.builder.sdiv(count, I64(len(totals)))
    with e.loop(turns) as turn:
        for f, row in enumerate(totals):
            step(e.add(e.multiply(turn, len(totals)), f), row)
    done = e.multiply(turns, len(totals))
    with e.loop(e.builder.sub(count, done)) as rest:
        step(e.add(done, rest), totals[0])
