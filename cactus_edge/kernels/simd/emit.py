"""Emitting LLVM IR for vectors: what differs between tiers, and nothing else.

A register holds ``lanes`` int32 sums. Weights come in groups of four bytes for each output channel,
which a dot product multiplies with four activations. Where the CPU has no such instruction
(``AVX2``, ``NEON``), pairs are multiplied and a channel's sum lies in two neighbouring lanes until
``Emitter.merge`` adds them; a register of weights then covers half as many channels.

Activations are bytes. NEON multiplies signed bytes only, so there 128 is taken off every byte by
``Emitter.spread``; ``activation_shift`` says so to whoever folds zero points into the bias.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from cactus_edge.kernels.simd.tiers import Tier

Value = Any
"""Of llvmlite, whose annotations are wrong: they say None where a method returns a value."""
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_SINGLE = ir.FloatType()

_LANES = {Tier.AVX512: 16, Tier.AVXVNNI: 8, Tier.AVX2: 8, Tier.DOTPROD: 4, Tier.NEON: 4}
_ARM = (Tier.DOTPROD, Tier.NEON)
_PAIRS = (Tier.AVX2, Tier.NEON)


@dataclass(frozen=True)
class Shape:
    """Of a tile: ``pixels`` windows times ``units`` of as many channels as a register has sums.

    ``phases`` are sets of sums for each channel, which keep dot products independent.
    """

    pixels: int
    units: int
    phases: int = 1

    def channels(self, tier: Tier) -> int:
        """Output channels of a tile."""
        return self.units * lanes_of(tier)


# As many sums as leave registers for what is loaded: AVX-512 and NEON have 32, AVX2 has 16.
_WIDE = {
    Tier.AVX512: Shape(8, 2),
    Tier.AVXVNNI: Shape(4, 2),
    Tier.AVX2: Shape(2, 2),
    Tier.DOTPROD: Shape(4, 4),
    Tier.NEON: Shape(4, 2),
}
_STREAM = {
    Tier.AVX512: Shape(1, 4, 2),
    Tier.AVXVNNI: Shape(1, 4, 2),
    Tier.AVX2: Shape(1, 2, 2),
    Tier.DOTPROD: Shape(1, 4, 2),
    Tier.NEON: Shape(1, 2, 2),
}
# Nothing is shared but weights, among the pixels; registers of one load of each tap.
_DEPTHWISE = {
    Tier.AVX512: Shape(4, 2),
    Tier.AVXVNNI: Shape(4, 2),
    Tier.AVX2: Shape(4, 2),
    Tier.DOTPROD: Shape(4, 4),
    Tier.NEON: Shape(4, 4),
}
_SKIPPING = _STREAM | {Tier.AVX2: Shape(1, 4)}


def wide(tier: Tier) -> Shape:
    """For many pixels and channels."""
    return _WIDE[tier]


def narrow(tier: Tier) -> Shape:
    """For many pixels and few channels."""
    return Shape(_WIDE[tier].pixels, 1)


def streaming(tier: Tier) -> Shape:
    """For one window and many channels."""
    return _STREAM[tier]


def thin(tier: Tier) -> Shape:
    """For one window and few channels."""
    return Shape(1, 1, 8 if tier is Tier.AVX512 else 4)


def depthwise_wide(tier: Tier) -> Shape:
    """For a depthwise convolution."""
    return _DEPTHWISE[tier]


def depthwise_narrow(tier: Tier) -> Shape:
    """For a depthwise convolution of few channels."""
    return Shape(_DEPTHWISE[tier].pixels, 1)


def skipping(tier: Tier) -> Shape:
    """For one window of which only some steps count: wider, as each is looked up in a list."""
    return _SKIPPING[tier]


def lanes_of(tier: Tier) -> int:
    """Int32 sums in a register."""
    return _LANES[tier]


def channels_of(tier: Tier) -> int:
    """Output channels for which a register of weights holds four bytes each."""
    return _LANES[tier] // (2 if tier in _PAIRS else 1)


def products_of(tier: Tier) -> int:
    """Products that a dot product adds to each int32 sum."""
    return 4 * channels_of(tier) // lanes_of(tier)


def chunk_of(tier: Tier) -> int:
    """Bytes among which a permutation chooses."""
    return 64 if tier is Tier.AVX512 else 16


def activation_shift(tier: Tier) -> int:
    """What kernels subtract from each activation byte."""
    return 128 if tier in _ARM else 0


class Emitter:
    """A builder of IR for one tier."""

    def __init__(self, builder: ir.IRBuilder, tier: Tier) -> None:
        """Take over a builder."""
        self.builder: Any = builder
        self.tier = tier
        self.lanes = lanes_of(tier)
        self.channels = channels_of(tier)
        self.sums = ir.VectorType(I32, self.lanes)
        self.bytes = ir.VectorType(I8, 4 * self.channels)
        self.parts = self.lanes // self.channels

    # ------------------------------------------------------------------ integers and memory
    def add(self, a: Value, b: Value | int) -> Value:
        """Sum of two int64."""
        return self.builder.add(a, I64(b) if isinstance(b, int) else b)

    def multiply(self, a: Value, b: int) -> Value:
        """Product of an int64 with a constant."""
        return self.builder.mul(a, I64(b))

    def load(self, kind: ir.Type, address: Value, offset: int = 0) -> Value:
        """A value at any address."""
        place = self.add(address, offset) if offset else address
        return self.builder.load(self.builder.inttoptr(place, kind.as_pointer()), align=1)

    def store(self, value: Value, address: Value, offset: int = 0) -> None:
        """Write a value at any address."""
        place = self.add(address, offset) if offset else address
        self.builder.store(value, self.builder.inttoptr(place, value.type.as_pointer()), align=1)

    def load_int32(self, address: Value, offset: int = 0) -> Value:
        """An int32 as an int64."""
        return self.builder.sext(self.load(I32, address, offset), I64)

    def variable(self, value: Value) -> Value:
        """A variable that LLVM keeps in a register."""
        slot = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, slot)
        return slot

    def get(self, slot: Value) -> Value:
        """Value of a variable."""
        return self.builder.load(slot)

    def set(self, slot: Value, value: Value) -> None:
        """Assign a variable."""
        self.builder.store(value, slot)

    @contextmanager
    def loop(self, count: Value) -> Generator[Value]:
        """Repeat the block; gives the number of the turn, int64."""
        with cgutils.for_range(self.builder, count, intp=I64) as turn:
            yield turn.index

    def call(self, name: str, result: ir.Type, arguments: Sequence[Value]) -> Value:
        """An LLVM intrinsic."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)

    def prefetch(self, address: Value) -> None:
        """Ask for a line that will be read."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        arguments = [pointer, I32(0), I32(3), I32(1)]
        self.call("llvm.prefetch.p0", ir.VoidType(), arguments)

    # ------------------------------------------------------------------ vectors
    def splat(self, value: Value, lanes: int) -> Value:
        """The same value in every lane."""
        kind = ir.VectorType(value.type, lanes)
        single = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), zeros)

    def constant(self, kind: ir.VectorType, value: int) -> Value:
        """A constant in every lane."""
        return ir.Constant(kind, [value] * kind.count)

    def zero(self) -> Value:
        """A register of sums, all 0."""
        return self.constant(self.sums, 0)

    def spread(self, address: Value, offset: int = 0) -> Value:
        """Four activations for every channel, as ``dot`` takes them."""
        four = self.load(I32, address, offset)
        return self.activations(self.builder.bitcast(self.splat(four, self.channels), self.bytes))

    def activations(self, values: Value) -> Value:
        """Bytes as ``dot`` takes them: signed where the CPU multiplies signed bytes."""
        if self.tier in _ARM:
            values = self.builder.xor(values, self.constant(self.bytes, -128))
        if self.tier is Tier.AVX2:
            return self.builder.zext(values, ir.VectorType(I16, 16))
        return values

    def weights(self, address: Value, offset: int = 0) -> Value:
        """A register of weights, still as bytes."""
        return self.load(self.bytes, address, offset)

    def dot(self, total: Value, activations: Value, weights: Value) -> Value:
        """``total`` plus the products of activations and weights; never saturates."""
        match self.tier:
            case Tier.AVX512 | Tier.AVXVNNI:
                name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
                # As int32, which LLVM 20 and 22 both take.
                words = [self.builder.bitcast(x, self.sums) for x in (activations, weights)]
                return self.call(name, self.sums, [total, *words])
            case Tier.DOTPROD:
                name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
                return self.call(name, self.sums, [total, weights, activations])
            case Tier.AVX2:
                wide = self.builder.sext(weights, ir.VectorType(I16, 16))
                pairs = self.call("llvm.x86.avx2.pmadd.wd", self.sums, [activations, wide])
                return self.builder.add(total, pairs)
            case _:
                return self._dot_neon(total, activations, weights)

    def _dot_neon(self, total: Value, activations: Value, weights: Value) -> Value:
        kind = ir.VectorType(I16, 8)
        products = self.builder.mul(
            self.builder.sext(activations, kind), self.builder.sext(weights, kind)
        )
        pairs = self.call("llvm.aarch64.neon.saddlp.v4i32.v8i16", self.sums, [products])
        return self.builder.add(total, pairs)

    def high_nibbles(self, packed: Value) -> Value:
        """16 times the signed high nibble of each byte."""
        return self.builder.and_(packed, self.constant(self.bytes, -16))

    def low_nibbles(self, packed: Value) -> Value:
        """16 times the signed low nibble of each byte."""
        return self.builder.shl(packed, self.constant(self.bytes, 4))

    def permute(self, chunk: Value, indices: Value) -> Value:
        """Activations from a chunk of ``chunk_of`` bytes at an address, one for each index."""
        b = self.builder
        if self.tier is Tier.AVX512:
            values = self.load(self.bytes, chunk)
            name = "llvm.x86.avx512.permvar.qi.512"
            return self.call(name, self.bytes, [values, indices])
        sixteen = ir.VectorType(I8, 16)
        values = self.load(sixteen, chunk)
        if self.tier is Tier.AVXVNNI:
            twice = ir.Constant(ir.VectorType(I32, 32), [*range(16), *range(16)])
            values = b.shuffle_vector(values, ir.Constant(sixteen, ir.Undefined), twice)
            found = self.call("llvm.x86.avx2.pshuf.b", self.bytes, [values, indices])
        elif self.tier is Tier.AVX2:
            found = self.call("llvm.x86.ssse3.pshuf.b.128", sixteen, [values, indices])
        else:
            name = f"llvm.aarch64.neon.tbl1.v{self.bytes.count}i8"
            found = self.call(name, self.bytes, [values, indices])
        return self.activations(found)

    def permute_two(self, chunks: Sequence[Value], indices: Value) -> Value:
        """The same from two loaded chunks, of which an index's bit 6 chooses one (AVX512)."""
        arguments = [chunks[0], indices, chunks[1]]
        return self.call("llvm.x86.avx512.vpermi2var.qi.512", self.bytes, arguments)

    def permute_loaded(self, values: Value, indices: Value) -> Value:
        """The same from one loaded chunk (AVX512)."""
        return self.call("llvm.x86.avx512.permvar.qi.512", self.bytes, [values, indices])

    def expand(self, address: Value, mask: Value) -> Value:
        """Bytes at an address, one for each bit of an int64 mask, zeros elsewhere (AVX512)."""
        b = self.builder
        # Hidden from LLVM, which would expand straight from memory: that takes three times as long.
        same = ir.FunctionType(self.bytes, [self.bytes])
        loaded = b.asm(same, "", "=v,0", [self.load(self.bytes, address)], False)
        bits = b.bitcast(mask, ir.VectorType(ir.IntType(1), 64))
        zeros = self.constant(self.bytes, 0)
        name = "llvm.x86.avx512.mask.expand.v64i8"
        return self.call(name, self.bytes, [loaded, zeros, bits])

    def merge(self, totals: Sequence[Value]) -> list[Value]:
        """Sums with one lane for each channel, in order."""
        if self.tier not in _PAIRS:
            return list(totals)
        merged: list[Value] = []
        for a, b in zip(totals[::2], totals[1::2], strict=True):
            even = [2 * i for i in range(self.lanes)]
            parts = [
                self.builder.shuffle_vector(
                    a, b, ir.Constant(ir.VectorType(I32, self.lanes), [i + odd for i in even])
                )
                for odd in (0, 1)
            ]
            merged.append(self.builder.add(*parts))
        return merged

    def requantize(
        self, totals: Value, scales: Value, zero: Value, lower: Value, upper: Value
    ) -> Value:
        """``semantics.requantize_float32`` and the clamp, as bytes.

        Integer to float, product and float to integer each round half to even, as IEEE 754 says.
        Nothing overflows: accumulators stay below 2**27 and scales below 1.
        """
        floats = ir.VectorType(_SINGLE, self.lanes)
        builder = self.builder
        product = builder.fmul(builder.sitofp(totals, floats), self.load(floats, scales))
        suffix = f"v{self.lanes}f32"
        if self.tier in _ARM:
            whole = self.call(f"llvm.roundeven.{suffix}", floats, [product])
            rounded = builder.fptosi(whole, self.sums)
        else:
            rounded = self.call(f"llvm.lrint.v{self.lanes}i32.{suffix}", self.sums, [product])
        return self.clamp(builder.add(rounded, zero), lower, upper)

    def clamp(self, values: Value, lower: Value, upper: Value) -> Value:
        """Int32 lanes limited to bytes in [lower, upper]."""
        suffix = f"v{self.lanes}i32"
        values = self.call(f"llvm.smax.{suffix}", self.sums, [values, lower])
        values = self.call(f"llvm.smin.{suffix}", self.sums, [values, upper])
        return self.builder.trunc(values, ir.VectorType(I8, self.lanes))

    def store_some(self, values: Value, address: Value, count: Value) -> None:
        """Write the first ``count`` (int64, may be negative or too large) of the bytes."""
        lanes = values.type.count
        numbers = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
        mask = self.builder.icmp_signed("<", numbers, self.splat(count, lanes))
        place = self.builder.inttoptr(address, values.type.as_pointer())
        self.call(f"llvm.masked.store.v{lanes}i8.p0", ir.VoidType(), [values, place, I32(1), mask])
