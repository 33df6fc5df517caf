"""DEPTHWISE_CONV_2D on every tier that this CPU has, and how its weights are packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llvmlite import ir

from cactus_edge import profiles
from cactus_edge.constraints import validate
from cactus_edge.errors import UnsupportedModelError
from cactus_edge.execute import execute_all
from cactus_edge.graph import (
    Activation,
    DepthwiseConv2D,
    Graph,
    Padding,
    Quantization,
    Requantization,
    Tensor,
    Weights,
    window_geometry,
)
from cactus_edge.kernels import steps
from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.formats.depthwise import as_matrix, pack_depthwise
from cactus_edge.kernels.program import build
from cactus_edge.kernels.simd import emit
from cactus_edge.kernels.simd.depthwise import interleaved
from cactus_edge.kernels.simd.tiers import Tier, available
from cactus_edge.kernels.threads import ParallelWorker
from cactus_edge.semantics import Rounding
from tests.kernels.cases import PROFILES, Case, assert_equal, filled, unit_factors

VECTOR = [tier for tier in available() if tier is not Tier.PLAIN]
SEEDS = st.integers(0, 2**32 - 1)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def layer(
    rng: np.random.Generator,
    *,
    extents: tuple[int, int] = (8, 7),
    channels: int = 16,
    multiplier: int = 1,
    window: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    padding: Padding = Padding.SAME,
    profile: str | None = None,
) -> Graph:
    """One resolved layer; every channel with a rounding of its own if ``profile`` is None."""
    outputs = channels * multiplier
    size = tuple(
        window_geometry(extents[a], window[a], stride[a], dilation[a], padding)[0] for a in (0, 1)
    )
    # About what brings the sums of random weights and inputs to the range of int8.
    scale = 2.0 ** rng.uniform(-8, -6, outputs) / np.sqrt(np.prod(window))
    source = Tensor(
        "x",
        (1, *extents, channels),
        quantization=Quantization.of(1.0, int(rng.integers(-128, 128))),
    )
    target = Tensor(
        "y", (1, *size, outputs), quantization=Quantization.of(1.0, int(rng.integers(-128, 100)))
    )
    op = DepthwiseConv2D(
        name="layer",
        inputs=(0,),
        output=1,
        weights=Weights(
            rng.integers(-128, 128, (1, *window, outputs)).astype(np.int8),
            8,
            scale.astype(np.float32).view(np.uint32),
        ),
        bias=rng.integers(-9000, 9000, outputs).astype(np.int32),
        stride=stride,
        dilation=dilation,
        padding=padding,
        activation=Activation.RELU if rng.random() < 0.3 else Activation.NONE,
    )
    graph = Graph((source, target), (op,), 0, 1)
    if profile is not None:
        return profiles.resolve(graph, profile)
    return replace(graph, operators=(replace(op, requantization=mixed(rng, outputs)),))


def mixed(rng: np.random.Generator, channels: int) -> Requantization:
    """Runs of channels with one of all roundings each."""
    given = [unit_factors(rounding, channels) for rounding in Rounding]
    chosen = np.repeat(rng.integers(0, len(given), channels), rng.integers(1, 9, channels))
    fields = [
        np.choose(chosen[:channels], [getattr(r, name) for r in given])
        for name in ("rounding", "multiplier", "shift")
    ]
    return Requantization(fields[0], fields[1], fields[2] - 12)


@settings(max_examples=75)
@given(
    SEEDS,
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(1, 70),
    st.sampled_from((1, 1, 1, 1, 2, 5)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    pairs,
    pairs,
    st.sampled_from(Padding),
    st.sampled_from((None, *PROFILES)),
    st.sampled_from((1, 1, 2, 9)),
    st.integers(1, 2),
)
def test_equals_the_reference(
    seed: int,
    extents: tuple[int, int],
    channels: int,
    multiplier: int,
    window: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: Padding,
    profile: str | None,
    count: int,
    threads: int,
) -> None:
    rng = np.random.default_rng(seed)
    if padding is Padding.VALID:
        reach = [(window[a] - 1) * dilation[a] + 1 for a in (0, 1)]
        extents = max(extents[0], reach[0]), max(extents[1], reach[1])
    fields = {"extents": extents, "channels": channels, "multiplier": multiplier}
    fields |= {"window": window, "stride": stride, "dilation": dilation, "padding": padding}
    try:
        graph = layer(rng, profile=profile, **fields)  # type: ignore
    except UnsupportedModelError:  # SAME windows that not every profile covers
        graph = layer(rng, **fields)  # type: ignore
    validate(graph)
    case = Case(graph, filled(graph, rng, count))
    expected = case.expected()
    for tier in available():
        assert_equal(case, tier, list(Layout)[seed % len(Layout)], threads, expected)


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 9), st.integers(1, 70), st.sampled_from((None, *PROFILES)))
@example(0, 9, 64, None)
def test_divided_among_threads(seed: int, rows: int, channels: int, profile: str | None) -> None:
    rng = np.random.default_rng(seed)
    graph = layer(rng, extents=(rows, 9), channels=channels, profile=profile)
    for tier in VECTOR:
        program = build(graph, [1], 1, Layout.DENSE, tier)
        batch = rng.integers(0, 256, (3, program.image_bytes), dtype=np.uint8)
        results = np.zeros((len(batch), program.result_bytes), np.uint8)
        worker = ParallelWorker(program, 2, grain=0)
        worker.run(batch, results)
        worker.close()
        expected = execute_all(graph, batch.view(np.int8).reshape(3, rows, 9, channels).astype(int))
        np.testing.assert_array_equal(results.view(np.int8), expected[1].reshape(3, -1))


@pytest.mark.parametrize(
    ("channels", "multiplier", "opcode"),
    [
        (33, 1, steps.DEPTHWISE_TILE),
        (1, 1, steps.DEPTHWISE_TILE),
        (1, 8, steps.TILED),
        (4, 3, steps.TILED),
        (5, 2, steps.DEPTHWISE),
    ],
)
def test_which_kernel(channels: int, multiplier: int, opcode: int) -> None:
    graph = layer(np.random.default_rng(0), channels=channels, multiplier=multiplier)
    for tier in VECTOR:
        assert build(graph, [1], 1, Layout.DENSE, tier).opcode(0) == opcode
    plain = build(graph, [1], 1, Layout.DENSE, Tier.PLAIN)
    assert plain.opcode(0) == steps.DEPTHWISE


@given(
    SEEDS,
    st.integers(1, 70),
    st.integers(1, 25),
    st.sampled_from((4, 8, 16, 32)),
    st.sampled_from((2, 4)),
)
def test_packed(seed: int, channels: int, taps: int, size: int, together: int) -> None:
    """Every channel is in a group, whole or filled up with zeros."""
    weights = np.random.default_rng(seed).integers(-128, 128, (channels, taps)).astype(np.int8)
    packed = pack_depthwise(weights, size, together)
    found = np.zeros((max(channels, size), packed.shape[1] * together), np.int64)
    for number, group in enumerate(packed):
        begin = max(min(number * size, channels - size), 0)
        found[begin : begin + size] = group.transpose(1, 0, 2).reshape(size, -1)
    np.testing.assert_array_equal(found[:channels, :taps], weights)
    assert not found[channels:].any()
    assert not found[:, taps:].any()


class Shuffles:
    """Stands for an emitter and its builder: vectors are arrays, and shuffles happen at once."""

    def __init__(self, tier: Tier) -> None:
        self.tier, self.builder, self.lanes = tier, self, emit.lanes_of(tier)
        self.bytes = SimpleNamespace(count=self.lanes * emit.products_of(tier))

    @staticmethod
    def vector(values: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(values=values, type=SimpleNamespace(count=values.size))

    def shuffle_vector(
        self, a: SimpleNamespace, b: SimpleNamespace, places: ir.Constant
    ) -> SimpleNamespace:
        order = [
            place.constant if hasattr(place, "constant") else place for place in places.constant
        ]
        return self.vector(np.concatenate([a.values, b.values])[order])


@pytest.mark.parametrize("tier", [tier for tier in Tier if tier is not Tier.PLAIN])
@pytest.mark.parametrize("shape", [emit.depthwise_wide, emit.depthwise_narrow])
def test_interleaved(tier: Tier, shape: Callable[[Tier], emit.Shape]) -> None:
    """Also for the tiers that this CPU lacks: register by register, lane by lane, tap by tap."""
    width, together = shape(tier).channels(tier), emit.products_of(tier)
    values = np.arange(width * together).reshape(together, width)
    shuffles = Shuffles(tier)
    found = interleaved(shuffles, [shuffles.vector(row) for row in values])  # type: ignore
    assert {vector.values.size for vector in found} == {shuffles.bytes.count}
    np.testing.assert_array_equal(
        np.concatenate([vector.values for vector in found]), values.T.reshape(-1)
    )


def test_as_matrix() -> None:
    weights = np.arange(1, 13, dtype=np.int8).reshape(2, 6)
    matrix = as_matrix(weights, 3)
    assert matrix.tolist() == [
        [1, 0, 0, 7, 0, 0],
        [2, 0, 0, 8, 0, 0],
        [0, 3, 0, 0, 9, 0],
        [0, 4, 0, 0, 10, 0],
        [0, 0, 5, 0, 0, 11],
        [0, 0, 6, 0, 0, 12],
    ]
