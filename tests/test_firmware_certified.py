"""Self-certifying inference in generated C, integer by integer with the host's ``certify``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from graphs import TINY_SHAPES, enumerate_box, random_graph, random_inputs

from cactus_edge import decision, profiles
from cactus_edge.certify import Certifier, margin, twin
from cactus_edge.csource import Layout, generate
from cactus_edge.errors import ToolError, UnsupportedModelError
from cactus_edge.execute import execute, execute_all
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import DType, Graph
from cactus_edge.inputs import around
from cactus_edge.operators import Function, Unary
from firmware_sim import BOARDS, Verdicts, certify_board, certify_host
from tests.foreign import made

CPUS = {
    "cortex-m0plus": "RP2040",
    "cortex-m4": "STM32F405",
    "cortex-m7": "STM32H743",
    "cortex-m33": "nRF5340",
    "rv32imc": "ESP32-C3",
}


def equals_the_host(
    graph: Graph, inputs: np.ndarray, levels: np.ndarray, found: Verdicts, profile: str
) -> tuple[int, int]:
    """Asserts it for every field; how many were certified, and how many by a margin alone."""
    resolved = profiles.resolve(graph, profile)
    logits = execute(resolved, inputs).reshape(len(inputs), -1)
    labels = decision.predict(logits)
    radii = levels.reshape(-1, *[1] * (inputs.ndim - 1))
    lower, upper = around(graph, inputs.astype(np.int64), radii)
    certifier = Certifier(graph, [profile], threads=1)
    lines = certifier.verdicts(0, inputs, lower, upper, labels)
    (low, high), *others = certifier.bounds(lower, upper)
    assert not others
    np.testing.assert_array_equal(found.logits, logits)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.lower, low)
    np.testing.assert_array_equal(found.upper, high)
    assert found.certified.tolist() == [line.verdict == "certified" for line in lines]
    plain = (found.leads >= 0).all(axis=1)
    methods = {line.index: line.method for line in lines if line.verdict == "certified"}
    expected = {index: "interval" if plain[index] else "elided-margin" for index in methods}
    assert methods == expected
    gaps = np.stack([decision.gaps(resolved, int(y), logits.shape[1]) for y in labels])
    rows = np.arange(len(labels))
    leads = low[rows, labels][:, None] - high - np.minimum(gaps, 512)
    leads[rows, labels] = 0
    np.testing.assert_array_equal(found.leads, leads)
    layer = margin.last_layer(resolved)
    for sample, rival in zip(*np.nonzero(found.leads < 0), strict=True):
        value = int(found.margins[sample, rival])
        if layer is None:
            assert value < 0
            continue
        box = reference_bounds(resolved, layer.source, lower[sample], upper[sample])
        assert value == slack(layer, box, int(labels[sample]), int(rival), int(gaps[sample, rival]))
    assert (found.margins[found.leads >= 0] == 0).all()
    return int(found.certified.sum()), int((found.certified & ~plain).sum())


def reference_bounds(
    graph: Graph, tensor: int, lower: np.ndarray, upper: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of one tensor by the twin and the reference executor: no kernel takes part."""
    doubled = twin(graph)
    values = execute_all(doubled.graph, doubled.stack(lower[None], upper[None]))
    low, high = doubled.split(tensor, values[tensor])
    return low[0], high[0]


def slack(
    layer: margin.LastLayer, box: tuple[np.ndarray, np.ndarray], label: int, rival: int, gap: int
) -> int:
    """Elided margin less the least one that the host takes for a proof, found by bisection."""
    low, high = (end - layer.zero_point for end in box)
    positive, negative = np.maximum(layer.weights, 0), np.minimum(layer.weights, 0)
    least = positive @ low + negative @ high + layer.bias
    most = positive @ high + negative @ low + layer.bias
    own, other = int(layer.parts[label]), int(layer.parts[rival])
    combined = own * layer.weights[label] - other * layer.weights[rival]
    found = int(np.maximum(combined, 0) @ low + np.minimum(combined, 0) @ high)
    found += own * int(layer.bias[label]) - other * int(layer.bias[rival])
    found = max(found, own * int(least[label]) - other * int(most[rival]))
    ends = [(int(least[c]), int(most[c])) for c in (label, rival)]
    arguments = (layer, label, rival, gap)
    below, enough = -(1 << 50), 1 << 50
    implied = own * ends[0][0] - other * ends[1][1]
    while enough - below > 1:
        middle = (below + enough) // 2
        # ``proved`` takes what the bounds imply for granted; the needed margin lies above it.
        if middle >= implied and margin.proved(*arguments, middle, *ends):
            enough = middle
        else:
            below = middle
    return found - enough


@pytest.mark.parametrize("seed", [0, 2, 3, 5])
def test_random_graphs_on_this_computer(seed: int) -> None:
    """All operators and layouts, each rounding, int8 and uint8 inputs; overflow is an error."""
    rng = np.random.default_rng(seed)
    graph = random_graph(
        rng,
        depth=int(rng.integers(1, 6)),
        sparsity=float(rng.choice([0, 0.7])),
        edges=("SOFTMAX",) if seed % 4 == 3 else (),
        input_type=DType.UINT8 if seed % 6 == 5 else DType.INT8,
    )
    names = [name for name in profiles.PROFILES if name not in profiles.uncovered(graph)]
    profile = names[seed % len(names)]
    layout = (Layout.AUTO, Layout.SPARSE8, Layout.INT8)[seed % 3]
    source = generate(graph, profile, layout=layout, certified=True)
    inputs = random_inputs(rng, graph, 36)
    levels = np.repeat([0, 1, 6], 12)
    found = certify_host(graph, source, inputs, levels, sanitize=True)
    equals_the_host(graph, inputs, levels, found, profile)
    assert found.certified[:12].all() or seed % 4 == 3, "a box of one point has one label"


def close_race(seed: int) -> Graph:
    """Two int4 layers whose boxes are decided by elided margins, some for and some against."""
    return random_graph(
        np.random.default_rng(seed),
        operators=("FULLY_CONNECTED",),
        depth=1,
        shape=(1, 5),
        classes=7,
        bits=(4,),
    )


@pytest.mark.parametrize("layout", [Layout.INT8, Layout.INT4, Layout.SPARSE8, Layout.SPARSE4])
def test_margins_read_every_layout(layout: Layout) -> None:
    graph = close_race(3)
    rng = np.random.default_rng(1)
    inputs, levels = random_inputs(rng, graph, 90), np.repeat([1, 3, 9], 30)
    source = generate(graph, layout=layout, certified=True)
    found = certify_host(graph, source, inputs, levels, sanitize=True)
    certified, by_margin = equals_the_host(graph, inputs, levels, found, profiles.DEFAULT)
    assert 0 < by_margin < certified < len(inputs)


@pytest.mark.parametrize("cpu", ["cortex-m0plus", "cortex-m4", "rv32imc"])
def test_a_board_says_what_this_computer_says(cpu: str) -> None:
    graph = random_graph(np.random.default_rng(40), depth=4, sparsity=0.5)
    inputs, levels = random_inputs(np.random.default_rng(0), graph, 12), np.repeat([0, 1, 4], 4)
    source = generate(graph, certified=True)
    found = certify_board(graph, source, inputs, levels, BOARDS[CPUS[cpu]])
    equals_the_host(graph, inputs, levels, found, profiles.DEFAULT)
    assert len(found.instructions) == len(inputs)
    plain = certify_host(graph, source, inputs, levels)
    for name in ("labels", "certified", "margins", "leads", "logits", "lower", "upper"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))


@pytest.mark.parametrize("seed", range(2))
def test_certified_boxes_hold_no_other_label(seed: int) -> None:
    """Every point of small boxes, by the reference executor."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, shape=TINY_SHAPES[seed], depth=2)
    inputs = random_inputs(rng, graph, 30)
    found = certify_host(graph, generate(graph, certified=True), inputs, 6)
    assert found.certified.any() and not found.certified.all()
    for sample, label in zip(inputs[found.certified], found.labels[found.certified], strict=True):
        lower, upper = around(graph, sample[None], np.array(6))
        points = enumerate_box(lower[0], upper[0])
        logits = execute(graph, points).reshape(len(points), -1)
        assert (decision.predict(logits) == label).all()


def test_a_radius_has_limits() -> None:
    graph = close_race(3)
    source = generate(graph, certified=True)
    inputs = random_inputs(np.random.default_rng(0), graph, 1)
    for levels in (-1, 256):
        with pytest.raises(ToolError, match="reported error 3"):
            certify_host(graph, source, inputs, levels)


def test_comparison_can_fail() -> None:
    """A gap that is left out, or a margin too generous by one, is noticed."""
    graph = close_race(3)
    inputs, levels = random_inputs(np.random.default_rng(1), graph, 90), np.repeat([1, 3, 9], 30)
    source = generate(graph, certified=True)
    for right, wrong in (
        ("gap = n < label ? 1 : 0", "gap = 0"),
        ("low, high) + 1;", "low, high);"),
    ):
        assert right in source.files["cactus_edge.c"]
        text = source.files["cactus_edge.c"].replace(right, wrong)
        broken = replace(source, files={**source.files, "cactus_edge.c": text})
        found = certify_host(graph, broken, inputs, levels)
        with pytest.raises(AssertionError):
            equals_the_host(graph, inputs, levels, found, profiles.DEFAULT)


@pytest.mark.parametrize("falls", [False, True])
def test_a_table_that_falls_is_refused(falls: bool) -> None:
    """Both ends of a box go through a table one by one, which only a monotone one allows."""
    rng = np.random.default_rng(3)
    graph = random_graph(rng, shape=(1, 5), depth=1, operators=("FULLY_CONNECTED",))
    table = np.sort(rng.integers(-128, 128, (1, 256)), axis=1)
    if falls:
        table[0, 100] = table[0, 99] - 1
    target = replace(graph.tensors[graph.output], name="looked up")
    lookup = Unary(
        name="t",
        inputs=(graph.output,),
        output=len(graph.tensors),
        function=Function.QUANTIZE,
        table=table,
    )
    whole = Graph(
        (*graph.tensors, target), (*graph.operators, lookup), graph.input, len(graph.tensors)
    )
    if falls:
        with pytest.raises(UnsupportedModelError, match="falls somewhere"):
            generate(whole, certified=True)
        return
    inputs = random_inputs(rng, whole, 12)
    levels = np.arange(12)
    found = certify_host(whole, generate(whole, certified=True), inputs, levels)
    equals_the_host(whole, inputs, levels, found, "tflite-micro")


@pytest.mark.parametrize("name", ["logistic", "transposed", "mean", "rows_of_four_dimensions"])
def test_operators_of_others(name: str) -> None:
    """Tables that only rise, moved elements, means and rows: verdicts and bounds of the host."""
    graph = read_tflite(made(name, 0))
    inputs, levels = random_inputs(np.random.default_rng(0), graph, 12), np.arange(12)
    found = certify_host(graph, generate(graph, certified=True), inputs.astype(np.int8), levels)
    lower, upper = around(graph, inputs, levels.reshape(-1, *[1] * (inputs.ndim - 1)))
    certifier = Certifier(graph, ["tflite-micro"], threads=1)
    ((low, high),) = certifier.bounds(lower, upper)
    np.testing.assert_array_equal(found.lower, low)
    np.testing.assert_array_equal(found.upper, high)
    labels = found.labels.astype(np.int64)
    lines = certifier.verdicts(0, inputs, lower, upper, labels)
    assert found.certified.tolist() == [line.verdict == "certified" for line in lines]
    assert found.certified[0]  # one point alone
