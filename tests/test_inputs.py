"""Input maps and boxes, against an oracle that enumerates every real grid point of the ball."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cactus_edge import inputs
from cactus_edge.errors import CactusEdgeError, DataError, MalformedModelError, UsageError
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
from cactus_edge.radii import read_radii
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


# ---------------------------------------------------------------- radii and masks
def image_graph(height: int = 3, width: int = 4, channels: int = 2) -> Graph:
    """A model of images; the layer never runs."""
    plain = graph_with(1 / 255, -128, PIXEL)
    size = height * width * channels
    shape = Tensor("x", (1, height, width, channels), DType.INT8, plain.tensors[0].quantization)
    layer = FullyConnected(
        name="layer",
        inputs=(0,),
        output=1,
        weights=Weights(np.ones((2, size), np.int8)),
        bias=np.zeros(2, np.int32),
        requantization=Requantization.uniform(Rounding.SINGLE, 1 << 30, 31, 2),
    )
    return Graph((shape, plain.tensors[1]), (layer,), 0, 1, plain.metadata)


def images(count: int, graph: Graph) -> np.ndarray:
    shape = graph.tensors[graph.core_input].shape[1:]
    return np.random.default_rng(3).integers(0, 256, (count, *shape)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["epsilon", "levels"])
def test_each_element_has_the_box_of_its_own_radius(kind: str) -> None:
    graph = image_graph()
    samples = images(5, graph)
    choices = ["0", "1/255", "0.1", "1"] if kind == "epsilon" else [0, 1, 7, 255]
    radii = [choices[i % 4] for i in range(24)]
    lower, upper = inputs.box(graph, samples, Perturbation.each(kind, radii))
    assert lower.shape == samples.shape
    for i, radius in enumerate(choices):
        alone = Perturbation(kind, inputs.rational(radius))
        low, high = inputs.box(graph, samples, alone)
        columns = np.arange(24) % 4 == i
        for found, expected in ((lower, low), (upper, high)):
            a, b = (x.reshape(5, 24)[:, columns] for x in (found, expected))
            assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", ["epsilon", "levels"])
def test_patches_are_every_placement_inside_the_image(kind: str) -> None:
    graph = image_graph(5, 4)
    samples = images(2, graph)
    radius = Perturbation.epsilon("0.1") if kind == "epsilon" else Perturbation.levels(9)
    patched = radius.patched(2, 3, 2)
    corners = [(top, left) for top in (0, 2) for left in (0,)]
    inside = inputs.box(graph, samples, radius)
    outside = inputs.box(graph, samples, Perturbation(kind, Fraction(0)))
    found = list(inputs.boxes(graph, samples, patched))
    assert len(found) == 2
    for index, (lower, upper) in enumerate(found):
        assert lower.shape == upper.shape == (2, 5, 4, 2)
        for placement, (top, left) in enumerate(corners):
            window = np.zeros((5, 4, 2), bool)
            for row in range(top, top + 2):
                for column in range(left, left + 3):
                    window[row, column] = True
            for end, ends in ((lower, 0), (upper, 1)):
                expected = np.where(window, inside[ends][index], outside[ends][index])
                assert np.array_equal(end[placement], expected)


def test_without_a_patch_there_is_one_box_a_sample() -> None:
    graph = image_graph()
    samples = images(3, graph)
    lower, upper = inputs.box(graph, samples, Perturbation.levels(2))
    found = list(inputs.boxes(graph, samples, Perturbation.levels(2)))
    assert np.array_equal(np.concatenate([low for low, _ in found]), lower)
    assert np.array_equal(np.concatenate([high for _, high in found]), upper)
    with pytest.raises(UsageError, match="union of boxes"):
        inputs.box(graph, samples, Perturbation.levels(2).patched(1, 1))


def test_integer_boxes_are_checked() -> None:
    graph = graph_with(1 / 255, -128)
    lower, upper = inputs.integer_box(graph, [-128, 3], [5, 127])
    assert (lower.tolist(), upper.tolist()) == ([[-128, 3]], [[5, 127]])
    for low, high, message in (
        ([0.0, 1.0], [1, 1], "lower end is float64"),
        ([0, 1, 2], [1, 1, 2], "stored integers"),
        ([-129, 1], [1, 1], "outside -128..127"),
        ([0, 1], [1, 128], "outside -128..127"),
        ([0, 4], [1, 3], "empty.*element 1"),
    ):
        with pytest.raises(DataError, match=message):
            inputs.integer_box(graph, low, high)


def test_radii_are_read_exactly(tmp_path: Path) -> None:
    graph = graph_with(1 / 255, -128)
    texts = {"a.json": '[0.1, "8/255"]', "a.csv": "0.1,\n 8/255\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        found = read_radii(graph, tmp_path / name, "epsilon")
        assert found.radii == (Fraction(1, 10), Fraction(8, 255))
    np.save(tmp_path / "a.npy", np.array([0.5, 0.1]))
    assert read_radii(graph, tmp_path / "a.npy", "epsilon").radii == (
        Fraction(1, 2),
        Fraction(0.1),
    )
    np.savez(tmp_path / "a.npz", radii=np.array([0, 3]))
    assert read_radii(graph, tmp_path / "a.npz", "levels") == Perturbation.each("levels", [0, 3])


def test_a_mask_of_pixels_holds_for_all_channels(tmp_path: Path) -> None:
    graph = image_graph()
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    np.save(tmp_path / "mask.npy", mask)
    found = read_radii(graph, tmp_path / "mask.npy", "levels", 5)
    expected = np.zeros((3, 4, 2), int)
    expected[1, 2] = 5
    assert found == Perturbation.each("levels", expected.reshape(-1).tolist())
    with pytest.raises(UsageError, match="mask needs a radius"):
        read_radii(graph, tmp_path / "mask.npy", "levels")
    np.save(tmp_path / "radii.npy", expected)
    with pytest.raises(UsageError, match="holds radii"):
        read_radii(graph, tmp_path / "radii.npy", "levels", 5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"1", "are read from"),
        ("a.npy", b"junk", "not an array"),
        ("a.npz", b"PK\x03\x04junk", "not an array"),
        ("a.json", b"{", "not a list of numbers"),
        ("a.json", b"[" * 100000, "not a list of numbers"),
        ("a.json", b"[NaN, 1]", "not a list of numbers"),
        ("a.json", b"[true, 1]", "not a list of numbers"),
        ("a.json", b"[[1], 1]", "not a list of numbers"),
        ("a.json", b"[1, 2, 3]", r"shape \[3\], the model's input is \[2\]"),
        ("a.json", b'["1e999999999", 0]', "not a radius"),
        ("a.json", b"[" + b"1" * 5000 + b", 0]", "not a radius"),
        ("a.json", b"[2, 0]", "outside"),
        ("a.csv", b"\xff", "not a list of numbers"),
        ("a.csv", b"", "not a list of numbers"),
        ("a.csv", b"0.1;0", "not a radius|the model's input"),
    ],
)
def test_bad_files_of_radii(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CactusEdgeError, match=message):
        read_radii(graph_with(1 / 255, -128), tmp_path / name, "epsilon")


def test_perturbations_that_make_no_sense() -> None:
    graph = image_graph()
    with pytest.raises(UsageError, match="outside"):
        Perturbation.each("epsilon", ["0.1", "1.5"])
    with pytest.raises(UsageError, match="levels are integers"):
        Perturbation.each("levels", ["0.5"])
    with pytest.raises(UsageError, match="no radius"):
        Perturbation.each("levels", [])
    with pytest.raises(UsageError, match="not both"):
        Perturbation("levels", Fraction(1), (Fraction(1),))
    with pytest.raises(UsageError, match="each at least 1"):
        Perturbation.levels(1).patched(0, 1)
    with pytest.raises(DataError, match="3 radii, the model's input has 24"):
        inputs.box(graph, images(1, graph), Perturbation.each("levels", [1, 2, 3]))
    with pytest.raises(DataError, match="does not fit"):
        list(inputs.boxes(graph, images(1, graph), Perturbation.levels(1).patched(4, 4)))
    with pytest.raises(DataError, match="does not fit"):
        flat = graph_with(1 / 255, -128)
        list(inputs.boxes(flat, np.zeros((1, 2), np.uint8), Perturbation.levels(1).patched(1, 1)))
