"""One window with many inputs at the zero point: what they would add is 0, so no weight is read.

A kernel adds ``weight * (byte - shift)``, see ``emit.activation_shift``, and a step of four inputs
whose bytes all are the shift adds nothing: to leave it out is exact. ``live_scan`` lists the other
steps once for all channels; a tile reads the weights of those alone. With nibbles a step is eight
inputs, as they are packed.

::

    bytes of the window    .... 7..9 .... .... 3... 1582      (. is the zero point)
    list of live steps     3 | 1, offset 4 | 4, offset 16 | 5, offset 20 | the next group's first
    weights of a group     |  -  | step 1 |  -  |  -  | step 4 | step 5 |

The entries behind the last one name weights of the next group of channels, so that those that come
first are on their way when it begins; no tile multiplies them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cactus_edge.kernels.simd.dense import collected, finish, scaled_bias
from cactus_edge.kernels.simd.emit import I32, I64, Emitter, Value, activation_shift, skipping
from cactus_edge.kernels.simd.tags import emitted

AHEAD = 16
"""Steps whose weights are asked for in advance; so many entries lie behind the live ones."""
ENTRIES = 8
"""Bytes before the entries: their number, int64."""
_LINE = 64
_CHUNK = 32
"""Bytes of a window that are looked at together: most of the dead ones have dead neighbours."""


def live_scan(*, nibbles: bool) -> Any:
    """List the live steps of a window."""
    width = 8 if nibbles else 4

    @emitted(6)
    def scan(
        e: Emitter,
        arena: Value,
        windows: Value,
        runs: Value,
        run_count: Value,
        steps: Value,
        live: Value,
    ) -> None:
        """Write ``live``: how many there are, then int32 pairs (step, offset in the window).

        ``runs`` are int64 pairs (offset in the window, fours of bytes), ``steps`` those of a group.
        """
        b = e.builder
        dead = bytes([activation_shift(e.tier)])
        start = e.add(arena, e.load(I64, windows))
        first = e.add(live, ENTRIES)
        end, number = e.variable(first), e.variable(I64(0))

        def bytes_at(offset: Value, size: int) -> Value:
            """Whether any of so many bytes is not the zero point."""
            kind = ir.IntType(8 * size)
            values = e.load(kind, e.add(start, offset))
            return b.icmp_unsigned("!=", values, kind(int.from_bytes(dead * size, "little")))

        def append(offset: Value, step: Value) -> None:
            """Written in any case, and overwritten if the step is dead: nothing to mispredict."""
            at = e.get(end)
            e.store(b.or_(b.shl(offset, I64(32)), step), at)
            e.set(end, e.add(at, e.multiply(b.zext(bytes_at(offset, width), I64), 8)))

        with e.loop(run_count) as run:
            entry = e.add(runs, e.multiply(run, 16))
            offset, count = e.load(I64, entry), b.udiv(e.load(I64, entry, 8), I64(width // 4))
            begin = e.get(number)
            chunks = b.udiv(count, I64(_CHUNK // width))
            with e.loop(chunks) as chunk:
                place = e.add(offset, e.multiply(chunk, _CHUNK))
                step = e.add(begin, e.multiply(chunk, _CHUNK // width))
                with b.if_then(bytes_at(place, _CHUNK)):
                    for i in range(_CHUNK // width):
                        append(e.add(place, width * i), e.add(step, i))
            done = e.multiply(chunks, _CHUNK // width)
            with e.loop(b.sub(count, done)) as rest:
                step = e.add(done, rest)
                append(e.add(offset, e.multiply(step, width)), e.add(begin, step))
            e.set(number, e.add(begin, count))
        found = b.lshr(b.sub(e.get(end), first), I64(3))
        e.store(found, live)
        with b.if_then(b.icmp_unsigned("!=", found, I64(0))), e.loop(I64(AHEAD)) as i:
            entry = e.load(I64, e.add(first, e.multiply(i, 8)))
            e.store(e.add(entry, steps), e.add(e.get(end), e.multiply(i, 8)))

    return scan


def skipping_tile(*, nibbles: bool) -> Any:
    """A single window: the steps of a list alone, for some channels."""

    @emitted(9)
    def tile(
        e: Emitter,
        arena: Value,
        windows: Value,
        targets: Value,
        live: Value,
        weights: Value,
        bias: Value,
        group: Value,
        channel: Value,
        epilogue: Value,
    ) -> None:
        """``live`` is what ``live_scan`` has written."""
        b, shape = e.builder, skipping(e.tier)
        phases, registers = shape.phases, shape.units * e.parts
        start = e.add(arena, e.load(I64, windows))
        totals = [
            [
                e.variable(scaled_bias(e, bias, n, nibbles) if f == 0 else e.zero())
                for n in range(registers)
            ]
            for f in range(phases)
        ]
        size = 4 * e.channels
        step_bytes = size * registers

        def weights_of(entry: Value, ahead: int = 0) -> Value:
            step = b.zext(e.load(I32, entry, 8 * ahead), I64)
            return e.add(weights, e.multiply(step, step_bytes))

        def add(entry: Value, number: int) -> None:
            """A step to the sums of its turn."""
            for line in range(0, step_bytes, _LINE):
                e.prefetch(e.add(weights_of(entry, AHEAD), line))
            at, place = weights_of(entry), e.add(start, e.load_int32(entry, 4))
            for half in range(2 if nibbles else 1):
                activations = e.spread(place, 4 * half)
                row = totals[(2 * number + half if nibbles else number) % phases]
                for n, total in enumerate(row):
                    values = e.weights(at, size * n)
                    if nibbles:
                        values = e.high_nibbles(values) if half else e.low_nibbles(values)
                    e.set(total, e.dot(e.get(total), activations, values))

        together = max(1, phases // (2 if nibbles else 1))
        entries = e.add(live, ENTRIES)
        count = e.load(I64, live)
        turns = b.udiv(count, I64(together))
        with e.loop(turns) as turn:
            here = e.add(entries, e.multiply(turn, 8 * together))
            for number in range(together):
                add(e.add(here, 8 * number), number)
        if together > 1:
            done = e.multiply(turns, together)
            with e.loop(b.sub(count, done)) as rest:
                add(e.add(entries, e.multiply(e.add(done, rest), 8)), 0)
        finish(e, [collected(e, totals, nibbles)], targets, arena, group, channel, epilogue)

    return tile
