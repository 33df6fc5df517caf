"""Two-way multiplications of Cortex-M4, M7 and M33: the same integers in fewer instructions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cactus_edge.csource import CSource, Layout, generate
from cactus_edge.csource.encoding import encode
from cactus_edge.csource.linear import by_pairs
from cactus_edge.execute import execute
from cactus_edge.graph import (
    Conv2D,
    DType,
    FullyConnected,
    Graph,
    Padding,
    Quantization,
    Requantization,
    Tensor,
    Weights,
)
from cactus_edge.semantics import Rounding
from firmware_sim import BOARDS, Simulation, build
from firmware_sim.simulation import simulate_source

WITH_PAIRS = {"cortex-m4": "STM32F405", "cortex-m7": "STM32H743", "cortex-m33": "nRF5340"}


def requantization(channels: int, taps: int) -> Requantization:
    """Spreads the accumulators over the output's range."""
    shift = 9 + int(taps).bit_length() // 2
    return Requantization.uniform(Rounding.DOUBLE_HALF_AWAY, 1 << 30, shift - 1, channels)


def dense(
    seed: int, channels: int, taps: int, bits: int, kind: DType = DType.INT8, extreme: bool = False
) -> Graph:
    """A FULLY_CONNECTED layer; ``extreme`` weights are the largest and the smallest alone."""
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    values = rng.integers(-half, half, (channels, taps))
    if extreme:
        values = rng.choice([-half, half - 1], (channels, taps))
    op = FullyConnected(
        name="fc",
        inputs=(0,),
        output=1,
        weights=Weights(values, bits),
        bias=rng.integers(-5000, 5000, channels),
        requantization=requantization(channels, taps),
    )
    source = Tensor("x", (1, taps), kind, Quantization.of(1, 0))
    return Graph((source, Tensor("y", (1, channels))), (op,), 0, 1)


def convolution(seed: int, channels: int, depth: int, bits: int, size: int, width: int) -> Graph:
    """A CONV_2D layer over rows of ``width`` pixels; 1x1 kernels read them in place."""
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    op = Conv2D(
        name="conv",
        inputs=(0,),
        output=1,
        weights=Weights(rng.integers(-half, half, (channels, size, size, depth)), bits),
        bias=rng.integers(-5000, 5000, channels),
        requantization=requantization(channels, size * size * depth),
        padding=Padding.SAME,
    )
    source = Tensor("x", (1, 3, width, depth), quantization=Quantization.of(1, 3))
    return Graph((source, Tensor("y", (1, 3, width, channels))), (op,), 0, 1)


def pruned(graph: Graph, kept: float) -> Graph:
    """The first layer with that share of its weights; the first channel with none at all."""
    (op,) = graph.operators
    assert isinstance(op, (Conv2D, FullyConnected))
    values = np.where(np.random.default_rng(0).random(op.weights.values.shape) < kept, 1, 0)
    values = values * op.weights.values
    values[0] = 0
    return replace(graph, operators=(replace(op, weights=replace(op.weights, values=values)),))


def portable(source: CSource) -> CSource:
    text = "#define CACTUS_EDGE_PORTABLE\n" + source.files["cactus_edge.c"]
    return replace(source, files={**source.files, "cactus_edge.c": text})


def samples(graph: Graph, count: int) -> np.ndarray:
    tensor = graph.tensors[0]
    rng = np.random.default_rng(0)
    lowest, highest = tensor.dtype.range
    inputs = rng.integers(lowest, highest + 1, (count, *tensor.shape[1:]))
    inputs[0], inputs[1] = lowest, highest
    return inputs


def both_ways(graph: Graph, cpu: str, layout: Layout) -> tuple[Simulation, Simulation]:
    """With pairs and without, each equal to the reference executor."""
    source = generate(graph, layout=layout)
    inputs = samples(graph, 4)
    runs = [
        simulate_source(graph, text, inputs, BOARDS[WITH_PAIRS[cpu]])
        for text in (source, portable(source))
    ]
    expected = execute(graph, inputs)
    assert len(np.unique(expected)) > 2
    for run in runs:
        np.testing.assert_array_equal(run.outputs, expected)
    return runs[0], runs[1]


CASES = {
    "even blocks": (dense(1, 8, 64, 8), Layout.INT8),
    "three taps left, three channels left": (dense(2, 7, 67, 8), Layout.INT8),
    "unsigned inputs": (dense(3, 6, 41, 8, DType.UINT8), Layout.INT8),
    "largest products": (dense(4, 4, 400, 8, extreme=True), Layout.INT8),
    "nibbles": (dense(5, 8, 64, 4), Layout.INT4),
    "nibbles, one tap left, two channels left": (dense(6, 6, 65, 4), Layout.INT4),
    "nibbles, unsigned inputs": (dense(7, 4, 43, 4, DType.UINT8), Layout.INT4),
    "largest nibbles": (dense(8, 4, 400, 4, extreme=True), Layout.INT4),
    "two pixels": (convolution(9, 5, 4, 8, 3, 5), Layout.INT8),
    "two pixels of nibbles": (convolution(10, 6, 3, 4, 3, 5), Layout.INT4),
    "two pixels in place": (convolution(11, 4, 9, 8, 1, 4), Layout.INT8),
}


SPARSE = {
    "entries": (pruned(dense(20, 9, 64, 8), 0.3), Layout.SPARSE8),
    "distant entries": (pruned(dense(21, 4, 2000, 8), 0.004), Layout.SPARSE8),
    "entries, unsigned inputs": (pruned(dense(22, 6, 41, 8, DType.UINT8), 0.5), Layout.SPARSE8),
    "entries, largest products": (pruned(dense(23, 4, 400, 8, extreme=True), 0.9), Layout.SPARSE8),
    "entries, seven pixels": (pruned(convolution(24, 5, 4, 8, 3, 7), 0.2), Layout.SPARSE8),
    "entries, in place": (pruned(convolution(25, 4, 9, 8, 1, 4), 0.4), Layout.SPARSE8),
    "packed entries": (pruned(dense(26, 9, 65, 4), 0.3), Layout.SPARSE4),
    "packed entries, distant": (pruned(dense(27, 9, 1000, 4), 0.05), Layout.SPARSE4),
    "packed entries, unsigned": (pruned(dense(28, 4, 43, 4, DType.UINT8), 0.5), Layout.SPARSE4),
    "packed entries, largest": (pruned(dense(29, 4, 400, 4, extreme=True), 0.9), Layout.SPARSE4),
    "packed entries, six pixels": (pruned(convolution(30, 6, 3, 4, 3, 6), 0.3), Layout.SPARSE4),
}
CASES |= SPARSE


@pytest.mark.parametrize("case", CASES)
def test_pairs_compute_the_same_integers(case: str) -> None:
    graph, layout = CASES[case]
    source = generate(graph, layout=layout)
    assert ("uxtab" if case in SPARSE else "smlad") in source.files["cactus_edge.c"]
    run = simulate_source(graph, source, samples(graph, 4), BOARDS["STM32F405"])
    expected = execute(graph, samples(graph, 4))
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(run.outputs, expected)


@pytest.mark.parametrize("cpu", ["cortex-m7", "cortex-m33"])
def test_other_processors_have_them_too(cpu: str) -> None:
    with_pairs, without = both_ways(dense(12, 20, 200, 8), cpu, Layout.INT8)
    assert with_pairs.instructions.median < 0.8 * without.instructions.median


@pytest.mark.parametrize(("bits", "layout", "most"), [(8, Layout.INT8, 17), (4, Layout.INT4, 19)])
def test_dense_layers_take_less_than_two_instructions_per_weight(
    bits: int, layout: Layout, most: int
) -> None:
    run, without = both_ways(dense(13, 32, 512, bits), "cortex-m4", layout)
    assert 10 * run.instructions.median < most * 32 * 512 < 10 * without.instructions.median


@pytest.mark.parametrize("layout", [Layout.SPARSE8, Layout.SPARSE4])
def test_sparse_layers_take_five_instructions_per_entry(layout: Layout) -> None:
    graph = pruned(dense(31, 32, 512, 4 if layout.packed else 8), 0.2)
    (op,) = graph.operators
    assert isinstance(op, FullyConnected)
    entries = int(encode(op.weights.values, layout, 2, where="fc").counts.sum())
    run, without = both_ways(graph, "cortex-m4", layout)
    assert run.instructions.median < 5.5 * entries < without.instructions.median


def test_pixels_without_registers_or_too_far_apart_are_left_to_portable_code() -> None:
    many = generate(pruned(convolution(32, 2, 2, 4, 3, 7), 0.5), layout=Layout.SPARSE4)
    far = generate(pruned(convolution(33, 2, 700, 8, 1, 7), 0.5), layout=Layout.SPARSE8)
    for source in (many, far):
        assert "uxtab" not in source.files["cactus_edge.c"]


def test_products_that_round_their_upper_word() -> None:
    """Accumulators beside the halves of the first rounding, one a channel, of every size."""
    rng = np.random.default_rng(0)
    channels = 2000
    multiplier = rng.integers(1 << 30, 1 << 31, channels)
    shift = rng.integers(0, 31, channels)
    halves = 2 * rng.integers(-260, 260, channels) + 1
    wanted = halves * 2.0 ** (30 + shift) / multiplier
    sums = np.clip(np.rint(wanted), 256 - (1 << 27), (1 << 27) - 256).astype(np.int64)
    rounding = np.full(channels, int(Rounding.DOUBLE_HALF_AWAY))
    rounding[channels // 2 :] = int(Rounding.DOUBLE_HALF_UP)
    op = FullyConnected(
        name="fc",
        inputs=(0,),
        output=1,
        weights=Weights(np.ones((channels, 1), np.int8)),
        bias=sums,
        requantization=Requantization(rounding, multiplier, shift),
    )
    source = Tensor("x", (1, 1), quantization=Quantization.of(1, 0))
    graph = Graph((source, Tensor("y", (1, channels))), (op,), 0, 1)
    text = generate(graph)
    assert "smmulr" in text.files["cactus_edge.c"]
    inputs = np.arange(-2, 3).reshape(-1, 1)
    run = simulate_source(graph, text, inputs, BOARDS["STM32F405"])
    expected = execute(graph, inputs)
    assert np.count_nonzero(expected[0] != expected[-1]) > channels // 20
    np.testing.assert_array_equal(run.outputs, expected)


def test_sums_of_nibbles_that_do_not_fit_are_left_to_portable_code() -> None:
    """Sixteen times the sum is what has to fit; the tables are the same in either case."""
    few, many = dense(14, 2, 1 << 10, 4, extreme=True), dense(14, 2, 1 << 18, 4, extreme=True)
    for graph, expected in ((few, True), (many, False)):
        (op,) = graph.operators
        assert isinstance(op, FullyConnected)
        encoding = encode(op.weights.values, Layout.INT4, 2, where="fc")
        assert by_pairs(graph, op, encoding) is expected


@pytest.mark.parametrize("level", ["-O0", "-O1", "-Os", "-O3"])
def test_every_optimization_level_has_registers_enough(level: str, tmp_path: Path) -> None:
    for name in (
        *("two pixels", "two pixels of nibbles", "nibbles", "even blocks", "entries"),
        *("entries, seven pixels", "packed entries", "packed entries, six pixels"),
    ):
        graph, layout = CASES[name]
        build.put(generate(graph, layout=layout).files, tmp_path)
        target = ["-target", "thumb-freestanding-eabi", "-mcpu=cortex_m4", "-ffreestanding"]
        warnings = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-fno-sanitize=all"]
        build.compile_c(
            [*warnings, *target, level, "-c", "cactus_edge.c", "-o", "model.o"], tmp_path
        )


@pytest.mark.parametrize(
    ("options", "used"),
    [
        (["-target", "thumb-freestanding-eabi", "-mcpu=cortex_m4"], True),
        (["-target", "thumb-freestanding-eabi", "-mcpu=cortex_m4+strict_align"], False),
        (["-target", "arm-freestanding-eabi", "-mcpu=cortex_a7"], False),
    ],
)
def test_other_instruction_sets_and_aligned_loads_are_left_to_portable_code(
    options: list[str], used: bool, tmp_path: Path
) -> None:
    """A32 has the extension too, but not these immediates."""
    graph, layout = CASES["packed entries"]
    build.put(generate(graph, layout=layout).files, tmp_path)
    freestanding = ["-std=c99", "-ffreestanding", "-fno-sanitize=all", "-O2"]
    build.compile_c([*freestanding, *options, "-S", "cactus_edge.c", "-o", "model.s"], tmp_path)
    assert ("uxtab" in (tmp_path / "model.s").read_text(encoding="utf-8")) is used
