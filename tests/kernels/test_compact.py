"""Channels that are left out: the same values, nothing left that could go, and what has to stay."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from unittest import TestCase

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cactus_edge
from cactus_edge import profiles
from cactus_edge.compact import compact
from cactus_edge.constraints import ACCUMULATOR_LIMIT, validate
from cactus_edge.execute import execute_all
from cactus_edge.graph import (
    AveragePool2D,
    DepthwiseConv2D,
    DType,
    Graph,
    Int64Array,
    Linear,
    MaxPool2D,
    Padding,
    Weights,
)
from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.simd.tiers import available
from cactus_edge.runtime import Session
from tests.graphs import CORE_OPERATORS, random_graph
from tests.kernels.cases import COUNTS, PROFILES, Case, assert_equal, filled
from tests.kernels.chain import ZERO, Chain

SEEDS = st.integers(0, 2**32 - 1)
WINDOWS = ("CONV_2D", "CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "AVERAGE_POOL_2D", "PAD")


# ---------------------------------------------------------------------- random graphs
def dead_case(seed: int, count: int, profile: str) -> Case:
    """A graph in which channels have no weights or are not read; everything follows from the seed.

    Many biases are such that a channel without weights is at its zero point or far from it.
    """
    rng = np.random.default_rng(seed)
    graph = random_graph(
        rng,
        operators=(CORE_OPERATORS, WINDOWS)[int(rng.integers(2))],
        depth=int(rng.integers(1, 7)),
        channels=int(rng.choice((3, 9, 40))),
        sparsity=float(rng.choice((0.0, 0.5, 0.9), p=(0.7, 0.2, 0.1))),
    )
    operators = tuple(
        _killed(graph, op, rng) if isinstance(op, Linear) else op for op in graph.operators
    )
    graph = profiles.resolve(replace(graph, operators=operators), profile)
    validate(graph)
    return Case(graph, filled(graph, rng, count))


def _killed(graph: Graph, op: Linear, rng: np.random.Generator) -> Linear:
    """``op`` without some of its output channels' and input channels' weights."""
    values, bias = op.weights.values.copy(), op.bias.copy()
    rows = rng.random(op.channels) < rng.choice((0.0, 0.4, 0.8, 1.0), p=(0.3, 0.3, 0.3, 0.1))
    bias[rows] *= rng.random(rows.sum()) < 0.5
    if isinstance(op, DepthwiseConv2D):
        values[..., rows] = 0
    else:
        values[rows] = 0
        channels = graph.tensors[op.inputs[0]].shape[-1]
        values.reshape(op.channels, -1, channels)[..., rng.random(channels) < rng.random()] = 0
    return replace(op, weights=replace(op.weights, values=values), bias=bias)


def asked(graph: Graph, rng: np.random.Generator) -> list[int]:
    """Often nothing but the logits, or some other activations as well."""
    hidden = [op.output for op in graph.core[:-1]]
    return [t for t in hidden if rng.random() < 0.3] if rng.random() < 0.3 else []


def compacted(graph: Graph, wanted: list[int]) -> Graph:
    """``compact``, which never has to give up on a valid graph."""
    with TestCase().assertNoLogs("cactus_edge.compact", "WARNING"):
        return compact(graph, wanted)


def channels(graph: Graph) -> list[int]:
    return [tensor.shape[-1] for tensor in graph.tensors]


def assert_same(graph: Graph, small: Graph, wanted: list[int], inputs: Int64Array) -> None:
    expected, found = execute_all(graph, inputs), execute_all(small, inputs)
    for tensor in (graph.core_input, graph.logits, *wanted):
        np.testing.assert_array_equal(found[tensor], expected[tensor])


@settings(max_examples=100)
@given(SEEDS, st.sampled_from(PROFILES))
def test_wanted_values_stay(seed: int, profile: str) -> None:
    case = dead_case(seed, 5, profile)
    wanted = asked(case.graph, np.random.default_rng(seed))
    small = compacted(case.graph, wanted)
    validate(small)
    assert_same(case.graph, small, wanted, case.inputs)
    for op, other in zip(case.graph.core, small.core, strict=True):
        assert (op.kind, op.name, op.inputs, op.output) == (
            *(other.kind, other.name, other.inputs, other.output),
        )
    assert all(b <= a for a, b in zip(channels(case.graph), channels(small), strict=True))
    assert compact(small, wanted) is small, "a second time finds nothing"


@settings(max_examples=40)
@given(SEEDS, st.sampled_from(COUNTS), st.sampled_from(PROFILES), st.sampled_from(Layout))
def test_sessions_equal_the_reference(seed: int, count: int, profile: str, layout: Layout) -> None:
    case = dead_case(seed, count, profile)
    wanted = [*asked(case.graph, np.random.default_rng(seed)), case.graph.logits]
    expected = case.expected()
    for tier in available():
        assert_equal(case, tier, layout, 1, expected, tensors=wanted)


def test_random_graphs_lose_channels() -> None:
    """The properties above are about something."""
    smaller = 0
    for seed in range(100):
        graph = dead_case(seed, 1, PROFILES[0]).graph
        smaller += compact(graph, ()) is not graph
    assert smaller > 50


# ---------------------------------------------------------------------- constructed graphs
def left(chain: Chain, wanted: list[int] | None = None) -> list[int]:
    """Channels of the tensors that are left, checked on random inputs."""
    graph, wanted = chain.graph(), wanted or []
    validate(graph)
    small = compacted(graph, wanted)
    assert_same(graph, small, wanted, filled(graph, np.random.default_rng(1), 9))
    assert compact(small, wanted) is small
    return channels(small)


def image() -> Chain:
    return Chain((1, 6, 5, 3))


def test_unread_channels_go() -> None:
    chain = image().linear(8, kernel=3, padding=Padding.SAME)
    chain.linear(4, kernel=3, unread=(0, 3, 4), padding=Padding.SAME).linear(5, unread=(1, 2))
    assert left(chain) == [3, 5, 2, 5]


@pytest.mark.parametrize("between", ["flatten", "max", "average", "pad", "depthwise", "all"])
def test_unread_channels_go_through(between: str) -> None:
    chain = image().linear(6, kernel=3)
    if between in ("max", "all"):
        chain.pool(MaxPool2D)
    if between in ("average", "all"):
        chain.pool(AveragePool2D)
    if between in ("pad", "all"):
        chain.pad()
    if between in ("depthwise", "all"):
        chain.depthwise()
    unread: tuple[int, ...] = (1, 5)
    if between in ("flatten", "all"):
        size = chain.tensors[chain.here].size
        chain.reshape(size)
        unread = tuple(e for e in range(size) if e % 6 in unread)
    hidden = [tensor.shape[-1] for tensor in chain.tensors[1:]]
    assert left(chain.linear(4, unread=unread)) == [3, *(h * 4 // 6 for h in hidden), 4]


def test_flattened_features_go_with_all_of_their_channel() -> None:
    chain = image().linear(6, kernel=3).reshape(4 * 3 * 6).linear(4, unread=(1, 7, 13))
    assert left(chain) == [3, 6, 72, 4]


@pytest.mark.parametrize(
    ("unread", "expected"), [((1, 4, 7), [3, 4, 6, 2]), ((1, 4), [3, 6, 9, 2])]
)
def test_reshaped_channels_go_in_classes(unread: tuple[int, ...], expected: list[int]) -> None:
    """Six channels become nine: every third element can go from both."""
    chain = image().linear(6, kernel=3).reshape(4, 2, 9).linear(2, unread=unread)
    assert left(chain) == expected


@pytest.mark.parametrize(("other", "expected"), [(20, [3, 4, 2, 3, 2]), (21, [3, 6, 3, 3, 2])])
def test_constants_become_a_channel_if_they_are_equal(other: int, expected: list[int]) -> None:
    """Six features become two pixels: the first of each is a constant."""
    chain = Chain((1, 3)).linear(6, dead=(0, 3), bias=20)
    op = chain.operators[-1]
    assert isinstance(op, Linear)
    bias = op.bias.copy()
    bias[3] = other << 8
    chain.operators[-1] = replace(op, bias=bias)
    assert left(chain.reshape(1, 2, 3).linear(3, kernel=1).linear(2)) == expected


def test_a_channel_with_two_readers_is_read_by_either() -> None:
    chain = image().linear(6, kernel=3)
    chain.linear(4, kernel=1, unread=(0, 1, 2)).linear(4, kernel=1, unread=(2, 3, 1), source=1)
    assert left(chain.add(2, 3).linear(2)) == [3, 4, 4, 4, 4, 2]


def test_what_is_wanted_stays() -> None:
    chain = image().linear(6, kernel=3).linear(4, kernel=1, unread=(0, 1)).linear(3, unread=(2,))
    assert left(chain) == [3, 4, 3, 3]
    assert left(chain, [1]) == [3, 6, 3, 3]
    assert left(chain, [2]) == [3, 4, 4, 3]


def test_operands_and_sum_go_together() -> None:
    chain = image().linear(6, kernel=3).linear(6, kernel=1, unread=(0,)).add(1, 2)
    assert left(chain.linear(2, unread=(0, 1))) == [3, 5, 5, 5, 2]


def test_a_sum_of_constants_is_one() -> None:
    chain = image().linear(6, kernel=3, dead=(3, 4), bias=10)
    chain.linear(6, kernel=1, dead=(4, 5), bias=-3).add(1, 2).linear(2)
    assert left(chain) == [3, 5, 5, 5, 2]


@pytest.mark.parametrize("padding", Padding)
def test_constants_at_the_zero_point_go(padding: Padding) -> None:
    chain = image().linear(6, kernel=3, dead=(0, 4))
    chain.pool(MaxPool2D).pad().linear(3, kernel=3, padding=padding).linear(2)
    assert left(chain) == [3, 4, 4, 4, 3, 2]


def test_other_constants_go_where_each_position_sees_them() -> None:
    chain = image().linear(6, kernel=3, dead=(0, 4), bias=20)
    chain.pool(AveragePool2D).linear(3, kernel=2).linear(4, dead=(1,), bias=-9).linear(2)
    assert left(chain) == [3, 4, 4, 3, 3, 2]


@pytest.mark.parametrize("bias", [20, -20])
def test_other_constants_stay_under_padding(bias: int) -> None:
    """Padding is at the zero point; so is what PAD puts around."""
    first = {"kernel": 3, "dead": (0, 4), "bias": bias}
    chain = image().linear(6, **first).linear(3, kernel=3, padding=Padding.SAME)  # type: ignore
    assert left(chain.linear(2)) == [3, 6, 3, 2]
    chain = image().linear(6, **first).pad().linear(3, kernel=3)  # type: ignore
    assert left(chain.linear(2)) == [3, 6, 6, 3, 2]
    # Where the geometry pads by nothing, SAME is VALID.
    chain = image().linear(6, **first).linear(3, kernel=1, padding=Padding.SAME)  # type: ignore
    assert left(chain.linear(2)) == [3, 4, 3, 2]


def test_depthwise_convolutions() -> None:
    """SAME: a constant input has to be at the zero point; then the output is constant as well."""
    chain = image().linear(6, kernel=3, dead=(0, 4)).depthwise(dead=(1,), bias=12).linear(2)
    assert left(chain) == [3, 3, 3, 2]
    chain = image().linear(6, kernel=3, dead=(0, 4), bias=20).depthwise().linear(2)
    assert left(chain) == [3, 6, 6, 2]


def test_depthwise_convolutions_of_more_channels() -> None:
    chain = Chain((1, 6, 5, 1)).depthwise(multiplier=4).linear(2, unread=(0, 2))
    assert left(chain) == [1, 2, 2]
    chain = image().linear(6, kernel=3).depthwise(multiplier=2).linear(2, unread=(0, 1, 2, 3))
    assert left(chain) == [3, 6, 12, 2], "which inputs go with which outputs is not tried"


def test_removal_cascades_backwards() -> None:
    chain = image().linear(6, kernel=3, padding=Padding.SAME)
    for _ in range(3):
        chain.linear(6, kernel=3, padding=Padding.SAME, split=True)
    assert left(chain.linear(2, unread=(3, 4, 5))) == [3, 3, 3, 3, 3, 2]


def test_removal_cascades_forwards() -> None:
    chain = image().linear(6, kernel=1, dead=(3, 4, 5), bias=11)
    for _ in range(3):
        chain.linear(6, kernel=2, split=True)
    assert left(chain.linear(2)) == [3, 3, 3, 3, 3, 2]


def test_everything_is_zero() -> None:
    every = tuple(range(6))
    chain = image().linear(6, kernel=3, dead=every, bias=30).depthwise(dead=every, bias=5)
    chain.pool(MaxPool2D).reshape(2 * 2 * 6).linear(6, dead=every, bias=-3).linear(4)
    assert left(chain) == [3, 1, 1, 1, 4, 1, 4]
    assert left(image().linear(4, dead=(0, 1, 2, 3))) == [3, 4]


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_and_factors_are_cut_too(bits: int) -> None:
    graph = image().linear(6, kernel=3, bits=bits).linear(4, unread=(0, 5)).graph()
    before, after = graph.core[0], compact(graph, ()).core[0]
    assert isinstance(before, Linear) and isinstance(after, Linear)
    assert before.requantization is not None and after.requantization is not None
    assert after.weights.bits == bits
    np.testing.assert_array_equal(after.weights.values, before.weights.values[1:5])
    np.testing.assert_array_equal(after.weights.scale_bits, before.weights.scale_bits[1:5])
    np.testing.assert_array_equal(after.bias, before.bias[1:5])
    for name in ("rounding", "multiplier", "shift"):
        given, cut = (getattr(op.requantization, name) for op in (before, after))
        np.testing.assert_array_equal(cut, given[1:5])


def test_largest_biases() -> None:
    """Folded, thousands of constants come as near to the limit as the layer was allowed to."""
    size = (ACCUMULATOR_LIMIT - 1) // (127 * (127 - ZERO))
    chain = Chain((1, 3)).linear(size, dead=tuple(range(size)), bias=1000)
    op = chain.linear(2, bits=4).operators[-1]
    assert isinstance(op, Linear)
    weights = Weights(np.full(op.weights.values.shape, 127) * [[1], [-1]])
    chain.operators[-1] = replace(op, weights=weights, bias=np.zeros(2))
    assert left(chain) == [3, 1, 2]
    folded = compact(chain.graph(), ()).core[1]
    assert isinstance(folded, Linear)
    assert ACCUMULATOR_LIMIT - int(np.abs(folded.bias).min()) < 2 * 127 * 134


def test_a_graph_that_would_break_a_constraint_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chain = image().linear(6, kernel=3).linear(4, unread=(0, 5))
    op = chain.operators[-1]
    assert isinstance(op, Linear)
    chain.operators[-1] = replace(op, bias=np.full(4, ACCUMULATOR_LIMIT))
    graph = chain.graph()
    assert compact(graph, ()) is graph
    assert "no channels are left out" in caplog.text


# ---------------------------------------------------------------------- sessions
def half_dead() -> Chain:
    chain = image().linear(32, kernel=3, dead=tuple(range(0, 32, 2)))
    chain.linear(32, kernel=1).linear(32, unread=tuple(range(16)))
    return chain.linear(4)


def test_sessions_explain_the_shipped_layers() -> None:
    graph = half_dead().graph()
    small, large = Session(graph), Session(graph, whole=True)
    for batch in (False, True):
        pairs = list(zip(small.explain(batch=batch), large.explain(batch=batch), strict=True))
        assert [a.name for a, _ in pairs] == ["op0", "op1", "op2", "op3"]
        for a, b in pairs:
            assert (a.name, a.kind, a.multiplications, a.sparsity) == (
                *(b.name, b.kind, b.multiplications, b.sparsity),
            )
            assert a.packed_bytes <= b.packed_bytes
    assert small.program.tables.weights.size < large.program.tables.weights.size
    x = filled(graph, np.random.default_rng(0), 80)
    np.testing.assert_array_equal(small.run(x), large.run(x))


def test_wide_logits() -> None:
    """They are computed from the last bytes, all of which stay."""
    chain = half_dead()
    chain.tensors[-1] = replace(chain.tensors[-1], dtype=DType.INT32)
    graph = chain.graph()
    x = filled(graph, np.random.default_rng(0), 9)
    expected = execute_all(graph, x)
    for count in (1, 9):
        session = Session(graph, tensors=(3, graph.logits))
        for tensor, values in session.run_tensors(x[:count]).items():
            np.testing.assert_array_equal(values, expected[tensor][:count])


def test_the_certifier_reads_what_is_shipped() -> None:
    folder = Path(cactus_edge.__file__).parent / "certify"
    calls = [
        node
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "Session"
    ]
    assert calls
    for call in calls:
        assert any(keyword.arg == "whole" for keyword in call.keywords), ast.unparse(call)
