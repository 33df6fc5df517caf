"""Every rounding against exact rationals and IEEE arithmetic, in Python, NumPy and Numba."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from numba.extending import register_jitable

from cactus_edge import semantics
from cactus_edge.semantics import ADD, REQUANTIZE, AddRounding, Rounding

LIMIT = 1 << 27
accumulators = st.one_of(
    st.integers(-LIMIT + 1, LIMIT - 1), st.integers(-300, 300), st.integers(1 << 24, (1 << 24) + 64)
)
q31 = st.one_of(
    st.integers(1 << 30, (1 << 31) - 1), st.sampled_from([1 << 30, (1 << 31) - 1, 3 << 29])
)


def half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def half_away(x: Fraction) -> int:
    return half_up(x) if x >= 0 else -half_up(-x)


def half_even(x: Fraction) -> int:
    return round(x)


@given(acc=accumulators, m=q31, shift=st.integers(0, 31))
def test_double_roundings(acc: int, m: int, shift: int) -> None:
    first = half_up(Fraction(acc * m, 1 << 31))
    away = semantics.requantize_double_half_away(acc, m, shift)
    assert away == half_away(Fraction(first, 1 << shift))
    up = semantics.requantize_double_half_up(acc, m, shift)
    assert up == half_up(Fraction(first, 1 << shift))


@given(acc=accumulators, m=st.integers(1, (1 << 31) - 1), shift=st.integers(1, 62))
def test_single_rounding(acc: int, m: int, shift: int) -> None:
    assert semantics.requantize_single(acc, m, shift) == half_up(Fraction(acc * m, 1 << shift))


@given(acc=accumulators, m=st.integers(1 << 23, (1 << 24) - 1), shift=st.integers(24, 54))
def test_float32_is_what_the_processor_does(acc: int, m: int, shift: int) -> None:
    scale = np.float32(math.ldexp(m, -shift))
    product = np.float32(acc) * scale
    assert semantics.requantize_float32(acc, m, shift) == int(np.rint(product))


@given(acc=accumulators, m=st.integers(1 << 52, (1 << 53) - 1), shift=st.integers(53, 84))
def test_float64_is_what_the_processor_does(acc: int, m: int, shift: int) -> None:
    product = Fraction(float(acc) * math.ldexp(m, -shift))
    assert semantics.requantize_float64(acc, m, shift) == half_away(product)


@given(
    acc=st.integers(1, LIMIT - 1),
    level=st.integers(0, 300),
    ulps=st.integers(-3, 3),
)
def test_float64_next_to_ties(acc: int, level: int, ulps: int) -> None:
    """Factors within a few last places of a tie, where the product's rounding decides."""
    factor = (level + 0.5) / acc
    for _ in range(abs(ulps)):
        factor = math.nextafter(factor, math.inf if ulps > 0 else 0)
    mantissa, exponent = math.frexp(factor)
    if not -30 <= exponent <= 0:
        return
    m, shift = int(mantissa * 2**53), 53 - exponent
    product = Fraction(float(acc) * factor)
    assert semantics.requantize_float64(acc, m, shift) == half_away(product)


@given(x=st.integers(0, (1 << 62) - 1), bits=st.integers(2, 53))
def test_significant_bits(x: int, bits: int) -> None:
    assert semantics.bit_length(x) == x.bit_length()
    dropped = max(0, x.bit_length() - bits)
    expected = half_even(Fraction(x, 1 << dropped)) << dropped
    assert semantics.round_significant(x, bits) == expected


@given(x=st.integers(-(1 << 40), 1 << 40), low=st.integers(-128, 0), high=st.integers(0, 255))
def test_clamp(x: int, low: int, high: int) -> None:
    assert semantics.clamp(x, low, high) == min(max(x, low), high)


@given(total=st.integers(-(1 << 20), 1 << 20), count=st.integers(1, 4096))
def test_average(total: int, count: int) -> None:
    # TFLite adds count // 2 before its truncating division: for odd counts that is exact rounding.
    sign = 1 if total >= 0 else -1
    assert semantics.average(total, count) == sign * ((abs(total) + count // 2) // count)


SAMPLE = {
    Rounding.DOUBLE_HALF_AWAY: (1395864371, 7),
    Rounding.DOUBLE_HALF_UP: (1395864371, 7),
    Rounding.SINGLE: (1395864371, 38),
    Rounding.FLOAT32: (11184811, 30),
    Rounding.FLOAT64: (6004799503160661, 60),
}


@pytest.mark.parametrize("rounding", list(Rounding), ids=lambda r: r.name)
def test_monotone_and_the_same_everywhere(rounding: Rounding) -> None:
    function = REQUANTIZE[rounding]
    multiplier, shift = SAMPLE[rounding]
    points = np.concatenate(
        [
            np.arange(-70_000, 70_000),
            np.arange(LIMIT - 5_000, LIMIT),
            np.arange(-LIMIT + 1, -LIMIT + 5_000),
        ]
    ).astype(np.int64)
    vector = function(points, multiplier, shift)
    order = np.sort(points)
    assert (np.diff(function(order, multiplier, shift)) >= 0).all()
    for helper in vars(semantics).values():
        if getattr(helper, "__module__", "") == semantics.__name__ and callable(helper):
            if isinstance(helper, type):
                continue
            register_jitable(helper)
    compiled = njit(function)
    for point in points[:: len(points) // 997].tolist():
        scalar = function(point, multiplier, shift)
        index = int(np.flatnonzero(points == point)[0])
        assert scalar == vector[index] == compiled(point, multiplier, shift)


@given(
    a=st.integers(-255, 255),
    b=st.integers(-255, 255),
    rounding=st.sampled_from(list(AddRounding)),
    far=st.integers(-(1 << 15) + 256, (1 << 15) - 256),
)
def test_add_is_monotone_in_each_argument(a: int, b: int, rounding: AddRounding, far: int) -> None:
    if rounding is AddRounding.INT16:
        a, b = a + far, b - far
    integers = {
        AddRounding.INT16: (1073741824, 0, 1335705743, 2, 1875459495, 14),
        AddRounding.DOUBLE_HALF_AWAY: (1073741824, 0, 1335705743, 2, 1875459495, 19),
        AddRounding.SINGLE: (1073741824, 31, 1335705743, 33, 1875459495, 50),
        AddRounding.FIXED_POINT: (734_003, 0, 228_000, 0, 1, 20),
    }[rounding]
    function = ADD[rounding]
    here = function(a, b, *integers)
    assert function(a + 1, b, *integers) >= here
    assert function(a, b + 1, *integers) >= here
    array = function(np.array([a], np.int64), np.array([b], np.int64), *integers)
    assert int(array[0]) == here
