"""What the machine can do at best: byte products from registers, bytes from each level of memory.

The loops are emitted with the very instructions of the kernels' fastest tier, so that a ceiling is
one of these kernels. Each is run for a while and the fastest turn counts: whatever else the machine
does can only lower it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cactus_edge.bench import machine
from cactus_edge.errors import ToolError
from cactus_edge.kernels.jit import entry
from cactus_edge.kernels.simd.emit import I32, I64, Emitter, Value, channels_of
from cactus_edge.kernels.simd.tags import Tag, emitted
from cactus_edge.kernels.simd.tiers import Tier, choose

_LINE = 64
_PLACES = 16
_BUFFER = 2 * _PLACES * _LINE
_LOADS = 8
_AHEAD = 4096
_GRAIN = _LOADS * _LINE
_TURN_SECONDS = 0.01
_TURNS = 20
_DRAM_BYTES = 256 << 20
_DEFAULT_CACHES = {"L1": 32 << 10, "L2": 512 << 10}


@dataclass(frozen=True)
class Ceilings:
    """Of one thread.

    Attributes:
        tier: whose instructions were used.
        products: of int8, in thousand millions a second (GMAC/s).
        bandwidth: gigabytes a second that are read from each level, ``L1`` to ``DRAM``.
        capacity: bytes of each level but the last.
    """

    tier: str
    products: float
    bandwidth: dict[str, float]
    capacity: dict[str, int]

    def level_of(self, size: int) -> str:
        """The first level that holds so many bytes."""
        return next((level for level, held in self.capacity.items() if size <= held), "DRAM")


def measure() -> Ceilings:
    """Measure on this thread, in about two seconds.

    Raises:
        ToolError: the kernels have no vector instructions for this CPU.
    """
    tier = choose()
    if tier is Tier.PLAIN:
        raise ToolError("this CPU has none of the vector instructions that ceilings are made of")
    tag = Tag(tier)
    capacity = machine.caches() or _DEFAULT_CACHES
    buffer = np.zeros(_BUFFER + _LINE, np.uint8)
    each = 4 * channels_of(tier) * _sums(tier)
    address = _aligned(buffer)
    products = each * _fastest(lambda turns: _products(tag, address, turns))
    bandwidth: dict[str, float] = {}
    for level, size in {**{k: v // 2 for k, v in capacity.items()}, "DRAM": _DRAM_BYTES}.items():
        bandwidth[level] = _bandwidth(tag, size // _GRAIN * _GRAIN) / 1e9
    return Ceilings(str(tier), products / 1e9, bandwidth, capacity)


def _bandwidth(tag: Tag, size: int) -> float:
    """Bytes a second over a buffer of that size, with prefetching or without, as is faster."""
    buffer = np.ones(size + _LINE, np.uint8)
    address = _aligned(buffer)
    plain = _fastest(lambda turns: _read(tag, address, size // _GRAIN, turns))
    ahead = _fastest(lambda turns: _read_ahead(tag, address, size // _GRAIN, turns))
    return size * max(plain, ahead)


def _fastest(run: Callable[[int], int]) -> float:
    """Turns a second of ``run(turns)``, compiled by the first call."""
    run(1)
    turns, seconds = 1, 0.0
    while seconds < _TURN_SECONDS and turns < 1 << 40:
        turns *= 2
        begin = time.perf_counter()
        run(turns)
        seconds = time.perf_counter() - begin
    best = seconds
    for _ in range(_TURNS):
        begin = time.perf_counter()
        run(turns)
        best = min(best, time.perf_counter() - begin)
    return turns / best


def _aligned(buffer: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> int:
    """The first address in the buffer at which a cache line begins."""
    return buffer.ctypes.data + -buffer.ctypes.data % _LINE


def _sums(tier: Tier) -> int:
    """Independent sums: dot products take up to five cycles, two at a time; AVX2 has 16 registers.

    Without a dot product there are fewer, for the pairs that are in flight need registers too.
    """
    return {Tier.AVXVNNI: 12, Tier.AVX2: 8}.get(tier, 16)


def _emit_products(e: Emitter, address: Value, turns: Value) -> Value:
    """Two registers of weights from the first-level cache serve half of the sums each."""
    count = _sums(e.tier)
    size = 4 * e.channels
    activations = [e.activations(e.weights(address, size * i)) for i in range(count // 2)]
    totals = [e.variable(e.zero()) for _ in range(count)]
    with e.loop(turns) as turn:
        # Other weights in each turn, or products that stay the same would be computed once.
        at = e.add(address, e.multiply(e.builder.and_(turn, I64(_PLACES - 1)), 2 * size))
        for half in range(2):
            weights = e.weights(at, size * half)
            for i, values in enumerate(activations):
                total = totals[half * len(activations) + i]
                e.set(total, e.dot(e.get(total), values, weights))
    return _collapsed(e, totals)


def _emit_read(e: Emitter, address: Value, blocks: Value, turns: Value, ahead: int) -> Value:
    """Add up blocks of ``_GRAIN`` bytes, again and again."""
    width = 4 * e.lanes
    totals = [e.variable(e.zero()) for _ in range(_LOADS)]
    with e.loop(turns), e.loop(blocks) as block:
        at = e.add(address, e.multiply(block, _GRAIN))
        for line in range(0, _GRAIN if ahead else 0, _LINE):
            e.prefetch(e.add(at, ahead + line))
        for i in range(_GRAIN // width):
            total = totals[i % _LOADS]
            e.set(total, e.builder.add(e.get(total), e.load(e.sums, at, width * i)))
    return _collapsed(e, totals)


def _collapsed(e: Emitter, totals: list[Value]) -> Value:
    """Something that depends on every sum."""
    result = e.get(totals[0])
    for total in totals[1:]:
        result = e.builder.add(result, e.get(total))
    return e.builder.sext(e.call(f"llvm.vector.reduce.add.v{e.lanes}i32", I32, [result]), I64)


@emitted(2, returns=True)
def _product_loop(e: Emitter, address: Value, turns: Value) -> Value:
    return _emit_products(e, address, turns)


@emitted(3, returns=True)
def _read_loop(e: Emitter, address: Value, blocks: Value, turns: Value) -> Value:
    return _emit_read(e, address, blocks, turns, 0)


@emitted(3, returns=True)
def _read_ahead_loop(e: Emitter, address: Value, blocks: Value, turns: Value) -> Value:
    return _emit_read(e, address, blocks, turns, _AHEAD)


@entry
def _products(tag: Tag, address: int, turns: int) -> int:
    return _product_loop(tag, address, turns)


@entry
def _read(tag: Tag, address: int, blocks: int, turns: int) -> int:
    return _read_loop(tag, address, blocks, turns)


@entry
def _read_ahead(tag: Tag, address: int, blocks: int, turns: int) -> int:
    return _read_ahead_loop(tag, address, blocks, turns)
