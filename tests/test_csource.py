"""Generated C text: weight tables, plans of memory, whole libraries, errors."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import CORE_OPERATORS, graphs, random_graph, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge import constraints, profiles
from cactus_edge.csource import CSource, Layout, generate
from cactus_edge.csource.encoding import blocks, encode
from cactus_edge.csource.linear import folded_bias
from cactus_edge.csource.planner import Buffer, aligned, plan
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
