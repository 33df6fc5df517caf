"""Universal scales: found, proved, near, and refused where there are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge import profiles, universal
from cactus_edge.execute import execute
from cactus_edge.graph import (
    Activation,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Linear,
    Quantization,
    Tensor,
    Weights,
)
from cactus_edge.snap import LARGEST_CHANGE, Make, candidates, snap


def layer_maker(
    rng: np.random.Generator, channels: int, depth: int, input_scale: float, output_scale: float,
    zero_point: int = -128, spread: tuple[float, float] = (0.3, 0.2),
) -> tuple[Make, np.ndarray, np.ndarray, float]:  # fmt: skip
    """``make``, wanted scales, smallest scales and the ratio, for a random float layer.

    ``spread`` are the standard deviations of weights and bias.
    """
    values = rng.normal(0, spread[0], (channels, depth))
    bias = rng.normal(0, spread[1], channels)
    tensors = (
        Tensor("x", (1, depth), quantization=Quantization.of(input_scale, -128)),
        Tensor("y", (1, channels), quantization=Quantization.of(output_scale, zero_point)),
    )
    assert tensors[0].quantization is not None
    assert tensors[1].quantization is not None
    scales = [float(t.quantization.scale) for t in tensors if t.quantization]

    def make(bits: np.ndarray, rows: list[int] | None = None) -> tuple[Graph, Linear]:
        scale = bits.view(np.float32).astype(np.float64)
        chosen = list(range(channels)) if rows is None else rows
        weights = np.clip(np.rint(values[chosen] / scale[:, None]), -127, 127).astype(np.int8)
        op = FullyConnected(
            name="layer",
            inputs=(0,),
            output=1,
            weights=Weights(weights, 8, bits),
            bias=np.rint(bias[chosen] / (scales[0] * scale)).astype(np.int32),
            activation=Activation.RELU if zero_point == -128 else Activation.NONE,
        )
        return Graph(tensors, (op,), 0, 1), op

    largest = np.abs(values).max(axis=1)
    return make, largest / 127, largest / 127.499, scales[0] / scales[1]


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(8, 200),
    output=st.floats(0.02, 0.08),
)
def test_snapped_scales_are_proved_and_near(seed: int, depth: int, output: float) -> None:
    rng = np.random.default_rng(seed)
    make, wanted, smallest, ratio = layer_maker(rng, 8, depth, 0.01, output)
    result = snap(make, wanted, smallest, ratio)
    graph, op = make(result.scale_bits)
    bad = set(universal.disagreeing_channels(graph, op))
    assert bad <= set(np.flatnonzero(~result.solved).tolist())
    assert result.solved.mean() > 0.7
    assert np.abs(result.change[result.solved]).max() < 0.2
    assert (result.scale_bits.view(np.float32) >= smallest * (1 - 1e-6)).all()


def test_all_profiles_agree_on_inputs_and_did_not_before() -> None:
    rng = np.random.default_rng(3)
    make, wanted, smallest, ratio = layer_maker(rng, 16, 40, 0.01, 0.03)
    points = rng.integers(-128, 128, (3000, 40))
    before, _ = make(wanted.astype(np.float32).view(np.uint32))
    assert len({execute(before, points, name).tobytes() for name in profiles.PROFILES}) > 1
    result = snap(make, wanted, smallest, ratio)
    assert result.solved.all()
    after, _ = make(result.scale_bits)
    assert len({execute(after, points, name).tobytes() for name in profiles.PROFILES}) == 1


def test_a_two_sided_output_is_refused() -> None:
    """No universal scale exists for a zero point in the middle: the wanted scales come back."""
    rng = np.random.default_rng(4)
    make, wanted, smallest, ratio = layer_maker(rng, 4, 60, 0.01, 0.05, zero_point=0)
    result = snap(make, wanted, smallest, ratio)
    assert not result.solved.any()
    assert np.array_equal(result.scale_bits, wanted.astype(np.float32).view(np.uint32))
    assert np.abs(result.change).max() < 1e-6


@pytest.mark.parametrize("wanted", [0.001, 0.01, 0.05])
def test_candidates_lie_just_above_even_reciprocals(wanted: float) -> None:
    ratio = 0.4
    found = candidates(wanted, wanted * 0.99, ratio)
    for scale in found:
        reciprocal = 1 / (float(scale) * ratio)
        nearest = 2 * round((reciprocal + 1e-3) / 2)
        rounding = nearest * 2.0**-23  # the scale itself is a float32
        assert -2e-3 < reciprocal - nearest < rounding
        assert scale >= np.float32(wanted * 0.99)


def test_multipliers_that_are_rounded_once_hardly_move() -> None:
    """From a half on, where even reciprocals have only 2."""
    make, wanted, _, ratio = layer_maker(np.random.default_rng(6), 16, 40, 0.01, 0.03)
    large = np.linspace(0.51, 0.89, wanted.size) / ratio
    result = snap(make, large, large * 0.99, ratio)
    assert result.solved.all() and np.abs(result.change).max() < 1e-3
    graph, op = make(result.scale_bits)
    assert not universal.disagreeing_channels(graph, op)


def test_of_several_ways_to_store_weights_the_nearest_is_taken() -> None:
    """A quarter is far from even reciprocals that are universal, a half of it and twice are not."""
    make, wanted, _, ratio = layer_maker(np.random.default_rng(7), 4, 40, 0.01, 0.03)
    quarter = np.full(wanted.size, 0.26 / ratio)
    alone = snap(make, quarter, quarter * 0.9, ratio)
    ways = [(quarter * factor, quarter * factor * 0.9) for factor in (2, 0.5)]
    result = snap(make, quarter, quarter * 0.9, ratio, ways)
    assert alone.solved.all() and alone.change.min() > 0.5
    assert result.solved.all() and np.abs(result.change).max() < 0.05
    assert not universal.disagreeing_channels(*make(result.scale_bits))


def test_coarser_scales_are_tried_where_none_is_near() -> None:
    """Accumulators above 2^24 with a rounding boundary among them: float32 loses their last bits.

    Such channels hardly depend on their input; their weights can do with fewer levels.
    """
    make, wanted, smallest, ratio = layer_maker(
        np.random.default_rng(0), 24, 8, 0.01, 0.03, spread=(7e-4, 4.0)
    )
    result = snap(make, wanted, smallest, ratio)
    assert result.solved.all()
    assert result.change.max() > LARGEST_CHANGE
    assert universal.disagreeing_channels(*make(result.scale_bits)) == ()
    found = np.array(candidates(1e-6, 1e-6, 1.0), np.float64)
    assert (np.diff(np.abs(found / 1e-6 - 1)) > -2e-3).all(), "nearest first"


@pytest.mark.parametrize("channels", [3, 13, 20])
def test_depthwise_vectors_and_their_rest_agree(channels: int) -> None:
    """Runtimes round whole vectors of eight channels otherwise than the rest."""
    rng = np.random.default_rng(channels)
    values = rng.normal(0, 0.3, (1, 3, 3, channels))
    tensors = (
        Tensor("x", (1, 6, 6, channels), quantization=Quantization.of(0.01, -128)),
        Tensor("y", (1, 4, 4, channels), quantization=Quantization.of(0.017, -128)),
    )

    def make(bits: np.ndarray, rows: list[int] | None = None) -> tuple[Graph, Linear]:
        chosen = list(range(channels)) if rows is None else rows
        weights = np.rint(values[..., chosen] / bits.view(np.float32).astype(np.float64))
        op = DepthwiseConv2D(
            name="layer",
            inputs=(0,),
            output=1,
            weights=Weights(np.clip(weights, -127, 127).astype(np.int8), 8, bits),
            bias=np.zeros(len(chosen), np.int32),
            activation=Activation.RELU,
        )
        return Graph(tensors, (op,), 0, 1), op

    largest = np.abs(values).max(axis=(0, 1, 2))
    result = snap(make, largest / 127, largest / 127.499, 0.01 / 0.017)
    graph, op = make(result.scale_bits)
    assert result.solved.all()
    assert universal.disagreeing_channels(graph, op) == ()
