"""Elided margins against the truth: every input of a box, and every pair of accumulators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest

from cactus_edge import check_bounds, check_margin, decision
from cactus_edge.certify import margin, margin_wide
from cactus_edge.certify.engine import Certifier
from cactus_edge.certify.margin_steps import Staircases
from cactus_edge.certify.twin import twin
from cactus_edge.constraints import validate
from cactus_edge.csource import generate
from cactus_edge.errors import InvalidGraphError, UnsupportedModelError
from cactus_edge.execute import execute, execute_all
from cactus_edge.flatbuffer import write_tflite
from cactus_edge.graph import (
    DType,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Quantization,
    Requantization,
    Tensor,
    Weights,
)
from cactus_edge.runtime import Session
from cactus_edge.semantics import Rounding
from tests.certify.last_layers import FORMS, SPECIALS, Options, last_layer_graph
from tests.graphs import enumerate_box, random_box

WIDE = (DType.INT16, DType.INT32)


@dataclass
class Tally:
    """Counts of pairs of a label and a rival."""

    pairs: int = 0
    true: int = 0
    proved: int = 0
    by_bounds: int = 0
    false: int = 0
    differences: int = 0

    @property
    def share(self) -> float:
        return self.proved / max(self.true, 1)


def linear(graph: Graph) -> Linear:
    layer = check_bounds.last_layer(graph)
    assert layer is not None
    return layer


def compare(graph: Graph, seed: int, tally: Tally, radius: int) -> None:
    """``wins`` and the checker on a random box of a graph of one layer, for every label."""
    lower, upper = random_box(np.random.default_rng(seed), graph, radius)
    points = enumerate_box(lower, upper)
    logits = execute(graph, points).reshape(len(points), -1)
    layer = margin.last_layer(graph)
    assert layer is not None
    classes = logits.shape[1]
    labels = np.arange(classes)
    gaps = np.stack([decision.gaps(graph, label, classes) for label in labels.tolist()])
    flat = [np.repeat(end.reshape(1, -1), classes, axis=0) for end in (lower, upper)]
    plain, proved = margin.wins(layer, flat[0], flat[1], labels, gaps)
    stored, hidden = check_bounds.logits_box(graph, (lower[None], upper[None]))
    for label in range(classes):
        rivals = labels != label
        truth = (logits[:, label][:, None] >= logits + gaps[label]).all(axis=0)
        tally.pairs += int(rivals.sum())
        tally.true += int((truth & rivals).sum())
        tally.proved += int((proved[label] & rivals).sum())
        tally.by_bounds += int((plain[label] & rivals).sum())
        tally.false += int((proved[label] & ~truth & rivals).sum())
        box = [(end[0][0], end[1][0]) for end in (stored, hidden)]
        found = check_margin.excluded(graph, box[0], box[1], label)
        expected = tuple(np.flatnonzero(proved[label] & rivals).tolist())
        tally.differences += int(found != expected)
        holds = check_margin.holds(graph, box[0], box[1], label)
        tally.differences += int(holds != (len(expected) == classes - 1))


def tally_of(options: Options, seeds: range, radius: int = 12) -> Tally:
    tally = Tally()
    for seed in seeds:
        graph = last_layer_graph(np.random.default_rng(seed), options)
        validate(graph)
        compare(graph, seed, tally, 1 + seed % radius)
    assert tally.false == 0, f"{tally.false} false proofs"
    assert tally.differences == 0, "checker and certifier differ"
    return tally


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("dtype", [DType.INT8, *WIDE], ids=lambda d: d.value)
def test_every_input_of_a_box(dtype: DType, special: str, per_channel: bool) -> None:
    """Saturation, equal logits, ties, zero weights, far multipliers: nothing false is proved."""
    options = Options(dtype=dtype, special=special, per_channel=per_channel)
    tally = tally_of(options, range(10))
    assert tally.proved <= tally.true
    assert tally.pairs == 10 * 12
    if not per_channel:
        # Equal rows with other biases: that two inputs give few different sums is not used.
        assert tally.share > (0.75 if special == "ties" else 0.97), (
            f"{tally.proved} of {tally.true}"
        )


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_rounding(form: str, rounding: Rounding) -> None:
    tally = Tally()
    for per_channel in (False, True):
        options = Options(form=form, rounding=rounding, per_channel=per_channel, inputs=3)
        found = tally_of(options, range(12), radius=5)
        tally.proved += found.proved
        tally.by_bounds += found.by_bounds
    assert tally.proved > 0
    if form != "softmax":
        assert tally.proved > tally.by_bounds, "margins add nothing: suspicious"


@pytest.mark.parametrize("dtype", WIDE, ids=lambda d: d.value)
@pytest.mark.parametrize("rounding", Rounding)
def test_every_rounding_of_wide_logits(dtype: DType, rounding: Rounding) -> None:
    for form in ("fully-connected", "pointwise", "reshaped"):
        options = Options(dtype=dtype, form=form, rounding=rounding, per_channel=True)
        assert tally_of(options, range(8)).proved > 0


def accumulators(
    rng: np.random.Generator, layer: margin.LastLayer, channel: int, span: int
) -> tuple[int, int]:
    """Bounds of ``span`` accumulators: anywhere, or around a clamp."""
    start = int(rng.integers(-2 * span, 2 * span))
    if rng.random() < 0.5:
        level = rng.choice(layer.staircases.limits, 1)
        ends = np.array(-(1 << 26)), np.array(1 << 26)
        start = int(layer.staircases.least(level, np.array(channel), *ends)[0])
        start = int(np.clip(start - int(rng.integers(0, span)), -(1 << 26), 1 << 26))
    return start, start + int(rng.integers(0, span))


def true_margin(
    layer: margin.LastLayer, label: int, rival: int, gap: int, own: tuple, other: tuple
) -> int | None:
    """The needed margin from every pair of accumulators; None where no pair breaks the claim."""
    a = np.arange(own[0], own[1] + 1)[:, None]
    b = np.arange(other[0], other[1] + 1)[None, :]
    stored = layer.staircases.stored
    broken = stored(a, np.array(label)) < gap + stored(b, np.array(rival))
    values = np.broadcast_to(layer.parts[label] * a - layer.parts[rival] * b, broken.shape)
    return int(values[broken].max()) + 1 if broken.any() else None


def check_pair(
    graph: Graph,
    layer: margin.LastLayer,
    pair: tuple[int, int, int],
    own: tuple[int, int],
    other: tuple[int, int],
) -> tuple[int, int, int | None]:
    """The least margin that proves a pair: by enumeration, by ``proved``, by ``needed_margin``.

    On the way, certifier and checker are compared around each of them.
    """
    label, rival, gap = pair
    least = int(layer.parts[label]) * own[0] - int(layer.parts[rival]) * other[1]
    most = int(layer.parts[label]) * own[1] - int(layer.parts[rival]) * other[0]
    truth = true_margin(layer, label, rival, gap, own, other)
    truth = least if truth is None else max(truth, least)

    def by_certifier(value: int) -> bool:
        return margin.proved(layer, label, rival, gap, value, own, other)

    assert by_certifier(most + 1), "no pair of accumulators has such a margin"
    found = margin.needed_margin(layer, label, rival, gap, own, other)
    low, high = (least, most + 1) if found is None else (found, found)
    while low < high:
        middle = (low + high) >> 1
        low, high = (low, middle) if by_certifier(middle) else (middle + 1, high)
    op = linear(graph)
    assert check_margin.needed_margin(graph, op, label, rival, gap, own, other) == found
    ends = np.array([own[1], other[1]]), np.array([label, rival])
    own_most, rival_most = layer.staircases.stored(*ends).tolist()
    assert found == (low if own_most >= rival_most + gap else None)
    for value in {least - 5, least, truth - 1, truth, low - 1, low, low + 1, most, most + 1}:
        expected = max(value, least) >= low
        assert by_certifier(value) == expected
        assert check_margin.proved(graph, op, label, rival, gap, value, own, other) == expected
    return truth, low, found


@pytest.mark.parametrize("special", SPECIALS)
def test_needed_margin_of_int8_logits_is_exact(special: str) -> None:
    found_none = 0
    for seed in range(16):
        rng = np.random.default_rng(seed)
        options = Options(special=special, per_channel=seed % 2 == 0)
        graph = last_layer_graph(rng, options)
        layer = margin.last_layer(graph)
        assert layer is not None
        label, rival = rng.permutation(options.classes)[:2].tolist()
        own = accumulators(rng, layer, label, 600)
        other = accumulators(rng, layer, rival, 600)
        for gap in (0, 1, 3, decision.NEVER):
            truth, proved, needed = check_pair(graph, layer, (label, rival, gap), own, other)
            assert proved == truth
            found_none += needed is None
    assert found_none, "no label was behind: suspicious"


@pytest.mark.parametrize("dtype", WIDE, ids=lambda d: d.value)
@pytest.mark.parametrize("rounding", Rounding)
def test_needed_margin_of_wide_logits_loses_a_step_at_most(
    dtype: DType, rounding: Rounding
) -> None:
    lined = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        special = str(rng.choice(["", "far-multipliers", "almost-one", "ties", "narrow-clamp"]))
        options = Options(
            dtype=dtype, special=special, rounding=rounding, per_channel=seed % 2 == 0
        )
        graph = last_layer_graph(rng, options)
        layer = margin.last_layer(graph)
        assert layer is not None
        label, rival = rng.permutation(options.classes)[:2].tolist()
        own = accumulators(rng, layer, label, 700)
        other = accumulators(rng, layer, rival, 700)
        for gap in (0, 1):
            truth, proved, _ = check_pair(graph, layer, (label, rival, gap), own, other)
            assert truth <= proved <= truth + _step(layer, label, own)
            lined += proved != truth
    assert lined, "the lines were never used: suspicious"


def _step(layer: margin.LastLayer, label: int, bounds: tuple[int, int]) -> int:
    """One step of the logit in units of the margin; binary32 counts what it cannot hold twice."""
    steps, part = Fraction(1), int(layer.parts[label])
    if layer.staircases.parameters.rounding[label] == Rounding.FLOAT32:
        largest = max(abs(end) for end in bounds)
        steps += 3 * (layer.staircases.error(label, largest) - Fraction(1, 2))
    return int(steps * part / layer.staircases.factor(label)) + part


def test_lines_hold_over_the_whole_range_of_accumulators() -> None:
    """What the argument between the clamps rests on: the deviation from the real factor."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        options = Options(dtype=DType.INT32, rounding=Rounding(seed % 5), per_channel=True)
        layer = margin.last_layer(last_layer_graph(rng, options))
        assert layer is not None
        steps = replace(layer.staircases, limits=(-(1 << 40), 1 << 40), zero_point=0)
        points = [*range(-40, 41), 1 - (1 << 27), (1 << 27) - 1]
        points += rng.integers(-(1 << 27), 1 << 27, 400).tolist()
        rounded = steps.stored(np.array(points, np.int64), np.array(0)).tolist()
        for point, value in zip(points, rounded, strict=True):
            away = abs(value - steps.factor(0) * point)
            assert away <= steps.error(0, abs(point)) <= steps.error(0, 1 << 27)


def identity_graph(
    weights: np.ndarray, bias: np.ndarray, dtype: DType = DType.INT32, shift: int = 30
) -> Graph:
    """Raw accumulators as logits, behind nothing."""
    classes, inputs = weights.shape
    tensors = (
        Tensor("input", (1, inputs), DType.INT8, Quantization.of(2.0**-4, -128)),
        Tensor("logits", (1, classes), dtype),
    )
    layer = FullyConnected(
        name="logits",
        inputs=(0,),
        output=1,
        weights=Weights(weights, 6),
        bias=bias.astype(np.int32),
        requantization=Requantization.uniform(Rounding.SINGLE, 1 << shift, shift, classes),
    )
    return Graph(tensors, (layer,), 0, 1)


@pytest.mark.parametrize("shift", [1, 7, 30])
def test_raw_accumulators_are_logits(shift: int) -> None:
    rng = np.random.default_rng(shift)
    graph = identity_graph(rng.integers(-31, 32, (10, 64)), rng.integers(-9000, 9000, 10))
    validate(graph)
    x = rng.integers(-128, 128, (9, 64))
    layer = linear(graph)
    expected = (x + 128) @ layer.weights.values.astype(np.int64).T + layer.bias
    np.testing.assert_array_equal(execute(graph, x), expected)
    session = Session(graph)
    for batch in (x, x[:1]):
        logits = session.run(batch)
        assert logits.dtype == np.int32
        np.testing.assert_array_equal(logits, expected[: len(batch)])


def test_margins_of_raw_accumulators_are_exact() -> None:
    """No rounding is left: the needed margin is the gap, and every true pair is proved."""
    tally = Tally()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        weights = rng.integers(-31, 32, (4, 3))
        if seed % 3 == 0:
            weights[1:] = weights[0]
        graph = identity_graph(weights, rng.integers(-40, 41, 4))
        compare(graph, seed, tally, 6)
        layer = margin.last_layer(graph)
        assert layer is not None
        for gap in (0, 1):
            own, other = (-5000, 4000), (-4500, 3900)
            assert margin.needed_margin(layer, 0, 1, gap, own, other) == gap
            assert check_pair(graph, layer, (0, 1, gap), (-300, 90), (-120, 80)) == (gap,) * 3
    assert (tally.false, tally.differences) == (0, 0)
    assert tally.proved == tally.true > tally.by_bounds


def hidden_graph(dtype: DType, seed: int, inputs: int, hidden: int, classes: int) -> Graph:
    """A network as researchers have them: 6-bit weights, ReLU, argmax over raw integer logits."""
    rng = np.random.default_rng(seed)
    tensors = (
        Tensor("input", (1, inputs), DType.UINT8),
        Tensor("hidden", (1, hidden), DType.INT8, Quantization.of(2.0**-4, -128)),
        Tensor("logits", (1, classes), dtype),
    )
    first = FullyConnected(
        name="hidden",
        inputs=(0,),
        output=1,
        weights=Weights(rng.integers(-31, 32, (hidden, inputs)), 6),
        bias=rng.integers(-500, 500, hidden).astype(np.int32),
        requantization=Requantization.uniform(Rounding.SINGLE, 11, 6 + inputs // 40, hidden),
    )
    second = FullyConnected(
        name="logits",
        inputs=(1,),
        output=2,
        weights=Weights(rng.integers(-31, 32, (classes, hidden)), 6),
        bias=rng.integers(-500, 500, classes).astype(np.int32),
        requantization=Requantization.uniform(Rounding.SINGLE, 2, 1, classes),
    )
    return Graph(tensors, (first, second), 0, 2)


@pytest.mark.parametrize("dtype", WIDE, ids=lambda d: d.value)
def test_a_researchers_network_end_to_end(dtype: DType) -> None:
    """784-64-10: executed, run, doubled and certified; verdicts agree with margins by hand."""
    graph = hidden_graph(dtype, 3, 784, 64, 10)
    if dtype is DType.INT16:
        last = replace(linear(graph), requantization=_scaled(10))
        graph = replace(graph, operators=(graph.operators[0], last))
    validate(graph)
    x = np.random.default_rng(4).integers(0, 256, (40, 784))
    expected = execute(graph, x)
    session = Session(graph, tensors=[1, 2])
    np.testing.assert_array_equal(session.run(x), expected)
    both = session.run_tensors(x)
    assert set(both) == {1, 2} and both[1].dtype == np.int8
    np.testing.assert_array_equal(both[1], execute_all(graph, x)[1])
    doubled = twin(graph)
    low, high = np.maximum(x - 1, 0), np.minimum(x + 1, 255)
    stacked = doubled.stack(low, high)
    np.testing.assert_array_equal(
        Session(doubled.graph).run(stacked), execute(doubled.graph, stacked)
    )
    certifier = Certifier(graph)
    labels = decision.predict(expected)
    found = certifier.verdicts(0, x, low, high, labels)
    assert {sample.verdict for sample in found} <= {"certified", "unknown"}
    assert sum(sample.verdict == "certified" for sample in found) > 5
    wrong = certifier.verdicts(0, x, x, x, (labels + 1) % 10)
    assert {sample.verdict for sample in wrong} == {"refuted"}
    same = certifier.verdicts(0, x, x, x, labels)
    assert {sample.verdict for sample in same} == {"certified"}


def _scaled(classes: int) -> Requantization:
    return Requantization.uniform(Rounding.DOUBLE_HALF_UP, 1 << 30, 3, classes)


def test_wide_logits_by_every_point_behind_a_hidden_layer() -> None:
    certified = 0
    for seed in range(40):
        graph = hidden_graph(DType.INT32, seed, 2, 5, 3)
        rng = np.random.default_rng(seed)
        lower, upper = random_box(rng, graph, 9)
        points = enumerate_box(lower, upper)
        logits = execute(graph, points)
        middle = ((lower + upper) >> 1)[None]
        label = decision.predict(execute(graph, middle))
        certifier = Certifier(graph)
        ((low, high),) = certifier.bounds(lower[None], upper[None])
        assert (low <= logits).all() and (logits <= high).all()
        (sample,) = certifier.verdicts(0, middle, lower[None], upper[None], label)
        truth = not decision.surely_wrong(graph, logits, np.full(len(points), label[0])).any()
        assert truth or sample.verdict != "certified"
        certified += sample.verdict == "certified"
    assert certified > 5


def test_no_level_by_level_work_for_wide_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """However far apart the bounds are, few levels are visited."""
    visited: list[int] = []
    original = Staircases.least

    def counted(self: Staircases, levels: Int64Array, *others: Int64Array) -> Int64Array:
        visited.append(levels.size)
        return original(self, levels, *others)

    monkeypatch.setattr(Staircases, "least", counted)
    graph = identity_graph(np.ones((2, 2), np.int64), np.zeros(2))
    layer = margin.last_layer(graph)
    assert layer is not None and layer.thresholds is None
    wide, less = (-(1 << 26), 1 << 26), (-(1 << 26), (1 << 26) - 1)
    assert margin.needed_margin(layer, 1, 0, 1, wide, less) == 1
    assert sum(visited) <= 8 + 2 * margin_wide.FEW
    assert check_margin.needed_margin(graph, linear(graph), 1, 0, 1, wide, less) == 1


def test_where_both_logits_saturate_only_keeping_the_rival_from_the_clamp_will_do() -> None:
    """With a gap of 1 no margin between two saturated logits is enough."""
    weights = np.array([[1, 0], [0, 1]])
    options = Options(classes=2)
    graph = last_layer_graph(np.random.default_rng(0), options)
    layer = replace(
        linear(graph),
        weights=Weights(weights),
        bias=np.zeros(2, np.int32),
        requantization=Requantization.uniform(Rounding.SINGLE, 1, 1, 2),
    )
    target = replace(graph.tensors[1], quantization=Quantization.of(0.125, 0))
    graph = replace(graph, operators=(layer,), tensors=(graph.tensors[0], target))
    found = margin.last_layer(graph)
    assert found is not None
    # Both reach 127 from 253 on; q = (a + 1) >> 1.
    assert margin.needed_margin(found, 1, 0, 1, (0, 400), (0, 400)) is None
    assert margin.needed_margin(found, 0, 1, 0, (0, 400), (0, 400)) == 0
    assert margin.needed_margin(found, 1, 0, 1, (0, 400), (0, 252)) == 2
    assert 400 - 253 + 1 == 148, "a margin that puts the rival below 253"
    assert not margin.proved(found, 1, 0, 1, 147, (0, 400), (0, 400))
    assert margin.proved(found, 1, 0, 1, 148, (0, 400), (0, 400))


# ---------------------------------------------------------------------- what is refused
def wide_tensor(graph: Graph, index: int, dtype: DType) -> Graph:
    tensors = list(graph.tensors)
    tensors[index] = replace(tensors[index], dtype=dtype)
    return replace(graph, tensors=tuple(tensors))


def test_wide_tensors_inside_the_network_are_refused() -> None:
    graph = hidden_graph(DType.INT32, 0, 4, 4, 3)
    with pytest.raises(InvalidGraphError, match="Int16 activations have zero point 0"):
        validate(wide_tensor(graph, 1, DType.INT16))
    with pytest.raises(InvalidGraphError, match="No accumulator can reach"):
        validate(wide_tensor(graph, 1, DType.INT32))
    with pytest.raises(InvalidGraphError, match="'input' is int32; the input must be int8"):
        validate(wide_tensor(graph, 0, DType.INT32))


def test_wide_logits_need_multipliers() -> None:
    graph = hidden_graph(DType.INT32, 0, 4, 4, 3)
    last = replace(linear(graph), requantization=None)
    with pytest.raises(InvalidGraphError, match="no multipliers"):
        validate(replace(graph, operators=(graph.operators[0], last)))


def test_factor_one_is_for_wide_logits_alone() -> None:
    graph = identity_graph(np.ones((2, 2), np.int64), np.zeros(2))
    with pytest.raises(InvalidGraphError, match="channel 0"):
        validate(wide_tensor(graph, 1, DType.INT8))
    layer = linear(graph)
    above = Requantization.uniform(Rounding.SINGLE, 3, 1, 2)
    with pytest.raises(InvalidGraphError, match="channel 0"):
        validate(replace(graph, operators=(replace(layer, requantization=above),)))


def test_wide_logits_are_not_written() -> None:
    graph = last_layer_graph(np.random.default_rng(1), Options(dtype=DType.INT16))
    with pytest.raises(UnsupportedModelError, match="int16 logits are for graphs built by hand"):
        write_tflite(graph)
    with pytest.raises(InvalidGraphError, match="is int16; generated C stores single bytes"):
        generate(graph)
