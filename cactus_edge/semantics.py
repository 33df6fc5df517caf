"""THE integer arithmetic of a deployed network, written once.

Every function is branch-free, restricted Python over integers, so that one text has four uses:
the reference executor runs it on NumPy int64 arrays, Numba compiles it, ``csource`` translates its
syntax tree to C (``int64_t`` throughout), and the certificate checker runs it as it is. All values
are int64; comparisons count as 0 or 1; ``>>`` is arithmetic; nothing is shifted left but the
literal 1, because shifting a negative number left is undefined in C.

Side conditions, proved by ``constraints`` before any function is used on a graph: effective
multipliers are in [2**-31, 1), and |accumulator| < 2**27, or 2**35 with int16 activations, which
are rounded by ``requantize_single`` with a multiplier below 2**15 or by ``requantize_float64``.
Under them every requantization is a monotone (non-decreasing) function of the accumulator and no
intermediate leaves int64.

Sources: gemmlowp ``fixedpoint.h``; TFLite ``kernels/internal/common.h``; XNNPACK
``qs8-requantization``; LiteRT ``reference/integer_ops/fully_connected.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any


class Rounding(IntEnum):
    """How an accumulator becomes an output step; the value is the code in tables and in C."""

    DOUBLE_HALF_AWAY = 0
    DOUBLE_HALF_UP = 1
    SINGLE = 2
    FLOAT32 = 3
    FLOAT64 = 4


class AddRounding(IntEnum):
    """How ADD rescales its operands; the value is the code in tables and in C."""

    DOUBLE_HALF_AWAY = 0
    SINGLE = 1
    FIXED_POINT = 2
    INT16 = 3


def clamp(x: int, lower: int, upper: int) -> int:
    """Limit ``x`` to [lower, upper]."""
    return x + (lower - x) * (x < lower) + (upper - x) * (x > upper)


def bit_length(x: int) -> int:
    """Number of significant bits of ``x`` in [0, 2**63)."""
    a = (x >= 4294967296) * 32
    x1 = x >> a
    b = (x1 >= 65536) * 16
    x2 = x1 >> b
    c = (x2 >= 256) * 8
    x3 = x2 >> c
    d = (x3 >= 16) * 4
    x4 = x3 >> d
    return a + b + c + d + (x4 >= 1) + (x4 >= 2) + (x4 >= 4) + (x4 >= 8)


def shift_half_up(x: int, exponent: int) -> int:
    """``x / 2**exponent`` to nearest, halves up (NEON ``vrshl``)."""
    return (x + ((1 << exponent) >> 1)) >> exponent


def shift_half_away(x: int, exponent: int) -> int:
    """``x / 2**exponent`` to nearest, halves away from zero (gemmlowp ``RoundingDivideByPOT``)."""
    return (x + (((1 << exponent) - (x < 0)) >> 1)) >> exponent


def shift_half_even(x: int, exponent: int) -> int:
    """``x / 2**exponent`` to nearest, halves to even, for ``x >= 0`` (IEEE 754)."""
    quotient = x >> exponent
    remainder = x & ((1 << exponent) - 1)
    half = (1 << exponent) >> 1
    return quotient + (remainder > half) + (remainder == half) * (exponent > 0) * (quotient & 1)


def round_significant(x: int, bits: int) -> int:
    """``x >= 0`` rounded to ``bits`` significant bits, halves to even, as IEEE 754 rounds."""
    excess = bit_length(x) - bits
    dropped = excess * (excess > 0)
    return shift_half_even(x, dropped) * (1 << dropped)


def multiply_high(x: int, multiplier: int) -> int:
    """``x * multiplier / 2**31`` to nearest, halves up.

    Equals gemmlowp ``SaturatingRoundingDoublingHighMul`` and NEON ``vqrdmulh`` for every multiplier
    in [0, 2**31): the truncating division of the former is floor((x * m + 2**30) / 2**31).
    """
    return (x * multiplier + 1073741824) >> 31


def requantize_double_half_away(accumulator: int, multiplier: int, shift: int) -> int:
    """TFLite reference, TFLite Micro, CMSIS-NN: two roundings, the second half away from zero.

    Real factor ``multiplier * 2**-(31 + shift)``, multiplier in [2**30, 2**31), shift in [0, 31].
    """
    return shift_half_away(multiply_high(accumulator, multiplier), shift)


def requantize_double_half_up(accumulator: int, multiplier: int, shift: int) -> int:
    """Ruy on x86, NEON ``vqrdmulh`` + ``vrshl``: two roundings, both half up. Factor as above."""
    return shift_half_up(multiply_high(accumulator, multiplier), shift)


def requantize_single(accumulator: int, multiplier: int, shift: int) -> int:
    """One rounding, half up: ruy on ARM, ``TFLITE_SINGLE_ROUNDING``, XNNPACK ``rndnu``.

    Real factor ``multiplier * 2**-shift``, multiplier below 2**31, shift in [1, 62]. With a
    multiplier of 15 bits also TFLite's ``MultiplyByQuantizedMultiplier`` of int64.
    """
    return (accumulator * multiplier + (1 << (shift - 1))) >> shift


def requantize_float32(accumulator: int, multiplier: int, shift: int) -> int:
    """XNNPACK and ONNX Runtime: ``rint(float(accumulator) * scale)`` in IEEE 754 binary32.

    Real factor ``multiplier * 2**-shift`` with the 24-bit significand of the float32 scale. The
    three roundings (integer to float, product, float to integer) are each half to even.
    """
    sign = (accumulator > 0) * 1 - (accumulator < 0) * 1
    product = round_significant(accumulator * sign, 24) * multiplier
    return shift_half_even(round_significant(product, 24), shift) * sign


def requantize_float64(accumulator: int, multiplier: int, shift: int) -> int:
    """LiteRT's reference FULLY_CONNECTED: ``std::round(double(accumulator) * scale)``.

    Real factor ``multiplier * 2**-shift`` with the 53-bit significand of the float64 scale. The
    product has up to 80 bits, so it is formed as ``high * 2**27 + low`` and rounded to 53 bits,
    half to even, before it is rounded to an integer, half away from zero.
    """
    sign = (accumulator > 0) * 1 - (accumulator < 0) * 1
    magnitude = accumulator * sign
    partial = magnitude * (multiplier & 134217727)
    high = magnitude * (multiplier >> 27) + (partial >> 27)
    low = partial & 134217727
    excess = bit_length(high) - 26
    dropped = excess * (excess > 0)
    above = (dropped - 27) * (dropped > 27)
    below = (27 - dropped) * (dropped < 27)
    quotient = (high >> above) * (1 << below) + (low >> (dropped - above))
    remainder = ((high & 268435455) * 134217728 + low) & ((1 << dropped) - 1)
    half = (1 << dropped) >> 1
    tie = (remainder == half) * (dropped > 0) * (quotient & 1)
    significand = quotient + (remainder > half) + tie
    remaining = shift - dropped
    exponent = remaining + (62 - remaining) * (remaining > 62)
    return shift_half_up(significand, exponent) * sign


def add_double_half_away(
    a: int,
    b: int,
    multiplier_a: int,
    shift_a: int,
    multiplier_b: int,
    shift_b: int,
    multiplier: int,
    shift: int,
) -> int:
    """TFLite's and CMSIS-NN's ADD of two operands less their zero points, in 20 fraction bits."""
    scaled_a = requantize_double_half_away(a * 1048576, multiplier_a, shift_a)
    scaled_b = requantize_double_half_away(b * 1048576, multiplier_b, shift_b)
    return requantize_double_half_away(scaled_a + scaled_b, multiplier, shift)


def add_int16(
    a: int,
    b: int,
    multiplier_a: int,
    shift_a: int,
    multiplier_b: int,
    shift_b: int,
    multiplier: int,
    shift: int,
) -> int:
    """TFLite's ADD of two int16 operands, in 15 fraction bits."""
    scaled_a = requantize_double_half_away(a * 32768, multiplier_a, shift_a)
    scaled_b = requantize_double_half_away(b * 32768, multiplier_b, shift_b)
    return requantize_double_half_away(scaled_a + scaled_b, multiplier, shift)


def add_early_shift(
    a: int,
    b: int,
    multiplier_a: int,
    shift_a: int,
    multiplier_b: int,
    shift_b: int,
    multiplier: int,
    shift: int,
) -> int:
    """What LiteRT's optimized ADD does to all but the last ``size % 16`` elements: shifts first.

    No profile is resolved to it, because it depends on an element's position; a model is refused
    for such a runtime unless it equals ``add_double_half_away`` on every pair. Shifts of the
    operands are at most 20.
    """
    scaled_a = multiply_high(a * (1 << (20 - shift_a)), multiplier_a)
    scaled_b = multiply_high(b * (1 << (20 - shift_b)), multiplier_b)
    return requantize_double_half_away(scaled_a + scaled_b, multiplier, shift)


def add_single(
    a: int,
    b: int,
    multiplier_a: int,
    shift_a: int,
    multiplier_b: int,
    shift_b: int,
    multiplier: int,
    shift: int,
) -> int:
    """The same with single rounding: CMSIS-NN built with ``CMSIS_NN_USE_SINGLE_ROUNDING``."""
    scaled_a = requantize_single(a * 1048576, multiplier_a, shift_a)
    scaled_b = requantize_single(b * 1048576, multiplier_b, shift_b)
    return requantize_single(scaled_a + scaled_b, multiplier, shift)


def add_fixed_point(
    a: int,
    b: int,
    multiplier_a: int,
    shift_a: int,
    multiplier_b: int,
    shift_b: int,
    multiplier: int,
    shift: int,
) -> int:
    """XNNPACK's ``qs8-vadd``: one fixed-point sum and one rounding, half up.

    ``shift_a`` and ``shift_b`` are 0 and ``multiplier`` is 1: one signature serves every ADD.
    """
    total = (a * multiplier_a >> shift_a) + (b * multiplier_b >> shift_b)
    return shift_half_up(total * multiplier, shift)


def average(total: int, count: int) -> int:
    """TFLite's AVERAGE_POOL_2D: sum of the stored integers over ``count``, halves away from 0."""
    sign = (total > 0) * 1 - (total < 0) * 1
    return ((total * sign + (count >> 1)) // count) * sign


# Any: the functions accept int, NumPy int64 arrays and (compiled) Numba integers alike.
REQUANTIZE: dict[Rounding, Callable[[Any, Any, Any], Any]] = {
    Rounding.DOUBLE_HALF_AWAY: requantize_double_half_away,
    Rounding.DOUBLE_HALF_UP: requantize_double_half_up,
    Rounding.SINGLE: requantize_single,
    Rounding.FLOAT32: requantize_float32,
    Rounding.FLOAT64: requantize_float64,
}

ADD: dict[AddRounding, Callable[..., Any]] = {
    AddRounding.DOUBLE_HALF_AWAY: add_double_half_away,
    AddRounding.SINGLE: add_single,
    AddRounding.FIXED_POINT: add_fixed_point,
    AddRounding.INT16: add_int16,
}
