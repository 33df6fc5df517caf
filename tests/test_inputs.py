"""Input maps and boxes, against an oracle that enumerates every real grid point of the ball."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cactus_edge import inputs
from cactus_edge.errors import DataError, MalformedModelError, UsageError
from cactus_edge.graph import (
    DType,
    FullyConnected,
    Graph,
    Quantization,
    Requantization,
    Tensor,
    Weights,
)
from cactus_edge.inputs import Perturbation
from cactus_edge.semantics import Rounding


def graph_with(scale: float, zero_point: int, metadata: bytes | None = None) -> Graph:
    quantization = Quantization.of(scale, zero_point)
    tensors = (Tensor("x", (1, 2), DType.INT8, quantization), Tensor("y", (1, 2)))
    layer = FullyConnected(
        name="layer",
        inputs=(0,),
        output=1,
        weights=Weights(np.eye(2, dtype=np.int8)),
        bias=np.zeros(2, np.int32),
        requantization=Requantization.uniform(Rounding.SINGLE, 1 << 30, 31, 2),
    )
    pairs = () if metadata is None else ((inputs.METADATA, metadata),)
    return Graph(tensors, (layer,), 0, 1, pairs)


PIXEL = json.dumps({"kind": "pixel", "levels_per_unit": 255, "offset": -128}).encode()


def test_pixel_minus_128_is_what_is_stored() -> None:
    graph = graph_with(1 / 255, -128, PIXEL)
    pixels = np.arange(256, dtype=np.uint8).reshape(-1, 2)
    assert np.array_equal(inputs.stored(graph, pixels), pixels.astype(np.int64) - 128)


@pytest.mark.parametrize("levels", [0, 1, 2, 8, 254])
def test_k_255ths_are_k_levels(levels: int) -> None:
    graph = graph_with(1 / 255, -128, PIXEL)
    pixels = np.arange(256, dtype=np.uint8).reshape(-1, 2)
    by_epsilon = inputs.box(graph, pixels, Perturbation.epsilon(f"{levels}/255"))
    by_levels = inputs.box(graph, pixels, Perturbation.levels(levels))
    assert all(np.array_equal(a, b) for a, b in zip(by_epsilon, by_levels, strict=True))


def test_a_half_level_counts_outwards() -> None:
    """0.1 is 25.5 levels: ties may go either way on a device, so both sides are in the box."""
    graph = graph_with(1 / 255, -128, PIXEL)
    pixels = np.array([[100, 0]], np.uint8)
    lower, upper = inputs.box(graph, pixels, Perturbation.epsilon("0.1"))
    assert lower.tolist() == [[100 - 26 - 128, -128]]
    assert upper.tolist() == [[100 + 26 - 128, 26 - 128]]


@given(
    value=st.floats(0, 1, width=32),
    epsilon=st.fractions(0, Fraction(3, 10), max_denominator=500),
    scale=st.floats(0.002, 0.02),
    zero_point=st.integers(-128, 127),
    position=st.fractions(-1, 1, max_denominator=64),
)
def test_every_float_quantizer_lands_in_the_box(
    value: float, epsilon: Fraction, scale: float, zero_point: int, position: Fraction
) -> None:
    """Divide or multiply by the reciprocal, ties away or to even: all are inside."""
    graph = graph_with(scale, zero_point)
    image = np.array([[value, value]], np.float32)
    lower, upper = inputs.box(graph, image, Perturbation("epsilon", epsilon))
    real = min(max(Fraction(float(image[0, 0])) + position * epsilon, Fraction(0)), Fraction(1))
    x, s = np.float32(float(real)), np.float32(scale)
    inside = abs(Fraction(float(image[0, 0])) - Fraction(float(x))) <= epsilon
    for quotient in (x / s, x * (np.float32(1) / s)):
        for rounded in (np.floor(quotient + np.float32(0.5)), np.rint(quotient)):
            level = min(max(int(rounded) + zero_point, -128), 127)
            assert not inside or lower[0, 0] <= level <= upper[0, 0]


def test_unequal_boxes_are_clipped_to_the_domain() -> None:
    graph = graph_with(1 / 255, -128, PIXEL)
    lower, upper = inputs.box(graph, np.array([[0, 255]], np.uint8), Perturbation.epsilon("1"))
    assert (lower.tolist(), upper.tolist()) == ([[-128, -128]], [[127, 127]])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((1, 3), np.uint8), "the model takes"),
        (np.full((1, 2), 1.5, np.float32), "must lie in"),
        (np.full((1, 2), np.nan, np.float32), "must lie in"),
        (np.zeros((1, 2), np.int32), "must be uint8 or float"),
    ],
)
def test_samples_that_do_not_fit(image: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        inputs.stored(graph_with(1 / 255, -128), image)


@pytest.mark.parametrize("text", ["-0.1", "1.5", "abc", "1/0", "nan", "inf", ""])
def test_bad_radii(text: str) -> None:
    with pytest.raises(UsageError):
        Perturbation.epsilon(text)


@pytest.mark.parametrize(
    "metadata",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"kind": "other"}',
        b'{"kind": "pixel", "levels_per_unit": 0, "offset": -128}',
        b'{"kind": "pixel", "levels_per_unit": 255, "offset": 0}',
        b'{"kind": "pixel", "levels_per_unit": 100, "offset": -128}',
        b'{"kind": "pixel", "levels_per_unit": true, "offset": -128}',
    ],
)
def test_metadata_that_cannot_be_trusted(metadata: bytes) -> None:
    with pytest.raises(MalformedModelError, match=inputs.METADATA):
        inputs.input_map(graph_with(1 / 255, -128, metadata))
