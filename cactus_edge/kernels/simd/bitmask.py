"""Sparse streams for half-empty weights: a mask says where they lie, and they are spread out.

A step multiplies as many weights as a dense one and reads fewer bytes, whatever the pattern of
zeros; it pays where weights come from a slow cache. See ``formats.bitmask``.
"""

from __future__ import annotations

from typing import Any

from cactus_edge.kernels.simd.dense import collected, finish, first_sums
from cactus_edge.kernels.simd.emit import I64, Emitter, Value
from cactus_edge.kernels.simd.tags import emitted
from cactus_edge.kernels.simd.tiers import Tier

_PHASES = 4
_LINE = 64
_MASKS_AHEAD, _VALUES_AHEAD = 1024, 4096


def bitmask_stream() -> Any:
    """A single window and one register of channels (AVX512; empty elsewhere)."""

    @emitted(11)
    def tile(
        e: Emitter,
        arena: Value,
        windows: Value,
        targets: Value,
        runs: Value,
        run_count: Value,
        masks: Value,
        values: Value,
        bias: Value,
        group: Value,
        channel: Value,
        epilogue: Value,
    ) -> None:
        """``runs`` are int64 pairs (offset in the window, steps); a mask has 8 bytes."""
        if e.tier is not Tier.AVX512:
            return
        b = e.builder
        start = e.add(arena, e.load(I64, windows))
        totals = [
            [e.variable(first_sums(e, bias, 0) if f == 0 else e.zero())] for f in range(_PHASES)
        ]
        mask_at, value_at = e.variable(masks), e.variable(values)

        def step(place: Value, row: list[Value], mask: Value, at: Value) -> Value:
            weights = e.expand(at, mask)
            e.set(row[0], e.dot(e.get(row[0]), e.spread(place), weights))
            return e.add(at, e.call("llvm.ctpop.i64", I64, [mask]))

        with e.loop(run_count) as run:
            entry = e.add(runs, e.multiply(run, 16))
            place, steps = e.add(start, e.load(I64, entry)), e.load(I64, entry, 8)
            turns = b.sdiv(steps, I64(_PHASES))
            with e.loop(turns) as turn:
                here, at, first = e.get(mask_at), e.get(value_at), e.multiply(turn, 4 * _PHASES)
                e.prefetch(e.add(here, _MASKS_AHEAD))
                for line in range(3):
                    e.prefetch(e.add(at, _VALUES_AHEAD + line * _LINE))
                for f in range(_PHASES):
                    mask = e.load(I64, here, 8 * f)
                    at = step(e.add(e.add(place, first), 4 * f), totals[f], mask, at)
                e.set(value_at, at)
                e.set(mask_at, e.add(here, 8 * _PHASES))
            done = e.multiply(turns, _PHASES)
            with e.loop(b.sub(steps, done)) as rest:
                here = e.get(mask_at)
                position = e.multiply(e.add(done, rest), 4)
                mask = e.load(I64, here)
                e.set(value_at, step(e.add(place, position), totals[0], mask, e.get(value_at)))
                e.set(mask_at, e.add(here, 8))
        finish(e, [collected(e, totals)], targets, arena, group, channel, epilogue)

    return tile
