"""Compiled kernels against the reference: every rounding, layout, operator and extreme."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
from graphs import graphs, random_graph, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher

from cactus_edge import kernels, profiles, semantics
from cactus_edge.certify.twin import twin
from cactus_edge.constraints import ACCUMULATOR_LIMIT, validate
from cactus_edge.errors import UnsupportedModelError
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import (
    Add,
    Conv2D,
    DType,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    MaxPool2D,
    Pad,
    Padding,
    Quantization,
    Requantization,
    Reshape,
    Tensor,
    Weights,
)
from cactus_edge.kernels import jit, steps
from cactus_edge.kernels.pack import Layout, fastest, pack_nibbles
from cactus_edge.kernels.place import core_tensors
from cactus_edge.profiles import Method
from cactus_edge.runtime import Session
from cactus_edge.scales import ScaleArithmetic
from cactus_edge.semantics import AddRounding, Rounding
from cactus_edge.universal import step_points

LAYOUTS = ("dense", "sparse", "auto")
METHODS = {rounding: Method(rounding) for rounding in Rounding}
METHODS[Rounding.FLOAT32] = Method(Rounding.FLOAT32, ScaleArithmetic.FLOAT32)
COUNTS = (1, 2, 7, 70)
"""One image, fewer rows than a tile, an odd rest, and more than one block."""


def assert_equal_to_reference(graph: Graph, x: Int64Array, layouts: tuple[str, ...] = LAYOUTS):
    """Every activation equals ``execute``, under each layout."""
    expected = execute_all(graph, x)
    known = core_tensors(graph)
    for layout in layouts:
        values = Session(graph, tensors=known, layout=layout).run_tensors(x)
        for tensor in known:
            name = graph.tensors[tensor].name
            np.testing.assert_array_equal(values[tensor], expected[tensor], f"{layout} '{name}'")


def fully_connected(
    weights: np.ndarray,
    requantization: Requantization,
    *,
    bias: np.ndarray | None = None,
    bits: int = 8,
    zero_point: int = 0,
) -> Graph:
    """One layer, built by hand."""
    outputs, depth = weights.shape
    tensors = (
        Tensor("x", (1, depth), quantization=Quantization.of(1.0, zero_point)),
        Tensor("y", (1, outputs)),
    )
    op = FullyConnected(
        name="layer",
        inputs=(0,),
        output=1,
        weights=Weights(weights, bits),
        bias=np.zeros(outputs, np.int32) if bias is None else bias,
        requantization=requantization,
    )
    return Graph(tensors, (op,), 0, 1)


# ---------------------------------------------------------------------- requantization
def _factors(rounding: Rounding, rng: np.random.Generator, count: int) -> Requantization:
    """Random factors over the whole permitted range, its ends included."""
    least, most, low, high = {
        Rounding.DOUBLE_HALF_AWAY: (1 << 30, 1 << 31, 0, 31),
        Rounding.DOUBLE_HALF_UP: (1 << 30, 1 << 31, 0, 31),
        Rounding.SINGLE: (1 << 30, 1 << 31, 31, 62),
        Rounding.FLOAT32: (1 << 23, 1 << 24, 24, 54),
        Rounding.FLOAT64: (1 << 52, 1 << 53, 53, 84),
    }[rounding]
    multiplier = rng.integers(least, most, count)
    multiplier[:4] = least, most - 1, least, most - 1
    shift = rng.integers(low, high + 1, count)
    shift[:4] = low, low, high, high
    return Requantization(np.int64(rounding), multiplier, shift)


@pytest.mark.parametrize("rounding", Rounding)
def test_requantization_is_that_of_semantics(rounding: Rounding) -> None:
    """Both sides of every step of 64 factors, random accumulators, and the ends of the range."""
    rng = np.random.default_rng(int(rounding))
    factors = _factors(rounding, rng, 64)
    limit = np.full(64, ACCUMULATOR_LIMIT - 1)
    points = [step_points(factors, -limit, limit, 3, (-128, 127))]
    points += [rng.integers(-(1 << bits), 1 << bits, (20, 64)) for bits in (4, 12, 20, 26)]
    points += [np.arange(-3, 4)[:, None] * np.ones(64, np.int64), np.stack([limit, -limit])]
    accumulators = np.concatenate(points).reshape(-1)
    rows = accumulators.size // 64
    spread = Requantization(
        factors.rounding[0], np.tile(factors.multiplier, rows), np.tile(factors.shift, rows)
    )
    expected = semantics.REQUANTIZE[rounding](accumulators, spread.multiplier, spread.shift)
    weights = np.zeros((accumulators.size, 1), np.int8)
    graph = fully_connected(weights, spread, bias=accumulators)
    for layout in ("dense", "sparse"):
        session = Session(graph, layout=layout)
        for count in (1, 9):
            logits = session.run(np.zeros((count, 1), np.int8))
            np.testing.assert_array_equal(logits[-1], np.clip(expected, -128, 127))


@pytest.mark.parametrize("rounding", [r for r in AddRounding if r is not AddRounding.INT16])
def test_add_is_that_of_semantics(rounding: AddRounding) -> None:
    """All 65,536 pairs of bytes: two layers copy the operands out of one input."""
    scales = [Quantization.of(s, z) for s, z in ((0.031, -7), (0.0117, 12), (0.04, 3))]
    names = ("a", "b", "sum")
    tensors = [Tensor("x", (1, 1, 1, 2))]
    tensors += [Tensor(n, (1, 1, 1, 1), quantization=q) for n, q in zip(names, scales, strict=True)]
    copies = [_copy_of_channel(i, scales[i].zero_point) for i in range(2)]
    total = Add(name="sum", inputs=(1, 2), output=3)
    graph = Graph(tuple(tensors), (*copies, total), 0, 3)
    integers = profiles.add_requantization(graph, total, rounding)
    resolved = replace(graph, operators=(*copies, replace(total, requantization=integers)))

    pairs = np.stack(np.meshgrid(np.arange(-128, 128), np.arange(-128, 128)), -1)
    values = Session(resolved, tensors=(1, 2, 3)).run_tensors(pairs.reshape(-1, 1, 1, 2))
    a, b, got = (values[i].reshape(256, 256) for i in (1, 2, 3))
    np.testing.assert_array_equal(np.stack([a, b], -1), pairs)
    expected = semantics.ADD[rounding](pairs[..., 0] + 7, pairs[..., 1] - 12, *integers.integers)
    np.testing.assert_array_equal(got, np.clip(expected + 3, -128, 127))


def _copy_of_channel(channel: int, zero_point: int) -> Conv2D:
    weights = np.zeros((1, 1, 1, 2), np.int8)
    weights[..., channel] = 1
    return Conv2D(
        name=f"copy_{channel}",
        inputs=(0,),
        output=channel + 1,
        weights=Weights(weights),
        bias=np.array([-zero_point]),
        # A factor just below 1 rounds every small integer to itself.
        requantization=Requantization.uniform(Rounding.SINGLE, (1 << 31) - 1, 31, 1),
    )


# ---------------------------------------------------------------------- random graphs
@settings(max_examples=40)
@given(graphs(), st.sampled_from(sorted(profiles.PROFILES)), st.sampled_from(COUNTS), st.randoms())
def test_random_graphs(graph: Graph, profile: str, count: int, random: object) -> None:
    rng = np.random.default_rng(random.randint(0, 1 << 31))  # type: ignore[attr-defined]
    assert_equal_to_reference(profiles.resolve(graph, profile), random_inputs(rng, graph, count))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("input_type", [DType.INT8, DType.UINT8])
def test_sparse_graphs(sparsity: float, input_type: DType) -> None:
    """Dropped zeros, dead channels, inputs that nothing reads, layers without any weight."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, sparsity=sparsity, input_type=input_type, channels=20)
        assert_equal_to_reference(profiles.resolve(graph), random_inputs(rng, graph, 11))


def _mixed(graph: Graph, rng: np.random.Generator) -> Graph:
    """Each channel of each linear layer under a rounding of its own, drawn from all five."""

    def drawn(op: Linear) -> Requantization:
        codes = rng.integers(0, len(Rounding), op.channels)
        multiplier, shift = np.zeros((2, op.channels), np.int64)
        for rounding in Rounding:
            pairs = np.array(profiles.factor(graph, op, METHODS[rounding]), np.int64)
            pairs = np.broadcast_to(pairs, (op.channels, 2))
            chosen = codes == int(rounding)
            multiplier[chosen], shift[chosen] = pairs[chosen].T
        return Requantization(codes, multiplier, shift)

    operators = tuple(
        replace(op, requantization=drawn(op)) if isinstance(op, Linear) else op
        for op in graph.operators
    )
    return profiles.resolve(replace(graph, operators=operators))


@settings(max_examples=25)
@given(graphs(), st.integers(0, 1 << 31), st.sampled_from(COUNTS))
def test_every_channel_may_round_differently(graph: Graph, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    assert_equal_to_reference(_mixed(graph, rng), random_inputs(rng, graph, count))


@settings(max_examples=25)
@given(graphs(), st.integers(0, 1 << 31), st.sampled_from(COUNTS))
def test_twins(graph: Graph, seed: int, count: int) -> None:
    """The graphs that certification runs: doubled channels, half of the weights zero."""
    rng = np.random.default_rng(seed)
    try:
        doubled = twin(_mixed(graph, rng)).graph
    except UnsupportedModelError:
        return
    assert_equal_to_reference(doubled, random_inputs(rng, doubled, count))


@settings(max_examples=25)
@given(graphs(), st.integers(0, 1 << 31))
def test_uint8_activations(graph: Graph, seed: int) -> None:
    """The same graphs with every activation stored as uint8."""

    def shifted(tensor: Tensor) -> Tensor:
        quantization = tensor.quantization
        assert quantization is not None
        moved = Quantization(quantization.scale_bits, quantization.zero_point + 128)
        return replace(tensor, dtype=DType.UINT8, quantization=moved)

    unsigned = replace(graph, tensors=tuple(shifted(tensor) for tensor in graph.tensors))
    rng = np.random.default_rng(seed)
    assert_equal_to_reference(profiles.resolve(unsigned), random_inputs(rng, unsigned, 5))


# ---------------------------------------------------------------------- extremes
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("sign", [-128, 127])
def test_largest_accumulators(sign: int, count: int) -> None:
    """4096 products of the largest weight and input come within 1 % of the proved limit."""
    weights = np.full((3, 4096), sign, np.int8)
    weights[1] = -127 if sign > 0 else 127
    factors = Requantization.uniform(Rounding.FLOAT32, (1 << 23) + 1, 43, 3)
    graph = fully_connected(weights, factors, zero_point=127)
    validate(graph)
    x = np.full((count, 4096), -128)
    sums = (x[0] - 127) @ weights.T.astype(np.int64)
    assert abs(sums).max() > (0.99 if sign < 0 else 0.98) * ACCUMULATOR_LIMIT
    assert_equal_to_reference(graph, x)


@pytest.mark.parametrize("bits", [8, 4])
def test_more_inputs_than_an_index_can_name(bits: int) -> None:
    """Sparse indices have 16 bits; 140,000 inputs take three segments."""
    rng = np.random.default_rng(0)
    weights = np.zeros((5, 140_000), np.int8)
    position = np.arange(140_000)  # an input that no channel reads would be dropped
    weights[position % 4, position] = rng.integers(1, 8, 140_000) * (-1) ** (position // 4 % 2)
    weights[:3, [0, 65_535, 65_536, 139_999]] = -8
    graph = fully_connected(
        weights, Requantization.uniform(Rounding.SINGLE, 1 << 30, 40, 5), bits=bits, zero_point=5
    )
    for count in (1, 9):
        assert_equal_to_reference(graph, rng.integers(-128, 128, (count, 140_000)))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 63, 64, 65, 200])
def test_packed_fully_connected(bits: int, depth: int) -> None:
    rng = np.random.default_rng(depth)
    limit = 1 << (bits - 1)
    weights = rng.integers(-limit, limit, (7, depth))
    weights[2] = 0
    factors = Requantization.uniform(Rounding.DOUBLE_HALF_UP, 1 << 30, 5, 7)
    graph = fully_connected(weights, factors, bits=bits, zero_point=-128)
    for count in (1, 10):
        assert_equal_to_reference(graph, rng.integers(-128, 128, (count, depth)))


def test_padding_is_the_zero_point_for_each_consumer() -> None:
    """Convolutions of different reach and whatever else reads tensors that have a border."""
    rng = np.random.default_rng(3)
    quantization = Quantization.of(0.05, 17)
    shape = (1, 6, 5, 4)
    tensors = tuple(Tensor(name, shape, quantization=quantization) for name in "abcde")
    factors = Requantization.uniform(Rounding.SINGLE, 1 << 30, 40, 4)

    def conv(name: str, source: int, target: int, size: int, dilation: int) -> Conv2D:
        return Conv2D(
            name=name,
            inputs=(source,),
            output=target,
            weights=Weights(rng.integers(-127, 128, (4, size, size, 4))),
            bias=rng.integers(-500, 500, 4),
            padding=Padding.SAME,
            dilation=(dilation, dilation),
            requantization=factors,
        )

    flat = FullyConnected(
        name="flat",
        inputs=(0,),
        output=5,
        weights=Weights(rng.integers(-127, 128, (4, 120))),
        bias=rng.integers(-500, 500, 4),
        requantization=factors,
    )
    ops = (
        conv("far", 0, 1, 3, 3),
        conv("wide", 0, 2, 5, 1),
        Add(name="sum", inputs=(1, 2), output=3),
        conv("again", 3, 4, 3, 1),
        flat,
        Reshape(name="other_rows", inputs=(0,), output=6),
        conv("on_reshaped", 6, 7, 3, 1),
        MaxPool2D(name="pool", inputs=(3,), output=8, window=(3, 2), stride=(1, 2)),
        Pad(name="pad", inputs=(8,), output=9, paddings=((0, 0), (1, 0), (0, 2), (0, 0))),
    )
    tensors += (
        Tensor("flat", (1, 4), quantization=quantization),
        Tensor("other_rows", (1, 5, 6, 4), quantization=quantization),
        Tensor("on_reshaped", (1, 5, 6, 4), quantization=quantization),
        Tensor("pool", (1, 4, 2, 4), quantization=quantization),
        Tensor("pad", (1, 5, 4, 4), quantization=quantization),
    )
    graph = profiles.resolve(Graph(tensors, ops, 0, 4))
    session = Session(graph)
    for count in (1, 3, 1):  # a second run finds the borders as the first one left them
        x = rng.integers(-128, 128, (count, *shape[1:]))
        np.testing.assert_array_equal(session.run(x), execute(graph, x))
    assert_equal_to_reference(graph, rng.integers(-128, 128, (3, *shape[1:])))


# ---------------------------------------------------------------------- packing and compilation
def test_packed_nibbles_are_half_a_byte() -> None:
    values = np.arange(-8, 8, dtype=np.int8)
    packed = pack_nibbles(values)
    assert packed.shape == (8,)
    np.testing.assert_array_equal(np.left_shift(packed, 4) >> 4, values[:8])
    np.testing.assert_array_equal(packed >> 4, values[8:])


def test_layouts_drop_zeros_and_dead_channels() -> None:
    weights = np.ones((8, 128), np.int8)
    weights[2:] = 0
    factors = Requantization.uniform(Rounding.SINGLE, 1 << 30, 40, 8)
    graph = fully_connected(weights, factors)
    dense = Session(graph, layout="dense", tier="plain").program
    sparse = Session(graph, layout="sparse", tier="plain").program
    slack = 256  # registers are loaded whole, behind the last weight too
    assert dense.tables.weights.size == 2 * 128 + slack
    assert sparse.tables.indices.size == 2 * 128
    assert [int(step["opcode"]) for step in dense.steps] == [steps.LOAD, steps.DENSE, steps.STORE]
    assert int(sparse.steps[1]["opcode"]) == steps.SPARSE


def test_auto_layout_follows_sparsity_and_rows() -> None:
    dense = np.ones((16, 640), np.int8)
    sparse = dense * (np.arange(640) % 4 == 0)
    assert fastest(dense, 1) is fastest(dense, 1000) is Layout.DENSE
    assert fastest(sparse, 1) is Layout.DENSE, "one row is quicker dense than at 75 % zeros"
    assert fastest(sparse, 1000) is Layout.SPARSE


def test_cache_key_holds_the_digest_of_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba would not notice an edit of ``semantics``: the digest, captured, has to do it."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def compiled(digest: int):
        def function(x: int) -> int:
            return digest + x

        return jit.entry(function)

    hits: list[int] = []
    for digest in (1, 1, 2):
        function = compiled(digest)
        assert function(10) == digest + 10
        hits.append(sum(function.stats.cache_hits.values()))  # type: ignore[attr-defined]
    assert hits == [0, 1, 0]


def test_compiled_functions_differ_in_their_names() -> None:
    """The linker knows functions of two cached entries by nothing else, see ``jit.kernel``."""
    named: dict[tuple[str, str], object] = {}
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Dispatcher):
                function = value.py_func
                name = function.__module__, function.__qualname__
                assert named.setdefault(name, value) is value, name
    loops = [qualname for _, qualname in named if "<locals>.loop" in qualname]
    assert len(loops) == 8 and len(named) > 60


def test_digest_covers_kernels_and_semantics() -> None:
    assert jit.source_digest(semantics) != jit.source_digest()
    assert jit.source_digest(semantics) == jit.source_digest(semantics)


def test_without_a_cache_folder_kernels_compile_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Numba refuses to cache a function that has no file, as it does where it cannot write."""
    function = jit.entry(eval("lambda x: x + 1"))
    assert function(2) == 3
    assert "not cached" in caplog.text
