"""Multipliers from scales: exact integers against NumPy's IEEE arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cactus_edge import scales
from cactus_edge.errors import InvalidGraphError
from cactus_edge.scales import Binary, ScaleArithmetic
from cactus_edge.semantics import AddRounding, Rounding

float32 = st.one_of(
    st.floats(2.0**-20, 2.0**4, width=32),
    st.integers(-12, 2).map(lambda e: 2.0**e),
    st.integers(-12, 0).map(lambda e: 1.5 * 2.0**e),
)


def decoded(value: np.float32) -> Binary:
    return scales.decode_float32(int(value.view(np.uint32)))


@given(float32, float32, float32)
def test_effective_factors(a: float, b: float, c: float) -> None:
    inputs, weight, output = (np.float32(v) for v in (a, b, c))
    expected = {
        ScaleArithmetic.FLOAT64: np.float64(inputs) * np.float64(weight) / np.float64(output),
        ScaleArithmetic.FLOAT32_PRODUCT: np.float64(inputs * weight) / np.float64(output),
        ScaleArithmetic.FLOAT32: (inputs * weight) / output,
        ScaleArithmetic.FLOAT32_REASSOCIATED: (inputs / output) * weight,
    }
    for arithmetic, value in expected.items():
        real = scales.effective(arithmetic, decoded(inputs), decoded(weight), decoded(output))
        assert real.fraction() == Fraction(float(value)), arithmetic


@given(st.floats(2.0**-30, 0.999999))
def test_quantize_multiplier_is_tflites(value: float) -> None:
    """TFLite: frexp, then std::round of the significand times 2**31."""
    mantissa, exponent = math.frexp(value)
    expected = math.floor(Fraction(mantissa) * 2**31 + Fraction(1, 2))
    if expected == 2**31:
        expected, exponent = 2**30, exponent + 1
    assume(exponent <= 0)
    real = scales.nearest(*value.as_integer_ratio(), 64)
    assert real.fraction() == Fraction(value)
    assert scales.quantize_multiplier(real) == (expected, -exponent)


@given(st.integers(1, 1 << 80), st.integers(1, 1 << 80))
def test_nearest_rounds_half_to_even(numerator: int, denominator: int) -> None:
    for width, kind in ((64, np.float64),):
        value = scales.nearest(numerator, denominator, width)
        assert value.fraction() == Fraction(float(kind(numerator / denominator)))


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, -np.inf, 1e-45])
def test_unusable_scales(value: float) -> None:
    with pytest.raises(InvalidGraphError, match="not a positive, normal float32"):
        scales.decode_float32(int(np.float32(value).view(np.uint32)))


@pytest.mark.parametrize("rounding", list(Rounding), ids=lambda r: r.name)
@pytest.mark.parametrize("value", [1.0, 1.5, 2.0**-32])
def test_factors_outside_are_refused(rounding: Rounding, value: float) -> None:
    real = scales.nearest(*value.as_integer_ratio(), 64)
    with pytest.raises(InvalidGraphError, match="outside"):
        scales.parameters(rounding, real)


def test_a_factor_that_rounds_to_one_is_refused() -> None:
    real = scales.nearest(*(0.9999999999999999).as_integer_ratio(), 64)
    assert scales.parameters(Rounding.FLOAT64, real)
    with pytest.raises(InvalidGraphError, match="not below 1"):
        scales.parameters(Rounding.DOUBLE_HALF_AWAY, real)


def test_products_that_would_be_subnormal_are_refused() -> None:
    tiny = decoded(np.float32(2.0**-100))
    with pytest.raises(InvalidGraphError, match="too small"):
        scales.multiply(tiny, tiny, 32)


def test_products_that_leave_float32_are_refused() -> None:
    """TFLite's ADD shifts its output's scale in float32, and aborts where it becomes infinite."""
    large, one = decoded(np.float32(2.0**108)), decoded(np.float32(1))
    with pytest.raises(InvalidGraphError, match="too large"):
        scales.multiply(large, large, 32)
    with pytest.raises(InvalidGraphError, match="too large"):
        scales.add_parameters(AddRounding.DOUBLE_HALF_AWAY, one, one, large)
    with pytest.raises(InvalidGraphError, match="too large"):
        scales.add_parameters(AddRounding.SINGLE, decoded(np.float32(2.0**127)), one, one)
    less = decoded(np.float32(2.0**107))
    assert scales.add_parameters(AddRounding.DOUBLE_HALF_AWAY, one, one, less)


@given(float32, float32, float32)
def test_xnnpack_add_parameters(a: float, b: float, c: float) -> None:
    x, y, z = (np.float32(v) for v in (a, b, c))
    ratio_x, ratio_y = x / z, y / z
    assume(min(ratio_x, ratio_y) >= 1 / 512 and max(ratio_x, ratio_y) <= 128)
    exponent = math.frexp(float(max(ratio_x, ratio_y)))[1] - 1
    shift = 20 - exponent
    assume(0 < shift < 32)
    expected = [int(np.rint(np.float64(r) * 2.0**shift)) for r in (ratio_x, ratio_y)]
    found = scales.add_parameters(AddRounding.FIXED_POINT, decoded(x), decoded(y), decoded(z))
    assert found == (expected[0], 0, expected[1], 0, 1, shift)


@pytest.mark.parametrize("ratio", [1 / 1023, 0.0005, 257.7])
def test_add_ratios_that_xnnpack_leaves_to_others(ratio: float) -> None:
    one, other = decoded(np.float32(1)), decoded(np.float32(ratio))
    for pair in ((one, other), (other, one)):
        with pytest.raises(InvalidGraphError, match="from 1/512 to 128"):
            scales.add_parameters(AddRounding.FIXED_POINT, *pair, one)
