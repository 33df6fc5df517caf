"""The proof of agreement against brute force over every reachable accumulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cactus_edge import profiles, universal
from cactus_edge.certify.engine import cover
from cactus_edge.constraints import accumulator_bounds, stored_range
from cactus_edge.errors import InvalidGraphError
from cactus_edge.execute import execute, requantize
from cactus_edge.graph import (
    Add,
    Conv2D,
    Graph,
    Linear,
    Padding,
    Quantization,
    Requantization,
    Tensor,
    Weights,
)
from cactus_edge.semantics import AddRounding, Rounding
from tests.graphs import random_graph

COLUMNS = ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"]


def brute_force(graph, op: Linear) -> tuple[int, ...]:  # noqa: ANN001
    """Channels on which two profiles differ: for some accumulator between the bounds, or for some
    input where it is the only one."""
    lower, upper = accumulator_bounds(graph, op)
    source = graph.tensors[op.inputs[0]].zero_point
    least, most = stored_range(graph, op.inputs[0])
    levels = np.arange(least, most + 1)
    one_input = op.weights.values.size == op.channels
    zero_point, limits = graph.tensors[op.output].zero_point, graph.output_range(op)
    bad: list[int] = []
    every = [profiles.requantization(graph, op, p) for p in profiles.PROFILES.values()]
    for channel in range(op.channels):
        points = np.arange(lower[channel], upper[channel] + 1)[:, None]
        if one_input:
            weight = int(op.weights.values.ravel()[channel])
            points = ((levels - source) * weight + op.bias[channel])[:, None]
        outputs = {
            requantize(
                points,
                Requantization(
                    r.rounding[channel : channel + 1],
                    r.multiplier[channel : channel + 1],
                    r.shift[channel : channel + 1],
                ),
                zero_point,
                limits,
            ).tobytes()
            for r in every
        }
        if len(outputs) > 1:
            bad.append(channel)
    return tuple(bad)


@pytest.mark.parametrize("is_universal", [True, False])
@pytest.mark.parametrize("kind", COLUMNS)
def test_proof_equals_brute_force(kind: str, is_universal: bool) -> None:
    agreeing = disagreeing = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        graph = random_graph(
            rng,
            operators=[kind],
            depth=1,
            classes=None,
            channels=10,
            universal=is_universal,
            shape=(1, 3, 3, 3),
            bits=(4,),
        )
        for op in graph.core:
            if isinstance(op, Linear):
                proved = universal.disagreeing_channels(graph, op)
                assert proved == brute_force(graph, op)
                disagreeing += len(proved)
                agreeing += op.channels - len(proved)
    assert agreeing if is_universal else disagreeing


def test_universal_graphs_have_one_output() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, universal=True, depth=4)
        assert universal.is_universal(graph)
        batch = rng.integers(-128, 128, (40, *graph.tensors[graph.input].shape[1:]))
        assert len({execute(graph, batch, name).tobytes() for name in profiles.PROFILES}) == 1


def test_an_add_is_compared_on_all_pairs() -> None:
    found = {True: 0, False: 0}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, operators=["ADD"], depth=2, classes=None)
        entries = {entry.name: entry for entry in universal.agreement(graph)}
        for op in graph.core:
            if isinstance(op, Add):
                found[not entries[op.name].disagreeing] += 1
    assert found[False], "every ADD agrees: the comparison shows nothing"


def test_explicit_integers_always_agree() -> None:
    graph = random_graph(np.random.default_rng(1), depth=3)
    assert universal.is_universal(profiles.resolve(graph))
    linear = next(op for op in graph.core if isinstance(op, Linear))
    explicit = profiles.requantization(graph, linear, profiles.PROFILES["litert-arm"])
    with_one = replace(linear, requantization=explicit)
    operators = tuple(with_one if op is linear else op for op in graph.operators)
    entries = universal.agreement(replace(graph, operators=operators))
    assert not next(e for e in entries if e.name == linear.name).disagreeing


def test_an_add_that_litert_rounds_by_position_is_not_covered() -> None:
    """Found by search: one pair of operands on which shifting first changes LiteRT's sum."""
    found = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        quantizations = [Quantization.of(rng.uniform(0.01, 0.1), 0) for _ in range(3)]
        tensors = tuple(
            Tensor(n, (1, 4), quantization=q) for n, q in zip("abc", quantizations, strict=True)
        )
        integers = profiles.scales.add_parameters(
            AddRounding.DOUBLE_HALF_AWAY,
            *(profiles.scales.decode_float32(q.scale_bits) for q in quantizations),
        )
        op = Add(name="sum", inputs=(0, 1), output=2)
        graph = Graph(tensors, (op,), 0, 2)
        if profiles.early_shift_agrees(integers, -128, -128):
            profiles.resolve(graph, "litert-x86")
            continue
        found += 1
        with pytest.raises(InvalidGraphError, match="element's position"):
            profiles.resolve(graph, "litert-x86")
        profiles.resolve(graph, "tflite-micro")
        assert not universal.is_universal(graph)
    assert found


def leaving_out(bits: int) -> Graph:
    """A universal SAME convolution whose windows (stride 3, kernel 2) leave out input elements."""
    rng = np.random.default_rng(0)
    tensors = (
        Tensor("x", (1, 6, 6, 1), quantization=Quantization.of(0.25, -128)),
        Tensor("y", (1, 2, 2, 2), quantization=Quantization.of(0.5, -128)),
    )
    # 1 / m just below 6: see ``snap``.
    scale = np.full(2, 2 / (6 - 4e-4), np.float32).view(np.uint32)
    conv = Conv2D(
        name="conv",
        inputs=(0,),
        output=1,
        weights=Weights(rng.integers(-3, 4, (2, 2, 2, 1)), bits, scale),
        bias=np.zeros(2, np.int32),
        stride=(3, 3),
        padding=Padding.SAME,
    )
    return Graph(tensors, (conv,), 0, 1)


def test_windows_that_leave_out_inputs_are_not_covered_by_xnnpack_2_14() -> None:
    graph = leaving_out(8)
    assert universal.is_universal(graph)
    outside = profiles.uncovered(graph)
    assert set(outside) == {"tflite-xnnpack-x86", "tflite-xnnpack-arm", "litert-xnnpack-arm"}
    assert all("'conv'" in reason for reason in outside.values())
    coverage = cover(graph, None)
    assert coverage.uncovered == outside
    assert set(coverage.groups[0].names) == set(profiles.PROFILES) - set(outside)
    assert profiles.uncovered(leaving_out(4)) == {}


_FACTORS = {  # least and largest multiplier, and the shift of a factor of one half
    Rounding.DOUBLE_HALF_AWAY: (1 << 30, (1 << 31) - 1, 0),
    Rounding.DOUBLE_HALF_UP: (1 << 30, (1 << 31) - 1, 0),
    Rounding.SINGLE: (1 << 30, (1 << 31) - 1, 31),
    Rounding.FLOAT32: (1 << 23, (1 << 24) - 1, 24),
    Rounding.FLOAT64: (1 << 52, (1 << 53) - 1, 53),
}


@pytest.mark.parametrize("rounding", _FACTORS)
@given(data=st.data())
def test_points_are_both_sides_of_every_step(rounding: Rounding, data: st.DataObject) -> None:
    """Wherever a channel's range lies, and however small its factor is."""
    least, most, shift = _FACTORS[rounding]
    multiplier = [data.draw(st.integers(least, most)) for _ in range(2)]
    shifts = [shift + data.draw(st.integers(0, 24)) for _ in range(2)]
    lower = np.array([data.draw(st.integers(-(1 << 27), 1 << 27)) for _ in range(2)])
    upper = lower + data.draw(st.integers(0, 3000))
    zero_point = data.draw(st.integers(-128, 127))
    parameters = Requantization(np.full(2, int(rounding)), np.array(multiplier), np.array(shifts))
    points = universal.step_points(parameters, lower, upper, zero_point, (-128, 127))
    every = lower + np.arange(upper[0] - lower[0] + 1)[:, None]
    values = universal.stored(parameters, every, zero_point, (-128, 127))
    for channel in range(2):
        at = np.flatnonzero(np.diff(values[:, channel]))
        wanted = {*every[at, channel], *every[at + 1, channel], lower[channel], upper[channel]}
        assert wanted <= set(points[:, channel].tolist())
