"""From float scales to integer multipliers, exactly, in Python integers.

A ``.tflite`` file holds scales as IEEE 754 numbers, and each runtime turns them into an integer
multiplier by a few float operations of its own. Those operations are repeated here on significands
and exponents, so that no float unit, compiler flag or library decides what is certified.

Sources: TFLite ``quantization_util.cc`` (``QuantizeMultiplier``), ``kernel_util.cc``
(``GetQuantizedConvolutionMultipler``), ``kernels/add.cc``; XNNPACK ``convolution-nhwc.c``,
``microparams-init.c``.
"""

from __future__ import annotations

import struct
from enum import Enum
from fractions import Fraction
from typing import NamedTuple

from cactus_edge import semantics
from cactus_edge.errors import InvalidGraphError


class Binary(NamedTuple):
    """The positive number ``significand * 2**exponent``."""

    significand: int
    exponent: int

    def fraction(self) -> Fraction:
        """The exact value."""
        return Fraction(self.significand) * Fraction(2) ** self.exponent


class ScaleArithmetic(Enum):
    """The order and precision in which a runtime forms ``input * weight / output``."""

    FLOAT64 = "float64"
    """Product and quotient in float64: TFLite convolutions."""
    FLOAT32_PRODUCT = "float32-product"
    """Product in float32, quotient in float64: TFLite's per-tensor FULLY_CONNECTED."""
    FLOAT32 = "float32"
    """Product and quotient in float32, left to right: XNNPACK, ONNX Runtime."""
    FLOAT32_REASSOCIATED = "float32-reassociated"
    """Quotient first, both in float32: TFLite 2.14's ARM build of XNNPACK."""


_PRECISION = {32: 24, 64: 53}
_MINIMUM_EXPONENT = {32: -149, 64: -1074}
_FLOAT32_BITS = 128
"""Every finite float32 is less than 2 to this power."""


def nearest(numerator: int, denominator: int, width: int) -> Binary:
    """The binary number of IEEE 754's precision nearest to a positive ratio, halves to even."""
    precision = _PRECISION[width]
    exponent = numerator.bit_length() - denominator.bit_length() - precision
    while True:
        scaled = numerator << -exponent if exponent < 0 else numerator
        divisor = denominator << exponent if exponent > 0 else denominator
        quotient, remainder = divmod(scaled, divisor)
        if quotient < 1 << precision:
            break
        exponent += 1
    quotient += (2 * remainder > divisor) or (2 * remainder == divisor and quotient & 1)
    if quotient == 1 << precision:
        quotient, exponent = quotient >> 1, exponent + 1
    return Binary(quotient, exponent)


def decode_float32(bits: int) -> Binary:
    """The positive, normal float32 with this bit pattern.

    Raises:
        InvalidGraphError: the pattern is zero, negative, subnormal, infinite or not a number.
    """
    exponent = bits >> 23
    if not 0 < exponent < 255:
        value = struct.unpack("<f", struct.pack("<I", bits))[0]
        raise InvalidGraphError(f"scale {value!r} is not a positive, normal float32")
    return Binary((bits & 0x7FFFFF) | 0x800000, exponent - 150)


def multiply(a: Binary, b: Binary, width: int) -> Binary:
    """Product in IEEE arithmetic of ``width`` bits.

    Raises:
        InvalidGraphError: the result would be subnormal, where runtimes may flush to zero, or of 32
            bits and infinite, where they abort.
    """
    product = nearest(a.significand * b.significand, 1, width)
    return _scaled(product, a.exponent + b.exponent, width)


def divide(a: Binary, b: Binary, width: int) -> Binary:
    """Quotient in IEEE arithmetic of ``width`` bits.

    Raises:
        InvalidGraphError: the result would be subnormal, where runtimes may flush to zero, or of 32
            bits and infinite, where they abort.
    """
    quotient = nearest(a.significand, b.significand, width)
    return _scaled(quotient, a.exponent - b.exponent, width)


def _scaled(x: Binary, exponent: int, width: int) -> Binary:
    if x.exponent + exponent < _MINIMUM_EXPONENT[width]:
        raise InvalidGraphError("a product of scales is too small for float32; rescale the model")
    scaled = Binary(x.significand, x.exponent + exponent)
    return _finite(scaled) if width == 32 else scaled


def _finite(x: Binary) -> Binary:
    """``x``, which a runtime holds in float32: where that overflows, runtimes abort."""
    if x.significand.bit_length() + x.exponent > _FLOAT32_BITS:
        raise InvalidGraphError(
            "a product or ratio of scales is too large for float32; rescale the model"
        )
    return x


def effective(
    arithmetic: ScaleArithmetic, inputs: Binary, weight: Binary, output: Binary
) -> Binary:
    """``input_scale * weight_scale / output_scale`` as a runtime computes it."""
    match arithmetic:
        case ScaleArithmetic.FLOAT64:
            return divide(multiply(inputs, weight, 64), output, 64)
        case ScaleArithmetic.FLOAT32_PRODUCT:
            return divide(multiply(inputs, weight, 32), output, 64)
        case ScaleArithmetic.FLOAT32:
            return divide(multiply(inputs, weight, 32), output, 32)
        case ScaleArithmetic.FLOAT32_REASSOCIATED:
            return multiply(divide(inputs, output, 32), weight, 32)


def quantize_multiplier(real: Binary) -> tuple[int, int]:
    """TFLite's ``QuantizeMultiplier``: ``(m, shift)`` with ``real = m * 2**-(31 + shift)``.

    Raises:
        InvalidGraphError: the factor rounds to 1 or more.
    """
    # A 53-bit significand becomes Q31; the significand of a float32 is widened first.
    significand = real.significand << (53 - real.significand.bit_length())
    exponent = real.exponent - (53 - real.significand.bit_length()) + 53
    multiplier = (significand + (1 << 21)) >> 22
    if multiplier == 1 << 31:
        multiplier, exponent = 1 << 30, exponent + 1
    if exponent > 0:
        raise InvalidGraphError(
            f"effective multiplier {float(real.fraction()):.6g} is not below 1; "  # float: message
            "requantization is not monotone above 1: enlarge the output scale"
        )
    return (0, 0) if exponent < -31 else (multiplier, -exponent)


def reduced_parameters(real: Binary) -> tuple[int, int]:
    """``(multiplier, shift)`` of ``semantics.requantize_single`` where accumulators are int64.

    TFLite keeps 15 bits of the multiplier then, rounded.

    Raises:
        InvalidGraphError: the factor is outside [2**-31, 1).
    """
    multiplier, shift = parameters(semantics.Rounding.DOUBLE_HALF_AWAY, real)
    return min((multiplier + (1 << 15)) >> 16, 0x7FFF), 15 + shift


def parameters(rounding: semantics.Rounding, real: Binary) -> tuple[int, int]:
    """``(multiplier, shift)`` in the meaning of ``semantics.REQUANTIZE[rounding]``.

    Raises:
        InvalidGraphError: the factor is outside [2**-31, 1).
    """
    magnitude = real.significand.bit_length() + real.exponent
    if not -30 <= magnitude <= 0:
        value = float(real.fraction())  # float: message
        raise InvalidGraphError(f"effective multiplier {value:.6g} is outside [2**-31, 1)")
    match rounding:
        case semantics.Rounding.DOUBLE_HALF_AWAY | semantics.Rounding.DOUBLE_HALF_UP:
            return quantize_multiplier(real)
        case semantics.Rounding.SINGLE:
            if real.significand.bit_length() <= 24:  # XNNPACK rndnu takes the float32 as it is
                return real.significand, -real.exponent
            multiplier, shift = quantize_multiplier(real)
            return multiplier, 31 + shift
        case semantics.Rounding.FLOAT32 | semantics.Rounding.FLOAT64:
            return real.significand, -real.exponent


def mean_parameters(
    rounding: semantics.Rounding, inputs: Binary, output: Binary, count: int
) -> tuple[int, int]:
    """``(multiplier, shift)`` of a MEAN of ``count`` elements, rounded as its runtime rounds.

    TFLite's reference divides the Q31 multiplier; XNNPACK multiplies the output's scale first.

    Raises:
        InvalidGraphError: the factor is outside [2**-31, 1).
    """
    if rounding in (semantics.Rounding.FLOAT32, semantics.Rounding.SINGLE):
        if not Fraction(1, 256) <= divide(inputs, output, 32).fraction() < 256:
            raise InvalidGraphError("XNNPACK takes means with ratios of scales from 1/256 to 256")
        whole = multiply(output, nearest(count, 1, 32), 32)
        return parameters(rounding, divide(inputs, whole, 32))
    ratio = divide(inputs, output, 64)
    bits = min(count.bit_length() - 1, 32)
    # The ratio itself may be 1 or more, its quotient may not.
    width = ratio.significand.bit_length() + ratio.exponent
    scaled = Binary(ratio.significand, ratio.exponent - max(width, 0))
    multiplier, shift = quantize_multiplier(scaled)
    bits = min(bits, 31 - (shift - max(width, 0)))
    divided, shift = (multiplier << bits) // count, shift - max(width, 0) + bits
    if not (0 <= shift <= 31 and divided):
        raise InvalidGraphError("the factor of the mean is outside [2**-31, 1)")
    return divided, shift


def add_parameters(
    rounding: semantics.AddRounding, a: Binary, b: Binary, output: Binary
) -> tuple[int, int, int, int, int, int]:
    """The six integers of ``semantics.ADD[rounding]`` for two input scales and an output scale.

    Raises:
        InvalidGraphError: an output multiplier of 1 or more, or one that does not fit, or scales
            that leave float32 when TFLite doubles or shifts them.
    """
    if rounding is semantics.AddRounding.FIXED_POINT:
        ratio_a, ratio_b = divide(a, output, 32), divide(b, output, 32)
        least, most = Fraction(1, 512), 128
        if not all(least <= ratio.fraction() <= most for ratio in (ratio_a, ratio_b)):
            raise InvalidGraphError(
                "XNNPACK's ADD is described for ratios of input to output scale from 1/512 to 128"
            )
        largest = max(ratio_a, ratio_b, key=Binary.fraction)
        shift = 20 - (largest.exponent + 23)
        if not 0 < shift < 32:
            raise InvalidGraphError("ADD: the ratio of scales does not fit XNNPACK's fixed point")
        return _half_even(ratio_a, shift), 0, _half_even(ratio_b, shift), 0, 1, shift
    largest = max(a, b, key=Binary.fraction)
    twice = _finite(Binary(largest.significand, largest.exponent + 1))
    raised = 15 if rounding is semantics.AddRounding.INT16 else 20
    shifted = _finite(Binary(output.significand, output.exponent + raised))
    triples = [
        quantize_multiplier(divide(a, twice, 64)),
        quantize_multiplier(divide(b, twice, 64)),
        quantize_multiplier(divide(twice, shifted, 64)),
    ]
    base = 31 if rounding is semantics.AddRounding.SINGLE else 0
    (m_a, s_a), (m_b, s_b), (m_o, s_o) = triples
    return m_a, base + s_a, m_b, base + s_b, m_o, base + s_o


def sixes(output_bits: int, zero_point: int) -> tuple[int, int]:
    """What runtimes take for a stored 6: TFLite's integer and XNNPACK's.

    TFLite rounds the float32 quotient half away from zero and adds the zero point; XNNPACK adds the
    zero point in float32 and rounds half to even.
    """
    ratio = divide(Binary(12582912, -21), decode_float32(output_bits), 32).fraction()
    away = (2 * ratio.numerator + ratio.denominator) // (2 * ratio.denominator)
    total = ratio + zero_point
    if total:
        sign = 1 if total > 0 else -1
        total = sign * nearest(abs(total.numerator), total.denominator, 32).fraction()
    return zero_point + away, round(total)


def _half_even(ratio: Binary, shift: int) -> int:
    exponent = ratio.exponent + shift
    if exponent >= 0:
        return ratio.significand << exponent
    return 0 if exponent < -62 else semantics.shift_half_even(ratio.significand, -exponent)
