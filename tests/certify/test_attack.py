"""What the attack finds is a counterexample, and it finds most of those that there are."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

from cactus_edge import decision
from cactus_edge.certify.attack import Settings, search
from cactus_edge.certify.attack_network import Network, transposed
from cactus_edge.certify.attack_routes import FLOOR, MARGIN, TOP, Routes, routes
from cactus_edge.certify.engine import cover
from cactus_edge.errors import UsageError
from cactus_edge.execute import accumulate, execute, requantize
from cactus_edge.graph import (
    Activation,
    DType,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Pool2D,
    Quantization,
    Requantization,
    Tensor,
    Weights,
)
from cactus_edge.semantics import Rounding
from tests.certify.constructed import CASES
from tests.certify.exhaustion import tiny_graph
from tests.certify.test_margin import hidden_graph
from tests.graphs import CORE_OPERATORS, enumerate_box, random_box, random_graph, random_inputs

QUICK = Settings(steps=5, restarts=1, hops=30, routes=3)
BLIND = replace(Settings(), points=0)
"""The default without enumeration, so that tiny boxes are a test of the search."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of one graph: int64 [boxes, ...], ``labels`` int64 [boxes]."""

    graph: Graph
    stored: Int64Array
    lower: Int64Array
    upper: Int64Array
    labels: Int64Array

    def __len__(self) -> int:
        return len(self.labels)

    def attacked(self, settings: Settings, threads: int | None = None) -> list[Int64Array | None]:
        """What the attack finds; every point is in its box, and surely wrong."""
        found = search(
            self.graph, self.stored, self.lower, self.upper, self.labels, settings, threads=threads
        )
        assert len(found) == len(self)
        for i, point in enumerate(found):
            if point is not None:
                assert point.dtype == np.int64
                assert point.shape == self.stored.shape[1:]
                assert ((self.lower[i] <= point) & (point <= self.upper[i])).all()
                assert wrong(self.graph, point[None], self.labels[i]).all()
        return found

    def part(self, index: Int64Array) -> Boxes:
        """Some of them."""
        arrays = (self.stored, self.lower, self.upper, self.labels)
        return Boxes(self.graph, *(array[index] for array in arrays))


def wrong(graph: Graph, points: Int64Array, label: int) -> npt.NDArray[np.bool_]:
    """Bool [points], by the reference executor."""
    logits = execute(graph, points).reshape(len(points), -1)
    return decision.surely_wrong(graph, logits, np.full(len(points), label))


def resolved(graph: Graph) -> Graph:
    """Under the first profile that covers it."""
    return cover(graph, None).groups[0].graph


def refutable(seed: int, wanted: int = 8) -> Boxes | None:
    """Boxes of a tiny graph with a few wrong points, by enumeration of a region that holds them."""
    random = np.random.default_rng(seed)
    graph = tiny_graph(seed)
    ends = random_box(random, graph, 18)
    graph, points = resolved(graph), enumerate_box(*ends)
    extents = tuple((ends[1] - ends[0] + 1).reshape(-1))
    winners = decision.predict(execute(graph, points)).reshape(extents)
    if (winners == winners.flat[0]).all():
        return None
    rows: list[tuple[Int64Array, Int64Array, Int64Array, int]] = []
    for index in random.permutation(len(points))[:400].tolist():
        place, radius = np.array(np.unravel_index(index, extents)), int(random.integers(3, 9))
        low, high = np.maximum(place - radius, 0), np.minimum(place + radius, np.array(extents) - 1)
        part = winners[tuple(slice(x, y + 1) for x, y in zip(low, high, strict=True))]
        bad, label = part != winners.flat[index], int(winners.flat[index])
        if 0 < 8 * np.count_nonzero(bad) <= bad.size and len(rows) < wanted:
            box = (end.reshape(ends[0].shape) + ends[0] for end in (low, high))
            rows.append((points[index], *box, label))
    if not rows:
        return None
    return Boxes(graph, *(np.array(column) for column in zip(*rows, strict=True)))


def random_boxes(graph: Graph, count: int, radius: int, seed: int = 0) -> Boxes:
    """Boxes of one size, labelled as predicted."""
    lowest, highest = graph.tensors[graph.core_input].dtype.range
    stored = random_inputs(np.random.default_rng(seed), graph, count)
    lower, upper = (np.clip(stored + d, lowest, highest) for d in (-radius, radius))
    logits = execute(graph, stored).reshape(count, -1)
    return Boxes(graph, stored, lower, upper, decision.predict(logits))


def same(a: list[Int64Array | None], b: list[Int64Array | None]) -> bool:
    """Equal, point by point."""
    pairs = zip(a, b, strict=True)
    return all((x is None) == (y is None) and np.array_equal(x, y) for x, y in pairs)


# ---------------------------------------------------------------- against enumeration
def test_finds_what_enumeration_finds() -> None:
    """Measured: nearly all of those boxes of whose points at most an eighth is wrong."""
    every = [boxes for seed in range(70) if (boxes := refutable(seed)) is not None]
    there = sum(len(boxes) for boxes in every)
    found = [point for boxes in every for point in boxes.attacked(BLIND)]
    assert there >= 50
    assert sum(point is not None for point in found) >= 0.9 * there


def test_small_boxes_are_enumerated() -> None:
    """Then the answer is complete: no counterexample is found exactly where there is none."""
    settings = Settings(steps=1, restarts=0, hops=0, routes=1, points=343)
    answers = [0, 0]
    for seed in range(30):
        graph = resolved(tiny_graph(seed))
        boxes = random_boxes(graph, 12, 3, seed)
        for i, point in enumerate(boxes.attacked(settings)):
            points = enumerate_box(boxes.lower[i], boxes.upper[i])
            assert (point is not None) == wrong(graph, points, boxes.labels[i]).any()
            answers[point is not None] += 1
    assert min(answers) >= 5


@pytest.mark.parametrize("dtype", [DType.INT8, DType.UINT8], ids=lambda dtype: dtype.value)
def test_every_operator_and_never_outside_the_box(dtype: DType) -> None:
    kinds: set[str] = set()
    found: list[Int64Array | None] = []
    for seed in range(15):
        graph = resolved(random_graph(np.random.default_rng(seed), input_type=dtype))
        kinds |= {op.kind for op in graph.core}
        found += random_boxes(graph, 5, 20, seed).attacked(QUICK)
    assert kinds == set(CORE_OPERATORS)
    assert 10 <= sum(point is not None for point in found) < len(found)


@pytest.mark.parametrize("classes", [None, 1], ids=["no last layer", "one logit"])
def test_graphs_without_rivals_or_matrix(classes: int | None) -> None:
    for kind in CORE_OPERATORS if classes is None else ("FULLY_CONNECTED",):
        graph = random_graph(np.random.default_rng(1), operators=(kind,), depth=1, classes=classes)
        boxes = random_boxes(resolved(graph), 3, 30)
        found = boxes.attacked(QUICK)
        assert (classes is None) == any(point is not None for point in found), kind


def test_wide_logits() -> None:
    """They have no clamp to meet at; only margins are followed."""
    graph = hidden_graph(DType.INT32, 3, 60, 20, 5)
    assert not routes(Network(graph)).clamps
    assert sum(point is not None for point in random_boxes(graph, 10, 20).attacked(QUICK)) >= 5


@pytest.mark.parametrize("name", CASES)
def test_constructed_cases(name: str) -> None:
    """Where real arithmetic proves the label, and only under profiles that err there."""
    case = CASES[name]
    ends = case.centre[None], case.lower[None], case.upper[None]
    for group in cover(case.graph, None).groups:
        boxes = Boxes(group.graph, *ends, np.array([case.label]))
        for settings in (Settings(), BLIND):
            [point] = boxes.attacked(settings)
            assert {case.expected[profile] == "refuted" for profile in group.names} == {
                point is not None
            }


# ---------------------------------------------------------------- routes
def clamped_twins(seed: int, kind: int, lead: int = 20, inputs: int = 96) -> Graph:
    """Two logits of the same weights, the second ``lead`` steps ahead, that clip near one corner.

    At four fifths of the way from an input of zeros to that corner, both do.
    """
    values = np.random.default_rng(seed).integers(-9, 10, inputs)
    step = 512  # accumulator units
    reach = 127 * int(np.abs(values).sum()) * 4 // 5
    first = 127 * step - reach if kind == TOP else (-128 - lead) * step + reach
    tensors = (
        Tensor("input", (1, inputs), quantization=Quantization.of(2.0**-8, 0)),
        Tensor("logits", (1, 2), quantization=Quantization.of(2.0**-8, 0)),
    )
    layer = FullyConnected(
        name="logits",
        inputs=(0,),
        output=1,
        weights=Weights(np.stack([values, values]), 8),
        bias=np.array([first, first + lead * step], np.int32),
        requantization=Requantization.uniform(Rounding.SINGLE, 1 << 30, 39, 2),
    )
    return Graph(tensors, (layer,), 0, 1)


@pytest.mark.parametrize("kind", [TOP, FLOOR], ids=["top", "floor"])
def test_common_saturation(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The margin is the same everywhere and says nothing; only the way to the clamp does."""
    zeros, ends = np.zeros((1, 96), np.int64), np.full((1, 96), 127)
    found: list[bool] = []
    for clamps in (True, False):

        def chosen(network: Network, clamps: bool = clamps) -> Routes:
            return replace(routes(network), clamps=clamps)

        monkeypatch.setattr(sys.modules[search.__module__], "routes", chosen)
        for seed in range(4):
            boxes = Boxes(clamped_twins(seed, kind), zeros, -ends, ends, np.array([1]))
            assert not wrong(boxes.graph, zeros, 1).any()
            found.append(boxes.attacked(Settings())[0] is not None)
    assert found == [True] * 4 + [False] * 4


def test_equal_logits() -> None:
    """Logits that are always equal: the lowest index wins, whatever the input."""
    graph = clamped_twins(0, TOP, lead=0)
    boxes = random_boxes(graph, 2, 50)
    assert boxes.labels.tolist() == [0, 0]
    assert boxes.attacked(QUICK) == [None, None]
    found = replace(boxes, labels=np.array([0, 1])).attacked(QUICK)
    assert [point is None for point in found] == [True, False]


def test_deficits_of_clamps_are_exact() -> None:
    """TOP is reached where both logits are stored at the top, FLOOR where the label is below."""
    for seed in range(40):
        graph = resolved(tiny_graph(seed))
        network = Network(graph)
        op, layer = network.last, network.layer
        assert layer is not None and layer.thresholds is not None and isinstance(op, Linear)
        assert op.requantization is not None
        values = network.forward(random_boxes(graph, 5, 0, seed).stored.astype(np.int8))
        hidden = values[layer.source].astype(np.int64)
        true = accumulate(op, graph.tensors[layer.source], hidden).reshape(len(hidden), -1)
        np.testing.assert_array_equal(network.scores(values), true * layer.parts)
        # The accumulators where a logit reaches the top or leaves the floor, and next to them.
        rng = np.random.default_rng(seed)
        edges = layer.thresholds[np.arange(true.shape[1]), rng.choice([1, -1], (300, 1))]
        accumulators = edges + rng.integers(-1, 2, edges.shape)
        limits = graph.output_range(op)
        zero_point = graph.tensors[op.output].zero_point
        logits = requantize(accumulators, op.requantization, zero_point, limits)
        labels = rng.integers(0, true.shape[1], len(logits))
        ways = routes(network)
        found = ways.every(accumulators * layer.parts, labels).reshape(len(logits), 3, -1)
        own = np.take_along_axis(logits, labels[:, None], axis=1)
        rivals = np.arange(logits.shape[1])[None, :]
        both = (own == limits[1]) & (logits == limits[1]) & (rivals < labels[:, None])
        sunk = (own == limits[0]) & (rivals == labels[:, None]) & (labels[:, None] > 0)
        assert both.any() and sunk.any()
        np.testing.assert_array_equal(found[:, TOP] <= 0, both)
        np.testing.assert_array_equal(found[:, FLOOR] <= 0, sunk)
        assert not ways.exists(found[:, MARGIN])[rivals == labels[:, None]].any()


# ---------------------------------------------------------------- gradients
def differences(graph: Graph, x: Int64Array) -> Int64Array:
    """What one more unit of each input adds to the (real) output: int64 [inputs, outputs]."""
    [op] = graph.core
    more = x + np.eye(x.size, dtype=np.int64).reshape(x.size, *x.shape)
    points = np.concatenate([x[None], more])
    if isinstance(op, Linear):
        outputs = accumulate(op, graph.tensors[op.inputs[0]], points)
    else:
        outputs = execute(graph, points)
    outputs = outputs.reshape(len(points), -1)
    return outputs[1:] - outputs[0]


@pytest.mark.parametrize(
    "kind",
    ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D", "PAD", "RESHAPE"],
)
def test_gradient_is_the_transpose(kind: str) -> None:
    """One layer at a time, against differences of accumulators or of what is stored."""
    checked = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        graph = resolved(random_graph(rng, operators=(kind,), depth=1, classes=None))
        op = graph.core[0]
        if isinstance(op, Pool2D) and op.activation is not Activation.NONE:
            continue  # the last layer's clamp is not passed through, and differences stop there
        x = rng.integers(-100, 100, graph.tensors[graph.core_input].shape[1:])
        network = Network(graph)
        outputs = graph.tensors[graph.logits].size
        seeds = rng.integers(-(1 << 12), 1 << 12, (1, outputs)).astype(np.int32)
        found = transposed(network, network.forward(x[None].astype(np.int8)), seeds)
        weights = seeds[0].astype(np.float64)
        if isinstance(op, Linear):
            assert op.requantization is not None
            double = op.requantization.rounding <= Rounding.DOUBLE_HALF_UP
            factors = op.requantization.multiplier * 2.0 ** -(op.requantization.shift + 31 * double)
            weights *= np.resize(factors, outputs)
        expected = differences(graph, x) @ weights
        scale = np.abs(expected).max() / max(1, np.abs(found).max())
        np.testing.assert_allclose(
            found.reshape(-1) * scale, expected, rtol=0, atol=np.abs(expected).max() / 500 + 1e-12
        )
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize(
    ("name", "value", "sign"), [("clamp_at_zero_point", 127, 1), ("clamp_above", 12, -1)]
)
def test_clamps_leak_inwards_alone(name: str, value: int, sign: int) -> None:
    """No gradient passes a clamp that is reached, unless it is let back inside."""
    network = Network(resolved(CASES[name].graph))
    hidden = network.graph.core[0].output
    values = network.forward(np.array([[value]], np.int8))
    assert values[hidden][0, 0] == network.graph.output_range(network.graph.core[0])[sign < 0]
    weight = network.layer.weights[0, 0] if network.layer else 0
    inwards = np.array([[sign * np.sign(weight) << 12, 0]], np.int32)
    assert transposed(network, values, inwards).item() == 0
    assert transposed(network, values, -inwards, leak=2).item() == 0
    assert transposed(network, values, inwards, leak=2).item() < 0


# ---------------------------------------------------------------- the same whatever the batch
def test_results_do_not_depend_on_the_batch() -> None:
    """Nor on how many threads share it; much of what is found here is found by chance."""
    graph = resolved(random_graph(np.random.default_rng(5), shape=(1, 6, 6, 2), depth=5))
    boxes = random_boxes(graph, 150, 16)
    settings = replace(QUICK, hops=8, routes=2)
    whole = boxes.attacked(settings)
    sure = boxes.attacked(replace(settings, restarts=0, hops=0))
    assert sum(point is None for point in whole) >= 10
    assert sum(a is not None and b is None for a, b in zip(whole, sure, strict=True)) >= 10
    for threads in (1, 2, 3):
        assert same(whole, boxes.attacked(settings, threads))
    order = np.random.default_rng(1).permutation(len(boxes))
    mixed = boxes.part(order).attacked(settings)
    assert same([whole[i] for i in order], mixed)
    for i in range(0, len(boxes), 10):
        assert same([whole[i]], boxes.part(np.array([i])).attacked(settings))
    assert not same(whole, boxes.attacked(replace(settings, seed=1)))


def test_no_samples() -> None:
    boxes = random_boxes(resolved(tiny_graph(0)), 2, 3)
    assert boxes.part(np.zeros(0, np.int64)).attacked(Settings()) == []


# ---------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "a step and a route at least"),
        ({"routes": 0}, "a step and a route at least"),
        ({"restarts": -1}, "no negative number"),
        ({"hops": -1}, "no negative number"),
        ({"points": -1}, "no negative number"),
        ({"seed": -1}, "no negative number"),
        ({"seed": 1 << 64}, "more than 64 bits"),
    ],
)
def test_settings_are_checked(values: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**values)


def test_threads_are_checked() -> None:
    with pytest.raises(UsageError, match="0 threads; give at least 1"):
        random_boxes(resolved(tiny_graph(0)), 2, 3).attacked(Settings(), threads=0)
