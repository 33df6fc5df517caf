"""Interval kernels: every bound on every tier equals the twin's, run by the reference executor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cactus_edge import profiles
from cactus_edge.certify.engine import cover
from cactus_edge.certify.intervals import IntervalSession
from cactus_edge.certify.twin import twin
from cactus_edge.errors import DataError, UnsupportedModelError, UsageError
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import (
    DType,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Quantization,
    Requantization,
    Reshape,
    Tensor,
    Weights,
)
from cactus_edge.kernels.intervals.walk import build_intervals
from cactus_edge.kernels.place import core_tensors
from cactus_edge.kernels.simd.tiers import Tier, available
from cactus_edge.kernels.steps import DENSE, PERMUTED, TILED
from cactus_edge.semantics import Rounding
from tests.graphs import enumerate_box, random_box, random_graph
from tests.kernels.cases import COUNTS, PROFILES, extreme_case, filled, random_case

Box = tuple[Int64Array, Int64Array]
SEEDS = st.integers(0, 2**32 - 1)
VECTOR = [tier for tier in available() if tier is not Tier.PLAIN]


def boxes(graph: Graph, rng: np.random.Generator, count: int) -> Box:
    """Ends [count, ...]: small boxes, single points, and boxes between any two points."""
    a, b = filled(graph, rng, count), filled(graph, rng, count)
    small = rng.random(count) < 0.5
    radius = int(rng.choice((0, 1, 9)))
    b[small] = a[small] + rng.integers(-radius, radius + 1, a[small].shape)
    b = np.clip(b, *graph.tensors[graph.core_input].dtype.range)
    return np.minimum(a, b), np.maximum(a, b)


def expected_bounds(graph: Graph, box: Box) -> dict[int, Box]:
    """Of every activation: the twin, run by the reference executor."""
    doubled = twin(graph)
    values = execute_all(doubled.graph, doubled.stack(*box))
    return {tensor: doubled.split(tensor, values[tensor]) for tensor in core_tensors(graph)}


def assert_bounds(
    graph: Graph,
    box: Box,
    expected: dict[int, Box],
    tensors: list[int] | None = None,
    threads: int = 1,
) -> None:
    """Every tier gives the expected bounds of the tensors, or of all."""
    tensors = core_tensors(graph) if tensors is None else tensors
    for tier in available():
        session = IntervalSession(graph, tensors=tensors, threads=threads, tier=tier.value)
        found = session.run(*box)
        assert list(found) == list(dict.fromkeys(tensors))
        for tensor in tensors:
            for end, a, b in zip(("lower", "upper"), found[tensor], expected[tensor], strict=True):
                message = f"tier {tier}, {end} bounds of '{graph.tensors[tensor].name}'"
                assert a.dtype == np.int64
                np.testing.assert_array_equal(a, b, message)


# ---------------------------------------------------------------------- equal to the twin
@settings(max_examples=25)
@given(SEEDS, st.sampled_from(COUNTS), st.sampled_from(PROFILES), st.integers(1, 3))
def test_random_graphs(seed: int, count: int, profile: str, threads: int) -> None:
    """Also where only some tensors are asked for: the channels of others may lie in any order."""
    graph, rng = random_case(seed, 1, profile).graph, np.random.default_rng(seed)
    box = boxes(graph, rng, count)
    try:
        expected = expected_bounds(graph, box)
    except UnsupportedModelError:  # a large RESHAPE, which only the twin cannot do
        assume(False)
        raise
    assert_bounds(graph, box, expected, threads=threads)
    assert_bounds(graph, box, expected, tensors=[graph.core_input, graph.logits])


@settings(max_examples=12)
@given(SEEDS, st.sampled_from((1, 2, 9)), st.sampled_from(Rounding))
def test_largest_accumulators(seed: int, count: int, rounding: Rounding) -> None:
    rng = np.random.default_rng(seed)
    case = extreme_case(rng, rounding, count)
    other = np.where(rng.random(case.inputs.shape) < 0.5, case.inputs, 0)
    box = np.minimum(case.inputs, other), np.maximum(case.inputs, other)
    assert_bounds(case.graph, box, expected_bounds(case.graph, box))


@settings(max_examples=12)
@given(SEEDS, st.sampled_from(COUNTS), st.sampled_from((DType.INT16, DType.INT32)), st.booleans())
def test_wide_logits(seed: int, count: int, dtype: DType, reshaped: bool) -> None:
    rng = np.random.default_rng(seed)
    graph = wide_graph(rng, dtype, reshaped)
    box = boxes(graph, rng, count)
    expected = expected_bounds(graph, box)
    assert_bounds(graph, box, expected)
    assert_bounds(graph, box, expected, tensors=[graph.logits])


def wide_graph(rng: np.random.Generator, dtype: DType, reshaped: bool) -> Graph:
    """Random layers, then one whose outputs are wider than a byte, and maybe a RESHAPE."""
    graph = profiles.resolve(random_graph(rng, classes=None))
    source = graph.tensors[graph.logits]
    tensors = [
        *graph.tensors,
        Tensor("flat", (1, source.size), source.dtype, source.quantization),
        Tensor("wide", (1, 6), dtype, Quantization.of(1.0, 0)),
        Tensor("pairs", (1, 3, 2), dtype, Quantization.of(1.0, 0)),
    ]
    first = len(graph.tensors)
    layer = FullyConnected(
        name="wide",
        inputs=(first,),
        output=first + 1,
        weights=Weights(rng.integers(-128, 128, (6, source.size)).astype(np.int8)),
        bias=rng.integers(-1000, 1000, 6).astype(np.int32),
        requantization=Requantization.uniform(Rounding.SINGLE, 1 << 30, 31, 6),
    )
    operators = [*graph.operators, Reshape(name="flat", inputs=(graph.logits,), output=first)]
    operators.append(layer)
    if reshaped:
        operators.append(Reshape(name="pairs", inputs=(first + 1,), output=first + 2))
    output = first + 2 if reshaped else first + 1
    return Graph(tuple(tensors[: output + 1]), tuple(operators), graph.input, output)


def test_models_on_which_all_profiles_agree_run_in_float32() -> None:
    rng = np.random.default_rng(5)
    graph = random_graph(rng, universal=True, bits=(8,), depth=4)
    coverage = cover(graph, None)
    (group,) = coverage.groups
    propagated = coverage.propagated(graph, group)
    layers = [op.requantization for op in propagated.core if isinstance(op, Linear)]
    assert {int(code) for r in layers if r for code in r.rounding} == {int(Rounding.FLOAT32)}
    box = boxes(graph, rng, 20)
    assert_bounds(propagated, box, expected_bounds(group.graph, box))


def test_other_models_keep_their_rounding() -> None:
    graph = random_graph(np.random.default_rng(6), depth=3)
    coverage = cover(graph, ["tflite-micro", "single-rounding"])
    assert len(coverage.groups) == 2
    assert all(coverage.propagated(graph, group) is group.graph for group in coverage.groups)


# ---------------------------------------------------------------------- what bounds mean
@settings(max_examples=30)
@given(SEEDS, st.sampled_from(PROFILES))
def test_bounds_of_a_layer_are_attained(seed: int, profile: str) -> None:
    """The least and the largest value of each output over every point of a box."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, shape=(1, 3), depth=0, classes=5)
    graph = profiles.resolve(graph, profile)
    lower, upper = random_box(rng, graph, 4)
    logits = execute(graph, enumerate_box(lower, upper))
    bounds = (logits.min(axis=0)[None], logits.max(axis=0)[None])
    assert_bounds(graph, (lower[None], upper[None]), {graph.logits: bounds}, [graph.logits])


@settings(max_examples=12)
@given(SEEDS, st.sampled_from(COUNTS), st.sampled_from(PROFILES))
def test_bounds_of_a_point_are_its_values(seed: int, count: int, profile: str) -> None:
    """Also where a RESHAPE splits the channels of a tensor that is too large for a twin."""
    case = random_case(seed, count, profile)
    values = {t: v.reshape(count, -1) for t, v in case.expected().items()}
    expected = {tensor: (value, value) for tensor, value in values.items()}
    assert_bounds(case.graph, (case.inputs, case.inputs), expected)


# ---------------------------------------------------------------------- forms
def layer(sparsity: float) -> Graph:
    """512 inputs, 16 channels, so many zeros."""
    rng = np.random.default_rng(7)
    graph = random_graph(rng, shape=(1, 512), depth=0, classes=16, bits=(8,), sparsity=sparsity)
    return profiles.resolve(graph)


def opcodes(graph: Graph, tier: Tier) -> set[int]:
    program = build_intervals(graph, [graph.logits], 1, tier)
    return set(program.steps["opcode"][1 : 1 + len(graph.core)].tolist())


@pytest.mark.parametrize("tier", VECTOR, ids=str)
@pytest.mark.parametrize(("sparsity", "opcode"), [(0.0, TILED), (0.3, TILED), (0.8, PERMUTED)])
def test_sparse_layers_use_the_sparse_form(tier: Tier, sparsity: float, opcode: int) -> None:
    assert opcodes(layer(sparsity), tier) == {opcode}


@pytest.mark.parametrize("tier", VECTOR, ids=str)
def test_zeros_that_spare_no_step_are_multiplied(tier: Tier) -> None:
    """One channel has all its weights, and the others of its group wait for it."""
    graph = layer(0.0)
    (op,) = graph.core
    assert isinstance(op, Linear)
    values = op.weights.values.copy()
    values[1:] = 0
    values[0] |= 1
    changed = replace(op, weights=replace(op.weights, values=values))
    assert opcodes(replace(graph, operators=(changed,)), tier) == {TILED}


def test_plain_loops_are_dense() -> None:
    assert opcodes(layer(0.8), Tier.PLAIN) == {DENSE}


# ---------------------------------------------------------------------- refusals
@pytest.fixture
def small() -> Graph:
    """A resolved graph of two inputs."""
    return profiles.resolve(random_graph(np.random.default_rng(3), shape=(1, 2), depth=1))


def test_graphs_and_settings_that_are_refused(small: Graph) -> None:
    unresolved = random_graph(np.random.default_rng(3), shape=(1, 2), depth=1)
    with pytest.raises(UsageError, match="resolve the graph under a profile"):
        IntervalSession(unresolved)
    with pytest.raises(UsageError, match="0 threads; give at least 1"):
        IntervalSession(small, threads=0)
    with pytest.raises(UsageError, match=r"tensors \[99\] are no integer activations"):
        IntervalSession(small, tensors=[99])
    with pytest.raises(UsageError, match="no tier 'fast'"):
        IntervalSession(small, tier="fast")


def test_boxes_that_are_refused(small: Graph) -> None:
    session = IntervalSession(small)
    zeros = np.zeros((3, 2), np.int64)
    with pytest.raises(DataError, match="differ in number"):
        session.run(zeros, zeros[:2])
    with pytest.raises(DataError, match="a box is empty"):
        session.run(zeros + 1, zeros)
    with pytest.raises(DataError, match="outside int8"):
        session.run(zeros, zeros + 128)
    with pytest.raises(DataError, match="stored integers"):
        session.run(zeros, zeros.astype(np.float32))
    with pytest.raises(DataError, match="shape"):
        session.run(zeros[:, :1], zeros[:, :1])


def test_ends_of_the_input_s_type_and_of_any_layout(small: Graph) -> None:
    rng = np.random.default_rng(0)
    lower, upper = boxes(small, rng, 40)
    session = IntervalSession(small)
    expected = session.run(lower, upper)[small.logits]
    stored = lower.astype(np.int8), np.asfortranarray(upper.astype(np.int8))
    assert not stored[1].flags.c_contiguous
    np.testing.assert_array_equal(session.run(*stored)[small.logits], expected)


def test_no_box_at_all(small: Graph) -> None:
    none = np.zeros((0, 2), np.int64)
    lower, upper = IntervalSession(small).run(none, none)[small.logits]
    assert lower.shape == upper.shape == (0, small.tensors[small.logits].size)


def test_sessions_are_independent_of_what_ran_before(small: Graph) -> None:
    """Borders and stale images of a larger batch leave no trace."""
    graph = replace(small)
    rng = np.random.default_rng(1)
    session = IntervalSession(graph, threads=2)
    large, few = boxes(graph, rng, 300), boxes(graph, rng, 3)
    expected = IntervalSession(graph).run(*few)[graph.logits]
    session.run(*large)
    np.testing.assert_array_equal(session.run(*few)[graph.logits], expected)
