"""Tables of operators of one or two int8 inputs, as each runtime computes them, in integers.

Such an operator is known by its 256 or 65,536 results, so each table is made once, from the
runtime's arithmetic, and everything else looks up: executors, kernels, bounds and the checker.

Where a runtime calls a transcendental function of the float library (LOGISTIC, TANH), the table
holds the exact real result, rounded. That is what every library computes that errs by less than
``_GUARD``; a table with an entry closer to a rounding boundary than that is refused.

Sources: TFLite ``kernels/activations.cc``, ``reference/hard_swish.h``, ``reference/requantize.h``,
``reference/integer_ops/{mul,leaky_relu}.h``, ``kernels/sub.cc``; XNNPACK ``microparams-init.c``,
``qs8-vcvt``, ``qs8-vlrelu``, ``qs8-vmul``.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal
from enum import Enum
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt

from cactus_edge import scales, semantics
from cactus_edge.errors import InvalidGraphError
from cactus_edge.scales import Binary
from cactus_edge.semantics import AddRounding, Rounding

Int64Array = npt.NDArray[np.int64]
Limits = tuple[int, int]

_PRECISE = Context(prec=60)
# Relative and absolute error of the result in float32: argument, exp, sum and quotient are each
# rounded, exp by up to an ulp, which makes less than 2**-22 of the result.
_GUARD = Fraction(3, 1 << 23), Fraction(1, 1 << 24)


class Arithmetic(Enum):
    """How a runtime computes operators of one and two int8 inputs."""

    TFLITE = "tflite"
    """Q31 multipliers and two roundings, the second half away from zero."""
    MICRO = "tflite-micro"
    """The same, but MUL and RELU form their factor in float64, and RELU6 only clamps."""
    TFLITE_HALF_UP = "tflite-half-up"
    """The same, but QUANTIZE rounds half up: optimized kernels of LiteRT, and of TFLite on ARM.
    They do so in vectors of ``QUANTIZE_VECTOR`` elements; what is left rounds as ``TFLITE``."""
    XNNPACK = "xnnpack"
    """8.8 fixed point for QUANTIZE and LEAKY_RELU, float32 for MUL, one rounding for SUB."""
    XNNPACK_ARM = "xnnpack-arm"
    """The same, but MUL rounds the exact product with its float32 factor half up (``rndnu``)."""

    @property
    def is_delegate(self) -> bool:
        """Whether it is XNNPACK's."""
        return self in (Arithmetic.XNNPACK, Arithmetic.XNNPACK_ARM)


QUANTIZE_VECTOR = 16
"""Elements that optimized kernels of QUANTIZE round half up at once."""


# ------------------------------------------------------------------------------------------ pieces
def multiplier(real: Binary) -> tuple[int, int]:
    """TFLite's ``QuantizeMultiplier`` for any factor: ``real = m * 2**-(31 + shift)``.

    A negative ``shift`` is one to the left, before the product.

    Raises:
        InvalidGraphError: the factor is 2**15 or more, beyond what a product of two int8
            differences can take in int32.
    """
    width = real.significand.bit_length()
    significand, exponent = real.significand << (53 - width), real.exponent + width
    found = (significand + (1 << 21)) >> 22
    if found == 1 << 31:
        found, exponent = 1 << 30, exponent + 1
    if exponent > 15:
        raise InvalidGraphError("the ratio of scales is 32768 or more; rescale the model")
    return (0, 0) if exponent < -31 else (found, -exponent)


def scaled(
    x: Int64Array, factor: tuple[int, int], rounding: Rounding = Rounding.DOUBLE_HALF_AWAY
) -> Int64Array:
    """TFLite's ``MultiplyByQuantizedMultiplier`` of small integers, shifts to the left included."""
    significand, shift = factor
    left = x * (1 << max(-shift, 0))
    return semantics.REQUANTIZE[rounding](left, significand, max(shift, 0))


def _eights(real: Binary) -> int:
    """XNNPACK's 8.8 fixed-point factor: ``lrintf(256 * scale)``.

    Raises:
        InvalidGraphError: XNNPACK refuses the factor, and leaves the operator to another kernel.
    """
    ratio = real.fraction()
    if not Fraction(1, 256) <= ratio <= Fraction(32767, 256):
        raise InvalidGraphError("XNNPACK takes ratios of scales from 1/256 to 128")
    return round(ratio * 256)


def _fixed(x: Int64Array, factor: int) -> Int64Array:
    return semantics.shift_half_up(x * factor, 8)  # pyright: ignore


def _nearest_away(value: Fraction) -> int:
    """Halves away from zero, as C's ``roundf``."""
    sign = -1 if value < 0 else 1
    return sign * int((2 * abs(value) + 1) // 2)


# -------------------------------------------------------------------------------------- one input
def relu(x: Int64Array, source: Binary, target: Binary, arithmetic: Arithmetic) -> Int64Array:
    """RELU's family before its clamp: TFLite Micro alone divides the scales in float64."""
    width = 64 if arithmetic is Arithmetic.MICRO else 32
    return scaled(x, multiplier(scales.divide(source, target, width)))


def bound(real: int, target: Binary, zero_point: int) -> int:
    """The stored integer that a runtime clamps at for a small real number."""
    if real == 0:
        return zero_point
    magnitude = scales.divide(scales.nearest(abs(real), 1, 32), target, 32).fraction()
    return zero_point + (1 if real > 0 else -1) * _nearest_away(magnitude)


def requantize(x: Int64Array, source: Binary, target: Binary, arithmetic: Arithmetic) -> Int64Array:
    """QUANTIZE between two integer types."""
    if arithmetic.is_delegate:
        return _fixed(x, _eights(scales.divide(source, target, 32)))
    half_up = arithmetic is Arithmetic.TFLITE_HALF_UP
    rounding = Rounding.DOUBLE_HALF_UP if half_up else Rounding.DOUBLE_HALF_AWAY
    return scaled(x, multiplier(scales.divide(source, target, 64)), rounding)


def leaky_relu(
    x: Int64Array, alpha: Binary, source: Binary, target: Binary, arithmetic: Arithmetic
) -> Int64Array:
    """LEAKY_RELU; ``alpha`` is positive."""
    if arithmetic.is_delegate:
        ratio = scales.divide(source, target, 32)
        below = scales.multiply(ratio, alpha, 32)
        return np.where(x >= 0, _fixed(x, _eights(ratio)), _fixed(x, _eights(below)))
    identity = multiplier(scales.divide(source, target, 32))
    negative = multiplier(scales.divide(scales.multiply(source, alpha, 32), target, 32))
    return np.where(x >= 0, scaled(x, identity), scaled(x, negative))


def hard_swish(x: Int64Array, source: Binary, target: Binary) -> Int64Array:
    """HARD_SWISH in 16-bit fixed point: the same in all runtimes.

    Raises:
        InvalidGraphError: scales for which TFLite refuses the operator.
    """
    fine = Binary(source.significand, source.exponent - 7)
    out, out_shift = multiplier(scales.divide(fine, target, 32))
    if out_shift < 0:
        raise InvalidGraphError("HARD_SWISH needs an output scale above input scale / 128")
    reluish = scales.divide(scales.nearest(3, 1, 32), Binary(1 << 15, 0), 32)
    relu, relu_shift = multiplier(scales.divide(fine, reluish, 32))
    hires = x * 128
    before = _high_16(hires, _narrowed(out))
    gate = hires
    if relu_shift < 0:
        gate = np.clip(gate * (1 << (-relu_shift - 1)), -32768, 32767)
    gate = _high_16(gate, _narrowed(relu))
    if relu_shift < 0:
        gate = np.clip(gate * 2, -32768, 32767)
    gate = semantics.shift_half_away(gate, max(relu_shift, 0))  # pyright: ignore
    gate = (gate + 32768) >> 1
    product = gate * before
    sign = np.where(product < 0, -1, 1)
    return semantics.shift_half_away((np.abs(product) >> 15) * sign, out_shift)  # pyright: ignore


def _narrowed(factor: int) -> int:
    """Gemmlowp ``DownScaleInt32ToInt16Multiplier``."""
    return 32767 if factor >= (1 << 31) - (1 << 15) - 1 else (factor + (1 << 15)) >> 16


def _high_16(x: Int64Array, factor: int) -> Int64Array:
    """Gemmlowp ``SaturatingRoundingDoublingHighMul`` of int16, for factors below 1."""
    return (x * factor + 16384) >> 15


def transcendental(
    x: Int64Array, source: Binary, steps: int, function: Callable[[Decimal], Decimal]
) -> Int64Array:
    """``round(steps * function(scale * x))``, refused where a float library could decide.

    ``steps`` of a real 1 is one more than the greatest result that can be stored.

    Raises:
        InvalidGraphError: an entry lies too close to a rounding boundary.
    """
    scale = source.fraction()
    found: list[int] = []
    for difference in x.tolist():
        real = scale * difference
        argument = _PRECISE.divide(Decimal(real.numerator), Decimal(real.denominator))
        value = Fraction(function(argument)) * steps
        near = _nearest_away(value)
        margin = Fraction(1, 2) - abs(value - near)
        # Above the last boundary but one both neighbours are clamped to the greatest int8.
        if value < steps - 1 and margin <= abs(value) * _GUARD[0] + _GUARD[1]:
            raise InvalidGraphError(
                f"input {difference} from its zero point lies on a rounding boundary, where the "
                "float library decides; change the input scale a little"
            )
        found.append(near)
    return np.array(found, np.int64)


def logistic(real: Decimal) -> Decimal:
    """``1 / (1 + exp(-x))`` to 60 digits."""
    return _PRECISE.divide(1, _PRECISE.add(1, _PRECISE.exp(_PRECISE.minus(real))))


def tanh(real: Decimal) -> Decimal:
    """``1 - 2 / (exp(2 x) + 1)`` to 60 digits less those of its magnitude."""
    power = _PRECISE.exp(_PRECISE.multiply(2, real))
    return _PRECISE.subtract(1, _PRECISE.divide(2, _PRECISE.add(power, 1)))


# ------------------------------------------------------------------------------------- two inputs
def product(
    a: Int64Array,
    b: Int64Array,
    sources: tuple[Binary, Binary],
    target: Binary,
    arithmetic: Arithmetic,
) -> Int64Array:
    """MUL of differences from the zero points.

    Raises:
        InvalidGraphError: a factor that the runtime does not take.
    """
    width = 64 if arithmetic is Arithmetic.MICRO else 32
    real = scales.divide(scales.multiply(*sources, width), target, width)
    if not arithmetic.is_delegate:
        factor = multiplier(real)
        if arithmetic is Arithmetic.TFLITE_HALF_UP and factor[1] < 0:
            raise InvalidGraphError("LiteRT's optimized MUL goes wrong with factors of 1 and more")
        return scaled(a * b, factor)
    if not Fraction(1, 1 << 16) <= real.fraction() < 256:
        raise InvalidGraphError("XNNPACK takes products of scales from 2**-16 to 256 output scales")
    arm = arithmetic is Arithmetic.XNNPACK_ARM
    rule = semantics.REQUANTIZE[Rounding.SINGLE if arm else Rounding.FLOAT32]
    return rule(a * b, real.significand, -real.exponent)


def total(
    a: Int64Array,
    b: Int64Array,
    sources: tuple[Binary, Binary],
    target: Binary,
    arithmetic: Arithmetic,
    sign: int,
) -> Int64Array:
    """ADD (``sign`` 1) or SUB (``sign`` -1) of differences from the zero points."""
    fixed = arithmetic.is_delegate
    rounding = AddRounding.FIXED_POINT if fixed else AddRounding.DOUBLE_HALF_AWAY
    integers = scales.add_parameters(rounding, *sources, target)
    if sign > 0:
        return semantics.ADD[rounding](a, b, *integers)
    m_a, s_a, m_b, s_b, m_o, s_o = integers
    if fixed:
        return semantics.shift_half_up(a * m_a - b * m_b, s_o)  # pyright: ignore
    first = semantics.requantize_double_half_away(a * 1048576, m_a, s_a)  # pyright: ignore
    second = semantics.requantize_double_half_away(b * 1048576, m_b, s_b)  # pyright: ignore
    return semantics.requantize_double_half_away(first - second, m_o, s_o)  # pyright: ignore


@cache
def early_shift_agrees(
    integers: tuple[int, int, int, int, int, int], least_a: int, least_b: int
) -> bool:
    """Whether ``add_early_shift`` is ``add_double_half_away`` on every pair of operands.

    ``least_a`` and ``least_b`` are the operands' least values less their zero points.
    """
    if max(integers[1], integers[3]) > 20:
        return False
    level = np.arange(256, dtype=np.int64)
    a, b = (level + least_a)[:, None], (level + least_b)[None, :]
    early = semantics.add_early_shift(a, b, *integers)  # pyright: ignore[reportArgumentType]
    return np.array_equal(early, semantics.ADD[AddRounding.DOUBLE_HALF_AWAY](a, b, *integers))


@cache
def int16_early_shift_agrees(integers: tuple[int, int, int, int, int, int]) -> bool:
    """Whether LiteRT's optimized ADD of int16, which shifts first, is ``semantics.add_int16``.

    Both operands are compared on every value; the sum is rounded alike.
    """
    x = np.arange(-32768, 32768, dtype=np.int64)
    for factor, shift in (integers[:2], integers[2:4]):
        if shift > 15:
            return False
        late = semantics.requantize_double_half_away(x * 32768, factor, shift)  # pyright: ignore
        early = semantics.multiply_high(x * (1 << (15 - shift)), factor)  # pyright: ignore
        if not np.array_equal(early, late):
            return False
    return True
