"""The translation to C of every function of the integer semantics, and what it refuses."""

from __future__ import annotations

import ctypes
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import semantics
from cactus_edge.csource import translate
from cactus_edge.csource.syntax import Width, c_name, translate_all
from cactus_edge.errors import UsageError
from firmware_sim import build

SAMPLES = 4000
FUNCTIONS = {
    name: function
    for name, function in vars(semantics).items()
    if inspect.isfunction(function) and function.__module__ == semantics.__name__
}
Columns = list[np.ndarray]


def integers(rng: np.random.Generator, lowest: int, highest: int) -> np.ndarray:
    """Int64 over all magnitudes of [lowest, highest], ends and neighbours of 2**k included."""
    width = max(abs(lowest), abs(highest)).bit_length()
    magnitude = rng.integers(0, 2 ** rng.integers(1, width + 1, SAMPLES) - 1, endpoint=True)
    values = magnitude * rng.choice([-1, 1], SAMPLES)
    corners = [0, lowest, highest, lowest + 1, highest - 1]
    corners += [s * (2**k + d) for k in range(width) for d in (-1, 0, 1) for s in (-1, 1)]
    chosen = rng.choice(np.array(corners, np.int64), SAMPLES)
    return np.clip(np.where(rng.random(SAMPLES) < 0.5, values, chosen), lowest, highest)


def requantization(multiplier: tuple[int, int], shift: tuple[int, int], unit: int) -> Callable:
    """Accumulators around the points where the output steps; factor multiplier * 2**-(unit + s)."""

    def draw(rng: np.random.Generator) -> Columns:
        m = integers(rng, *multiplier)
        s = rng.integers(shift[0], shift[1] + 1, SAMPLES)
        halves = 2 * integers(rng, -300, 300) + 1
        steps = [
            int(h) * 2 ** (unit + int(t)) // (2 * max(int(f), 1))
            for h, t, f in zip(halves, s, m, strict=True)
        ]
        near = np.array([min(max(x, -(2**27) + 2), 2**27 - 2) for x in steps], np.int64)
        near += rng.integers(-1, 2, SAMPLES)
        accumulator = np.where(rng.random(SAMPLES) < 0.7, near, integers(rng, -(2**27), 2**27))
        return [accumulator, m, s]

    return draw


def addition(shift: tuple[int, int], largest: int = 255) -> Callable:
    def draw(rng: np.random.Generator) -> Columns:
        pairs = [
            part
            for _ in range(3)
            for part in (
                integers(rng, 0, 2**31 - 1),
                rng.integers(shift[0], shift[1] + 1, SAMPLES),
            )
        ]
        operands = [integers(rng, -largest, largest) for _ in range(2)]
        return [*operands, *pairs]

    return draw


def fixed_point(rng: np.random.Generator) -> Columns:
    zero, one = np.zeros(SAMPLES, np.int64), np.ones(SAMPLES, np.int64)
    m_a, m_b = integers(rng, 0, 2**31 - 1), integers(rng, 0, 2**31 - 1)
    a, b = integers(rng, -255, 255), integers(rng, -255, 255)
    return [a, b, m_a, zero, m_b, zero, one, rng.integers(1, 32, SAMPLES)]


def clamping(limit: int) -> Callable:
    def draw(rng: np.random.Generator) -> Columns:
        ends = np.sort(np.stack([integers(rng, -300, 300), integers(rng, -300, 300)]), axis=0)
        x = np.where(rng.random(SAMPLES) < 0.5, integers(rng, -limit, limit), ends[0])
        return [x + rng.integers(-1, 2, SAMPLES), ends[0], ends[1]]

    return draw


# For each function and width the arguments that the conversion promises to be right for.
DOUBLE = requantization((0, 2**31 - 1), (0, 31), 31)
NARROW_DOUBLE = requantization((0, 2**31 - 1), (0, 30), 31)
DOMAINS: dict[tuple[str, Width], Callable[[np.random.Generator], Columns]] = {
    ("clamp", 64): clamping(2**60),
    ("clamp", 32): clamping(2**30),
    ("bit_length", 64): lambda rng: [integers(rng, 0, 2**63 - 1)],
    ("shift_half_up", 64): lambda rng: [
        integers(rng, -(2**62), 2**62 - 1),
        rng.integers(0, 63, SAMPLES),
    ],
    ("shift_half_up", 32): lambda rng: [
        integers(rng, -(2**30), 2**30 - 1),
        rng.integers(0, 31, SAMPLES),
    ],
    ("shift_half_away", 64): lambda rng: [
        integers(rng, -(2**62), 2**62),
        rng.integers(0, 63, SAMPLES),
    ],
    ("shift_half_away", 32): lambda rng: [
        integers(rng, -(2**30), 2**30),
        rng.integers(0, 31, SAMPLES),
    ],
    ("shift_half_even", 64): lambda rng: [integers(rng, 0, 2**62), rng.integers(0, 63, SAMPLES)],
    ("round_significant", 64): lambda rng: [integers(rng, 0, 2**60), rng.integers(1, 54, SAMPLES)],
    ("multiply_high", 64): lambda rng: [integers(rng, -(2**31), 2**31), integers(rng, 0, 2**31)],
    ("multiply_high", 32): lambda rng: [
        integers(rng, -(2**30) + 1, 2**30 - 1),
        integers(rng, 0, 2**31 - 1),
    ],
    ("requantize_double_half_away", 64): DOUBLE,
    ("requantize_double_half_away", 32): NARROW_DOUBLE,
    ("requantize_double_half_up", 64): DOUBLE,
    ("requantize_double_half_up", 32): NARROW_DOUBLE,
    ("requantize_single", 64): requantization((0, 2**31 - 1), (1, 62), 0),
    ("requantize_float32", 64): requantization((2**23, 2**24 - 1), (24, 54), 0),
    ("requantize_float64", 64): requantization((2**52, 2**53 - 1), (53, 84), 0),
    ("add_double_half_away", 64): addition((0, 31)),
    ("add_double_half_away", 32): addition((0, 30)),
    ("add_early_shift", 64): addition((0, 20)),
    ("add_int16", 64): addition((0, 31), 2**15),
    ("add_single", 64): addition((31, 62)),
    ("add_fixed_point", 64): fixed_point,
    ("average", 64): lambda rng: [integers(rng, -(2**40), 2**40), integers(rng, 1, 2**23)],
    ("average", 32): lambda rng: [integers(rng, -(2**30), 2**30), integers(rng, 1, 2**23)],
}


@pytest.fixture(scope="module")
def translated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All translations in one library, each behind a loop over arrays."""
    parts = ["#include <stdint.h>", translate_all((FUNCTIONS[n], w) for n, w in DOMAINS)]
    for name, width in DOMAINS:
        count = len(inspect.signature(FUNCTIONS[name]).parameters)
        reads = ", ".join(f"(int{width}_t)arguments[{n}][i]" for n in range(count))
        call = f"{c_name(name, width)}({reads})"
        parts.append(
            f"void loop_{name}_{width}(const int64_t **arguments, int64_t *results)\n"
            f"{{ for (int i = 0; i < {SAMPLES}; i++) results[i] = {call}; }}"
        )
    folder = tmp_path_factory.mktemp("translated")
    return ctypes.CDLL(str(build.shared_library({"all.c": "\n".join(parts)}, folder)))


def test_every_function_is_compared() -> None:
    assert {name for name, width in DOMAINS if width == 64} == set(FUNCTIONS)


@pytest.mark.parametrize(("name", "width"), DOMAINS, ids=lambda value: str(value))
def test_translation_equals_python(translated: ctypes.CDLL, name: str, width: Width) -> None:
    columns = DOMAINS[name, width](np.random.default_rng(len(name) + width))
    columns = [np.ascontiguousarray(column, np.int64) for column in columns]
    results = np.empty(SAMPLES, np.int64)
    pointers = (ctypes.c_void_p * len(columns))(*(c.ctypes.data for c in columns))
    getattr(translated, f"loop_{name}_{width}")(pointers, ctypes.c_void_p(results.ctypes.data))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    expected = [FUNCTIONS[name](*row) for row in rows]
    assert results.tolist() == expected
    assert len(set(expected)) > 5, "the arguments explore nothing"


def test_translation_is_in_order_and_has_each_function_once() -> None:
    text = translate_all(
        [(semantics.add_double_half_away, 64), (semantics.add_double_half_away, 32)]
    )
    defined = re.findall(r"^static inline int\d\d_t (\w+)\(", text, re.MULTILINE)
    assert len(defined) == len(set(defined))
    assert defined.index("multiply_high") < defined.index("requantize_double_half_away_32")
    assert translate(semantics.shift_half_up) == (
        "static inline int64_t shift_half_up(int64_t x, int64_t exponent)\n{\n"
        "  return ((x + ((INT64_C(1) << exponent) >> INT64_C(1))) >> exponent);\n}\n"
    )


def _divides(x: int) -> int:
    return int(x / 2)


def _shifts_left(x: int) -> int:
    return x << 2


def _loops(x: int) -> int:
    while x > 3:
        x = x - 1
    return x


def _assigns_twice(x: int) -> int:
    y = x + 1
    y = y + 1
    return x + y


def _is_float(x: int) -> float:
    return x * 0.5


def _calls_unknown(x: int) -> int:
    return abs(x)


def _calls_with_too_few(x: int) -> int:
    return semantics.clamp(x)  # type: ignore


def _reads_a_global(x: int) -> int:
    return x + SAMPLES


def _has_a_default(x: int, y: int = 3) -> int:
    return x + y


def _returns_nothing(x: int) -> None:
    y = x + 1  # noqa: F841


def _chains(x: int) -> int:
    return 1 < x < 3


def _is_wide(x: int) -> int:
    return x + 4294967296


@pytest.mark.parametrize(
    ("function", "source"),
    [
        (_divides, "int(x / 2)"),
        (_shifts_left, "x << 2"),
        (_loops, "while x > 3:"),
        (_assigns_twice, "y = y + 1"),
        (_is_float, "0.5"),
        (_calls_unknown, "abs(x)"),
        (_calls_with_too_few, "semantics.clamp(x)"),
        (_reads_a_global, "SAMPLES"),
        (_has_a_default, "def _has_a_default(x: int, y: int = 3) -> int:"),
        (_returns_nothing, "y = x + 1"),
        (_chains, "1 < x < 3"),
    ],
)
def test_what_is_outside_the_subset_is_named(function: Callable, source: str) -> None:
    with pytest.raises(UsageError) as caught:
        translate(function)
    message = str(caught.value)
    assert f"`{source}`" in message
    assert message.startswith(f"{function.__name__}, line ")
    line = int(re.findall(r"line (\d+)", message)[0])
    assert source in Path(__file__).read_text(encoding="utf-8").splitlines()[line - 1]


def test_a_constant_has_to_fit_the_width() -> None:
    assert "INT64_C(4294967296)" in translate(_is_wide)
    with pytest.raises(UsageError, match="`4294967296` is outside.*32 bits"):
        translate(_is_wide, width=32)
