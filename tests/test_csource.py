"""Generated C text: the translation of every semantics function, weight tables, plans, errors."""

from __future__ import annotations

import ctypes
import inspect
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import CORE_OPERATORS, graphs, random_graph, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge import constraints, profiles, semantics
from cactus_edge.csource import CSource, Layout, generate, translate
from cactus_edge.csource.encoding import blocks, encode
from cactus_edge.csource.linear import folded_bias
from cactus_edge.csource.planner import Buffer, aligned, plan
from cactus_edge.csource.syntax import Width, c_name, translate_all
from cactus_edge.errors import InvalidGraphError, OutputError, UsageError
from cactus_edge.execute import execute
from cactus_edge.graph import (
    DType,
    FullyConnected,
    Graph,
    Quantization,
    Requantization,
    Tensor,
    Weights,
)
from cactus_edge.semantics import Rounding
from firmware_sim import build, run_host

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


BUFFERS = st.lists(
    st.tuples(st.integers(1, 200), st.integers(0, 12), st.integers(0, 4)).map(
        lambda t: Buffer(t[0], t[1], t[1] + t[2])
    ),
    max_size=14,
)


@given(BUFFERS)
def test_plan_never_overlaps_what_is_alive(buffers: list[Buffer]) -> None:
    offsets, size = plan(buffers)
    for i, (a, start) in enumerate(zip(buffers, offsets, strict=True)):
        assert start % 4 == 0 and start + a.size <= size
        for b, other in zip(buffers[:i], offsets[:i], strict=True):
            together = a.first <= b.last and b.first <= a.last
            assert not together or start + a.size <= other or other + b.size <= start
    peaks = [sum(b.size for b in buffers if b.first <= moment <= b.last) for moment in range(0, 17)]
    assert max(peaks) <= size <= sum(aligned(b.size) for b in buffers)


def test_plan_reuses_what_is_dead() -> None:
    chain = [Buffer(100, 0, 1), Buffer(60, 1, 2), Buffer(100, 2, 3)]
    assert plan(chain) == ([0, 100, 0], 160)
    assert plan([]) == ([], 0)


def decoded(matrix: np.ndarray, layout: Layout, block: int) -> np.ndarray:
    """Weights from a table, as the C reads them."""
    encoding = encode(matrix, layout, block, where="layer")
    result = np.zeros(matrix.shape, np.int64)
    stream = iter(encoding.values.tolist())
    if encoding.layout.sparse:
        for channel, count in enumerate(encoding.counts.tolist()):
            position = 0
            for _ in range(count):
                byte = next(stream)
                if encoding.layout.packed:
                    distance, value = byte & 15, byte >> 4
                else:
                    distance, value = byte & 255, next(stream)
                position += distance
                result[channel, position] += value
        assert next(stream, None) is None
        return result
    packed, taps = encoding.layout.packed, matrix.shape[1]
    step = 2 if packed else 1

    def put(channel: int, tap: int, byte: int) -> None:
        nibbles = [(byte & 15 ^ 8) - 8, byte >> 4] if packed else [byte]
        fitting = nibbles[: taps - tap]
        result[channel, tap : tap + len(fitting)] = fitting

    for start, end, width in blocks(matrix.shape[0], block):
        for first in range(start, end, width):
            for group in range(0, taps // 4 * 4, 4):
                # Pairs of channels for nibbles, single channels for bytes; odd widths as they come.
                together = 1 if not packed else width if width % 2 else 2
                for one in range(first, first + width, together):
                    for tap in range(group, group + 4, step):
                        for channel in range(one, one + together):
                            put(channel, tap, next(stream))
            for tap in range(taps // 4 * 4, taps, step):
                for channel in range(first, first + width):
                    put(channel, tap, next(stream))
    assert next(stream, None) is None
    return result


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 700),
    st.sampled_from([0, 0.6, 0.99]),
)
def test_tables_decode_to_the_weights(seed: int, out: int, taps: int, sparsity: float) -> None:
    rng = np.random.default_rng(seed)
    for bits, layouts in ((4, (Layout.INT4, Layout.SPARSE4)), (8, (Layout.INT8, Layout.SPARSE8))):
        matrix = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (out, taps)).astype(np.int8)
        matrix[rng.random(matrix.shape) < sparsity] = 0
        for layout in layouts:
            for block in (1, 2, 4):
                np.testing.assert_array_equal(decoded(matrix, layout, block), matrix)


@pytest.mark.parametrize(
    ("bits", "sparsity", "expected"),
    [
        (8, 0.0, Layout.INT8),
        (4, 0.0, Layout.INT4),
        (8, 0.9, Layout.SPARSE8),
        (4, 0.8, Layout.SPARSE4),
        (4, 0.3, Layout.INT4),
    ],
)
def test_auto_takes_the_smallest(bits: int, sparsity: float, expected: Layout) -> None:
    rng = np.random.default_rng(3)
    largest = (1 << (bits - 1)) - 1
    matrix = rng.integers(1, largest + 1, (8, 400)).astype(np.int8)
    matrix[rng.random(matrix.shape) < sparsity] = 0
    chosen = encode(matrix, Layout.AUTO, 4, where="layer")
    assert chosen.layout is expected
    possible = [k for k in Layout if k is not Layout.AUTO and (bits == 4 or not k.packed)]
    assert chosen.size == min(encode(matrix, k, 4, where="layer").size for k in possible)


def hand_made(weight: int = 3, multiplier: int = 1 << 30, features: int = 6) -> Graph:
    """A FULLY_CONNECTED layer of two outputs that are resolved by hand."""
    values = np.full((2, features), weight, np.int8)
    op = FullyConnected(
        name="fc */ int evil;",
        inputs=(0,),
        output=1,
        weights=Weights(values),
        bias=np.zeros(2, np.int32),
        requantization=Requantization.uniform(Rounding.SINGLE, multiplier, 32, 2),
    )
    return Graph((Tensor("x", (1, features)), Tensor("y", (1, 2))), (op,), 0, 1)


def test_text_is_deterministic_and_freestanding() -> None:
    graph = random_graph(np.random.default_rng(5), depth=6)
    copy = replace(graph, operators=tuple(replace(op) for op in graph.operators))
    first, second = generate(graph), generate(copy)
    assert dict(first.files) == dict(second.files)
    text = "".join(first.files.values())
    # The header for vectors comes with the compiler, as the other one does.
    expected = {"<stdint.h>", '"cactus_edge.h"', "<arm_mve.h>"}
    assert set(re.findall(r"#include\s+(\S+)", text)) == expected
    code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(float|double|malloc|memcpy|printf)\b", code)


def test_names_cannot_leave_the_comment() -> None:
    text = generate(hand_made()).files["cactus_edge.c"]
    assert "fc__/_int_evil;" in text
    assert "evil;" not in re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


@given(graphs(operators=CORE_OPERATORS, input_type=DType.UINT8))
@settings(max_examples=20)
def test_sizes_are_those_of_the_graph(graph: Graph) -> None:
    source = generate(graph)
    assert source.input_bytes == graph.tensors[graph.core_input].size
    assert source.output_bytes == graph.tensors[graph.logits].size
    assert (
        f"#define CACTUS_EDGE_ARENA_BYTES {source.arena_bytes}\n" in source.files["cactus_edge.h"]
    )
    assert [layer.output for layer in source.layers] == [op.output for op in graph.core]
    assert "int32_t cactus_edge_run(const uint8_t *input" in source.files["cactus_edge.h"]


def test_only_the_roundings_in_use_are_defined() -> None:
    graph = random_graph(np.random.default_rng(2), operators=("CONV_2D",), depth=2, bits=(8,))
    micro = generate(graph, "tflite-micro").files["cactus_edge.c"]
    assert "requantize_double_half_away_32(" in micro
    assert "requantize_float32" not in micro and "requantize_single" not in micro
    xnnpack = generate(graph, "litert-xnnpack-x86").files["cactus_edge.c"]
    assert "requantize_float32(" in xnnpack and "double_half" not in xnnpack


@pytest.mark.parametrize(("shift", "narrow"), [(0, True), (30, True), (31, False)])
def test_width_follows_the_shift(shift: int, narrow: bool) -> None:
    """``1 << 31`` is no int32."""
    graph = hand_made()
    (op,) = graph.operators
    assert isinstance(op, FullyConnected)
    parameters = Requantization.uniform(Rounding.DOUBLE_HALF_AWAY, 1 << 30, shift, 2)
    graph = replace(graph, operators=(replace(op, requantization=parameters),))
    text = generate(graph).files["cactus_edge.c"]
    assert ("requantize_double_half_away_32(sum" in text) is narrow
    assert ("requantize_double_half_away(sum" in text) is not narrow


def test_two_models_link_into_one_library(tmp_path: Path) -> None:
    texts: dict[str, str] = {}
    graphs_ = [random_graph(np.random.default_rng(seed), depth=4) for seed in (1, 2)]
    for name, graph in zip(("first", "second"), graphs_, strict=True):
        source = generate(graph, prefix=name)
        texts |= {f"{name}/{file}": text for file, text in source.files.items()}
    library = ctypes.CDLL(str(build.shared_library(texts, tmp_path)))
    assert library.first_run and library.second_init


@pytest.mark.parametrize("certified", [False, True])
def test_generated_c_has_no_warnings(tmp_path: Path, certified: bool) -> None:
    graph = random_graph(np.random.default_rng(11), depth=8)
    names = build.put(generate(graph, certified=certified).files, tmp_path)
    strict = ["-Weverything", "-Wno-unsafe-buffer-usage", "-Wno-implicit-int-conversion"]
    strict += ["-Wno-declaration-after-statement", "-Wno-pre-c11-compat", "-Wno-padded"]
    arguments = ["-std=c99", "-Werror", *strict, "-ffreestanding", "-c", *names, "-o", "model.o"]
    build.compile_c(arguments, tmp_path)


@pytest.mark.parametrize("prefix", ["", "2nd", "my-model", "a b"])
def test_prefix_has_to_be_an_identifier(prefix: str) -> None:
    with pytest.raises(UsageError, match="not a C identifier"):
        generate(hand_made(), prefix=prefix)


def test_prefix_leaves_the_example_its_name() -> None:
    with pytest.raises(UsageError, match="main.c is the example's"):
        generate(hand_made(), prefix="Main")


def test_a_nibble_cannot_be_forced() -> None:
    with pytest.raises(UsageError, match=r"FULLY_CONNECTED 'fc.*weights 9..9 do not fit.*'int8'"):
        generate(hand_made(weight=9), layout=Layout.INT4)
    generate(hand_made(weight=7), layout=Layout.INT4)


def test_graph_is_validated() -> None:
    with pytest.raises(InvalidGraphError, match="effective multiplier"):
        generate(replace_shift(hand_made(), 30))
    with pytest.raises(UsageError, match="no rounding profile"):
        generate(hand_made(), "no-such-profile")


def replace_shift(graph: Graph, shift: int) -> Graph:
    (op,) = graph.operators
    assert isinstance(op, FullyConnected)
    parameters = Requantization.uniform(Rounding.SINGLE, 1 << 30, shift, 2)
    return replace(graph, operators=(replace(op, requantization=parameters),))


def test_partial_sums_have_to_fit_int32() -> None:
    """A clamp holds the accumulator down to 0, but not the two parts that folding makes of it."""
    many = 1 << 17
    hidden = Tensor("hidden", (1, many), quantization=Quantization.of(0.1, -128))
    tensors = (Tensor("x", (1, 1)), hidden, Tensor("y", (1, 2)))
    (last,) = hand_made(features=many, weight=127).operators
    assert isinstance(last, FullyConnected)
    first = FullyConnected(
        name="first",
        inputs=(0,),
        output=1,
        weights=Weights(np.ones((many, 1), np.int8)),
        bias=np.zeros(many, np.int32),
        clamp=(-128, -128),
        requantization=Requantization.uniform(Rounding.SINGLE, 1 << 30, 32, many),
    )
    graph = Graph(tensors, (first, replace(last, inputs=(1,), output=2)), 0, 2)
    constraints.validate(graph)
    matrix = last.weights.values.astype(np.int64)
    with pytest.raises(InvalidGraphError, match="channel 0: partial sums may reach 4261412864"):
        folded_bias(graph, replace(last, inputs=(1,)), matrix)


def test_crc_is_zlibs() -> None:
    graph = random_graph(np.random.default_rng(5), depth=6)
    source = generate(graph)
    assert source.crc32 == zlib.crc32(b"".join(source.tables.values()))
    assert f"CACTUS_EDGE_CRC32 0x{source.crc32:08x}u\n" in source.files["cactus_edge.h"]
    head = r"^(?:static const|TABLE) u?int(\d+)_t (\w+)\[(\d+)\]"
    tables = re.findall(head, text_of(source), re.MULTILINE)
    sizes = {name: int(bits) // 8 * int(count) for bits, name, count in tables}
    assert sizes == {name: len(content) for name, content in source.tables.items()}
    assert source.table_bytes == sum(layer.table_bytes for layer in source.layers)


def text_of(source: CSource) -> str:
    return source.files[f"{source.prefix}.c"]


@pytest.mark.parametrize("certified", [False, True])
def test_arena_is_measured_against_what_is_alive(certified: bool) -> None:
    for seed in range(20):
        graph = random_graph(np.random.default_rng(seed), depth=7)
        source = generate(graph, certified=certified)
        assert source.arena_lower_bound == max(layer.live_bytes for layer in source.layers)
        assert source.arena_lower_bound <= source.arena_bytes
        header = source.files["cactus_edge.h"]
        assert f"#define CACTUS_EDGE_ARENA_LOWER_BOUND {source.arena_lower_bound}\n" in header


def test_every_public_name_is_documented() -> None:
    header = generate(hand_made(), certified=True).files["cactus_edge.h"]
    code = re.sub(r"/\*.*?\*/", "/**/", header, flags=re.DOTALL)
    public = re.findall(r"^(?:int32_t|void) \w+\(|^#define \w+ |^} \w+;", code, re.MULTILINE)
    documented = re.findall(
        r"/\*\*/\n(?:int32_t|void) \w+\(|/\*\*/\n#define \w+ |/\*\*/\ntypedef", code
    )
    assert len(public) == len(documented) > 10


def test_library_folder_builds_and_runs(tmp_path: Path) -> None:
    """The example of a folder, compiled as its Makefile does; a changed weight stops it."""
    source = generate(hand_made(), layout=Layout.INT8, prefix="wake_word", certified=True)
    source.write(tmp_path)
    names = {"wake_word.h", "wake_word.c", "main.c", "Makefile", "CMakeLists.txt", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    command = ["make", f"CC={sys.executable} -m ziglang cc", f"AR={sys.executable} -m ziglang ar"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    points = np.random.default_rng(0).integers(-128, 128, (5, 6), np.int8)
    run = subprocess.run(
        [tmp_path / "example"], input=points.tobytes(), capture_output=True, check=True
    )
    labels = [int(line.split()[0]) for line in run.stdout.decode().splitlines()]
    assert labels == execute(hand_made(), points).argmax(axis=1).tolist()
    text = text_of(source)
    changed = text.replace("  3, 3, 3", "  3, 3, 2", 1)
    assert changed != text
    (tmp_path / "wake_word.c").write_text(changed, encoding="utf-8")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    run = subprocess.run([tmp_path / "example"], input=b"", capture_output=True, check=False)
    assert run.returncode == 1


def test_the_crc_is_one_function_whatever_it_covers(tmp_path: Path) -> None:
    """A copy of it for each table would take kilobytes of flash; without tables there is none."""
    source = generate(random_graph(np.random.default_rng(8), depth=6))
    assert len(source.tables) > 6
    text = source.files["cactus_edge.c"]
    assert all(f"crc = crc_of(crc, {name}, sizeof {name});" in text for name in source.tables)
    names = build.put(source.files, tmp_path)
    build.compile_c(["-std=c99", "-O2", "-S", *names, "-o", "model.s"], tmp_path)
    assembly = (tmp_path / "model.s").read_text()
    assert len(re.findall(r"(?:call|bl)\w*\s+\S*crc_of", assembly)) == len(source.tables)
    without = random_graph(np.random.default_rng(0), operators=("MAX_POOL_2D",), classes=None)
    assert not generate(without).tables and "crc_of" not in text_of(generate(without))
    inputs = random_inputs(np.random.default_rng(0), without, 3)
    np.testing.assert_array_equal(run_host(without, inputs).outputs, execute(without, inputs))


def test_files_are_not_overwritten(tmp_path: Path) -> None:
    source = generate(hand_made())
    source.write(tmp_path)
    assert (tmp_path / "cactus_edge.c").read_text(encoding="utf-8") == source.files["cactus_edge.c"]
    with pytest.raises(OutputError, match="--force"):
        source.write(tmp_path)
    source.write(tmp_path, force=True)


def test_all_profiles_generate() -> None:
    graph = random_graph(np.random.default_rng(8), depth=6)
    texts = {name: generate(graph, name).files["cactus_edge.c"] for name in profiles.PROFILES}
    assert len({re.sub(r"/\*.*?\*/", "", t, flags=re.DOTALL) for t in texts.values()}) > 3
