"""Interval tiles: both bounds of every sum at once, from the lower and the upper ends of inputs.

A positive weight takes the lower end of its input for the lower bound and the upper end for the
upper one, a negative weight the opposite. Which it is depends on the weight alone: the mask of a
register of weights is made once and serves all pixels, and each bound is one blend and one dot
product. Weights, windows and targets are those of the dense tiles; the upper ends lie in a second
arena, laid out like the first.

Sparse tiles (see ``permuted``) find their inputs in the same chunk of both arenas, and blend. One
permutation of two registers, the chunks of both arenas, could blend by itself, with the weight's
sign in bit 6 of a place: that is no faster, and leaves no bit for a second chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from cactus_edge.kernels.simd.dense import finish, first_sums
from cactus_edge.kernels.simd.emit import I16, I64, Emitter, Shape, Value, wide
from cactus_edge.kernels.simd.tags import emitted
from cactus_edge.kernels.simd.tiers import Tier

# Half the sums of a dense tile for each bound; blends need registers too.
_PIXELS = {Tier.AVX512: 4, Tier.AVXVNNI: 2, Tier.AVX2: 1, Tier.DOTPROD: 2, Tier.NEON: 2}
_NARROW_PIXELS = {Tier.AVX512: 8, Tier.AVXVNNI: 4, Tier.AVX2: 2, Tier.DOTPROD: 4, Tier.NEON: 4}


def wide_interval(tier: Tier) -> Shape:
    """For many channels; as many as a wide dense tile has."""
    return Shape(_PIXELS[tier], wide(tier).units)


def narrow_interval(tier: Tier) -> Shape:
    """For few channels; as many as a narrow dense tile has."""
    return Shape(_NARROW_PIXELS[tier], 1)


def interval_tile(shape: Callable[[Tier], Shape]) -> Any:
    """A tile of all steps."""

    @emitted(12)
    def tile(
        e: Emitter,
        arena: Value,
        upper_arena: Value,
        windows: Value,
        targets: Value,
        runs: Value,
        run_count: Value,
        weights: Value,
        bias: Value,
        group: Value,
        channel: Value,
        epilogue: Value,
        upper_epilogue: Value,
    ) -> None:
        """As ``dense_tile``, with another arena and epilogue for the upper bounds."""
        t = _Tile.begin(e, shape(e.tier), arena, upper_arena, windows, bias)
        stream = e.variable(weights)
        with e.loop(run_count) as run:
            entry = e.add(runs, e.multiply(run, 16))
            offset, steps = e.load(I64, entry), e.load(I64, entry, 8)
            places = [e.add(start, offset) for start in t.starts]
            with e.loop(steps) as step:
                at = e.get(stream)
                t.dense_step(at, places, e.multiply(step, 4))
                e.set(stream, e.add(at, 4 * e.channels * t.registers))
        t.finish(targets, group, channel, epilogue, upper_epilogue)

    return tile


def interval_permuted_tile(shape: Callable[[Tier], Shape]) -> Any:
    """A tile of the steps of ``permuted.permuted_tile``."""

    @emitted(15)
    def tile(
        e: Emitter,
        arena: Value,
        upper_arena: Value,
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
        upper_epilogue: Value,
    ) -> None:
        """As ``permuted_tile``, with another arena and epilogue for the upper bounds."""
        t = _Tile.begin(e, shape(e.tier), arena, upper_arena, windows, bias)
        with e.loop(single_count) as step:
            offset = e.load_int32(e.add(singles, e.multiply(step, 4)))
            t.permuted_step(single_stream, step, [offset])
        if e.tier is Tier.AVX512:
            with e.loop(dual_count) as step:
                entry = e.add(duals, e.multiply(step, 8))
                offsets = [e.load_int32(entry, 4 * i) for i in (0, 1)]
                t.permuted_step(dual_stream, step, offsets)
        t.finish(targets, group, channel, epilogue, upper_epilogue)

    return tile


@dataclass(frozen=True, eq=False)
class _Tile:
    """What both kinds of tiles share; ``lower`` and ``upper`` are sums [pixels][registers]."""

    e: Emitter
    arena: Value
    upper_arena: Value
    distance: Value
    starts: list[Value]
    lower: list[list[Value]]
    upper: list[list[Value]]

    @staticmethod
    def begin(
        e: Emitter, shape: Shape, arena: Value, upper_arena: Value, windows: Value, bias: Value
    ) -> _Tile:
        """Windows of the pixels, and sums that begin with the bias."""
        starts = [e.add(arena, e.load(I64, windows, 8 * m)) for m in range(shape.pixels)]
        first = [first_sums(e, bias, n) for n in range(shape.units * e.parts)]
        lower, upper = ([[e.variable(value) for value in first] for _ in starts] for _ in range(2))
        distance = e.builder.sub(upper_arena, arena)
        return _Tile(e, arena, upper_arena, distance, starts, lower, upper)

    @property
    def registers(self) -> int:
        """Registers of weights in a step."""
        return len(self.lower[0])

    def add(self, m: int, n: int, least: Value, most: Value, weights: Value) -> None:
        """Add the products of a register of weights to both sums of a pixel."""
        for totals, values in ((self.lower, least), (self.upper, most)):
            slot = totals[m][n]
            self.e.set(slot, self.e.dot(self.e.get(slot), values, weights))

    def dense_step(self, at: Value, places: Sequence[Value], offset: Value) -> None:
        """Weights at an address, times the four bytes at an offset from each place."""
        e, size = self.e, 4 * self.e.channels
        weights = [e.weights(at, size * n) for n in range(self.registers)]
        masks = [_negative(e, values) for values in weights]
        for m, place in enumerate(places):
            here = e.add(place, offset)
            low, high = e.spread(here), e.spread(e.add(here, self.distance))
            for n, values in enumerate(weights):
                least = e.builder.select(masks[n], high, low)
                most = e.builder.select(masks[n], low, high)
                self.add(m, n, least, most, values)

    def permuted_step(self, stream: Value, step: Value, offsets: Sequence[Value]) -> None:
        """A step of a stream, from the chunks at one or two offsets in each window."""
        e, size = self.e, 4 * self.e.channels
        at = e.add(stream, e.multiply(step, 2 * size * self.registers))
        places, weights = (
            [e.weights(at, size * (part * self.registers + n)) for n in range(self.registers)]
            for part in (0, 1)
        )
        masks = [_negative(e, values) for values in weights]
        for m, start in enumerate(self.starts):
            begins = [e.add(start, offset) for offset in offsets]
            above = [e.add(begin, self.distance) for begin in begins]
            if e.tier is Tier.AVX512:
                begins, above = ([e.weights(a) for a in ends] for ends in (begins, above))
            for n, values in enumerate(weights):
                low, high = (_found(e, ends, places[n]) for ends in (begins, above))
                least = e.builder.select(masks[n], high, low)
                most = e.builder.select(masks[n], low, high)
                self.add(m, n, least, most, values)

    def finish(
        self, targets: Value, group: Value, channel: Value, epilogue: Value, upper_epilogue: Value
    ) -> None:
        """Requantize and write both bounds."""
        e = self.e
        for totals, memory, end in (
            (self.lower, self.arena, epilogue),
            (self.upper, self.upper_arena, upper_epilogue),
        ):
            rows = [e.merge([e.get(total) for total in row]) for row in totals]
            finish(e, rows, targets, memory, group, channel, end)


def _found(e: Emitter, chunks: Sequence[Value], places: Value) -> Value:
    """What lies at places in one chunk or two: on AVX512 in registers, else in memory."""
    if len(chunks) == 2:
        return e.permute_two(chunks, places)
    if e.tier is Tier.AVX512:
        return e.permute_loaded(chunks[0], places)
    return e.permute(chunks[0], places)


def _negative(e: Emitter, weights: Value) -> Value:
    """A mask of the weights below 0, as wide as ``Emitter.spread`` makes activations."""
    if e.tier is Tier.AVX2:
        weights = e.builder.sext(weights, ir.VectorType(I16, 4 * e.channels))
    zero = ir.Constant(weights.type, [0] * weights.type.count)
    return e.builder.icmp_signed("<", weights, zero)
