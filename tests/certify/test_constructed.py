"""What real arithmetic calls robust, the device gets wrong, and nobody here may certify."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from cactus_edge import certificate, check_bounds, check_margin, decision, profiles, scales
from cactus_edge.certificate import Head, Method, Sample
from cactus_edge.certify import Certifier, Request, Settings
from cactus_edge.certify.decide import Effort
from cactus_edge.certify.engine import cover
from cactus_edge.certify.linear.search import Budget
from cactus_edge.datasets import Dataset
from cactus_edge.execute import accumulate, execute
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.graph import Activation, Add, Graph, Int64Array, Linear, Operator
from cactus_edge.inputs import Perturbation
from cactus_edge.proofs import Leaf, Proof
from cactus_edge.validate.child import Worker
from cactus_edge.validate.runtimes import Peer, peers
from tests.certificates import certified, checked, encoded
from tests.certify.constructed import CASES, HALF_EVEN, ZERO, Case
from tests.graphs import enumerate_box

Fractions = npt.NDArray[np.object_]
STOCK = [peer for peer in peers() if peer.package and peer.module not in ("ziglang", "unicorn")]
REAL = {  # the least lead of the label over the box, in steps of the stored logits
    "rounding": Fraction(30),
    "saturation": Fraction(200),
    "profile": Fraction(1, 2),
    "residual": Fraction(35, 4),
    "softmax": Fraction(1),
    "clamp_above": Fraction(5),
    "clamp_at_zero_point": Fraction(10),
    "last_label": Fraction(1, 4),
}


@pytest.fixture(params=CASES, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def dataset(case: Case) -> Dataset:
    """The centre as a float sample, exactly."""
    images = ((case.centre - ZERO) / 256).astype(np.float32)[None]
    classes = case.graph.tensors[case.graph.logits].size
    return Dataset("constructed", images, np.array([case.label]), classes, "test", "c0" * 32)


def verdict(
    case: Case, names: list[str] | None, settings: Settings | None, method: Method = "interval"
) -> Sample:
    boxes = (case.centre[None], case.lower[None], case.upper[None], np.array([case.label]))
    effort = Effort(method, Budget(seconds=20))
    return Certifier(case.graph, names, effort).verdicts(0, *boxes, settings)[0]


# ---------------------------------------------------------------- real arithmetic, in fractions
@dataclass(frozen=True, eq=False)
class Lines:
    """Linear bounds of some values in the network's inputs, with a constant as last column."""

    lower: Fractions
    upper: Fractions


def _scale(bits: int) -> Fraction:
    return scales.decode_float32(bits).fraction()


def _tensor_scale(graph: Graph, tensor: int) -> Fraction:
    quantization = graph.tensors[tensor].quantization
    assert quantization is not None
    return _scale(quantization.scale_bits)


def _least(lines: Fractions, ends: Fractions) -> Fractions:
    """Exact minimum of each line over the box; ``ends`` are (lower, upper) with a 1 behind."""
    return np.minimum(lines * ends[0], lines * ends[1]).sum(axis=1)


def _affine(lines: Lines, weights: Fractions, bias: Fractions) -> Lines:
    positive, negative = np.maximum(weights, 0), np.minimum(weights, 0)
    lower = positive @ lines.lower + negative @ lines.upper
    upper = positive @ lines.upper + negative @ lines.lower
    lower[:, -1] += bias
    upper[:, -1] += bias
    return Lines(lower, upper)


def _relu(lines: Lines, ends: Fractions) -> Lines:
    """CROWN's relaxation: exact where the sign is known, else a chord above and 0 below."""
    lower, upper = lines.lower.copy(), lines.upper.copy()
    low, high = _least(lower, ends), -_least(-upper, ends)
    for i in range(len(lower)):
        if high[i] <= 0:
            lower[i], upper[i] = 0 * lower[i], 0 * upper[i]
        elif low[i] < 0:
            lower[i] = 0 * lower[i]
            upper[i] = upper[i] * (high[i] / (high[i] - low[i]))
            upper[i, -1] -= high[i] * low[i] / (high[i] - low[i])
    return Lines(lower, upper)


def _real(graph: Graph, op: Operator, inputs: list[Lines], ends: Fractions) -> Lines:
    if isinstance(op, Add):
        return Lines(inputs[0].lower + inputs[1].lower, inputs[0].upper + inputs[1].upper)
    assert isinstance(op, Linear)
    weights, bias = _dequantized(graph, op)
    lines = _affine(inputs[0], weights, bias)
    return _relu(lines, ends) if op.activation is Activation.RELU else lines


def _dequantized(graph: Graph, op: Linear) -> tuple[Fractions, Fractions]:
    weight_scale = _scale(int(op.weights.scale_bits[0]))
    bias_scale = weight_scale * _tensor_scale(graph, op.inputs[0])
    fraction = np.frompyfunc(lambda value: Fraction(int(value)), 1, 1)
    return fraction(op.weights.values) * weight_scale, fraction(op.bias) * bias_scale


def real_margin(case: Case) -> Fraction:
    """A lower bound of the label's lead over the box in the dequantized network, in steps."""
    graph = case.graph
    scale = _tensor_scale(graph, graph.core_input)
    size = case.centre.size
    fraction = np.frompyfunc(lambda value: scale * (int(value) - ZERO), 1, 1)
    one = [Fraction(1)]
    ends = np.array([[*fraction(end), *one] for end in (case.lower, case.upper)], object)
    identity = np.array([[Fraction(int(i == j)) for j in range(size + 1)] for i in range(size)])
    values = {graph.core_input: Lines(identity, identity)}
    last = next(op for op in graph.core if op.output == graph.logits)
    for op in graph.core:
        if op is not last:
            values[op.output] = _real(graph, op, [values[i] for i in op.inputs], ends)
    assert isinstance(last, Linear)
    weights, bias = _dequantized(graph, last)
    rivals = np.arange(len(bias)) != case.label
    difference = weights[case.label] - weights[rivals]
    lead = _affine(values[last.inputs[0]], difference, bias[case.label] - bias[rivals])
    return min(_least(lead.lower, ends)) / _tensor_scale(graph, graph.logits)


def test_real_arithmetic_calls_it_robust(name: str) -> None:
    assert real_margin(CASES[name]) == REAL[name] > 0


# ---------------------------------------------------------------- what is true of the integers
def test_expected_is_the_truth_at_every_point(name: str) -> None:
    case = CASES[name]
    points = enumerate_box(case.lower, case.upper)
    labels = np.full(len(points), case.label)
    assert set(case.expected) == set(profiles.PROFILES)
    assert not profiles.uncovered(case.graph)
    for rounding, expected in case.expected.items():
        logits = execute(case.graph, points, rounding)
        gaps = decision.gaps(case.graph, case.label, logits.shape[1])
        right = (logits[:, case.label][:, None] >= logits + gaps).all()
        wrong = decision.surely_wrong(case.graph, logits, labels).any()
        truth = "refuted" if wrong else "certified" if right else "unknown"
        assert truth == expected, rounding


def test_the_counterexample_lies_in_the_box_and_the_centre_is_right(name: str) -> None:
    case = CASES[name]
    point = case.counterexample
    assert ((case.lower <= point) & (point <= case.upper)).all()
    for rounding, expected in case.expected.items():
        centre, broken = execute(case.graph, np.stack([case.centre, point]), rounding)
        assert decision.predict(centre[None])[0] == case.label
        wrong = decision.surely_wrong(case.graph, broken[None], np.array([case.label]))
        assert wrong[0] == (expected == "refuted"), rounding


def test_an_accumulator_margin_of_hundreds_proves_nothing() -> None:
    case = CASES["saturation"]
    last = case.graph.core[-1]
    assert isinstance(last, Linear)
    points = enumerate_box(case.lower, case.upper)
    sums = accumulate(last, case.graph.tensors[case.graph.core_input], points)
    assert (sums[:, 1] - sums[:, 0]).min() >= 400
    assert execute(case.graph, case.counterexample[None]).tolist() == [[127, 127]]


# ---------------------------------------------------------------- certifier and checker
@pytest.mark.parametrize("method", certificate.VERIFIERS)
def test_the_certifier_says_no_more_than_the_truth(name: str, method: Method) -> None:
    case = CASES[name]
    for rounding, expected in case.expected.items():
        assert verdict(case, [rounding], Settings(), method).verdict == expected, rounding
        found = verdict(case, [rounding], None, method).verdict
        # Without an attack only a complete search may come upon a counterexample.
        assert found == expected or (expected, found) == ("refuted", "unknown"), rounding
    together = verdict(case, None, Settings(), method)
    assert together.verdict == ("unknown" if name == "softmax" else "refuted")


def claimed(case: Case, method: Method, names: tuple[str, ...] | None) -> tuple[Head, Sample]:
    """Head and only sample of the case's true certificate, which the checker agrees with."""
    model, data = write_tflite(case.graph), dataset(case)
    perturbation = Perturbation.levels(case.radius)
    request = Request(
        data, perturbation, profiles=names, attack=Settings(), method=method, budget=20
    )
    claim = certified(model, request)
    assert checked(encoded(claim.head, claim.samples), model, data).agrees
    return claim.head, claim.samples[0]


def problems(case: Case, head: Head, sample: Sample) -> tuple[str, ...]:
    """What the checker says when digest and summary were made to fit."""
    return checked(encoded(head, [sample]), write_tflite(case.graph), dataset(case)).problems


def unproved(case: Case) -> list[tuple[int, int]]:
    """(group, rival) that intervals and margins leave open."""
    box = (case.lower[None], case.upper[None])
    found: list[tuple[int, int]] = []
    for number, group in enumerate(cover(case.graph, None).groups):
        (low, high), hidden = check_bounds.logits_box(group.graph, box)
        ends = [(a[0], b[0]) for a, b in ((low, high), hidden)]
        excluded = check_margin.excluded(group.graph, *ends, case.label)
        rivals = set(range(low.shape[1])) - {case.label} - set(excluded)
        found += [(number, rival) for rival in sorted(rivals)]
    return found


@pytest.mark.parametrize("method", certificate.METHODS["certified"])
def test_the_checker_rejects_a_forged_certified(name: str, method: str) -> None:
    case = CASES[name]
    slow = method in ("linear", "complete")
    head, honest = claimed(case, "complete" if slow else "interval", None)
    assert honest.verdict != "certified"
    leaves = ("bounds", "multipliers", "points") if method == "complete" else ("multipliers",)
    for leaf in leaves if slow else ("bounds",):
        proofs = tuple(Proof(*pair, (Leaf(leaf),)) for pair in unproved(case)) if slow else ()
        forged = msgspec.structs.replace(
            honest,
            verdict="certified",
            method=method,
            counterexample="",
            profile="",
            proofs=proofs,
        )
        found = problems(case, head, forged)
        assert any("'certified' cannot be re-derived" in problem for problem in found), leaf


@pytest.mark.parametrize("rounding", HALF_EVEN)
def test_a_certificate_for_one_profile_is_none_for_another(rounding: str) -> None:
    case = CASES["profile"]
    head, sample = claimed(case, "interval", (profiles.DEFAULT,))
    assert sample.verdict == "certified"
    arithmetic = head.arithmetic[0]
    for names, count in (((rounding,), 1), ((profiles.DEFAULT, rounding), 2)):
        changed = (msgspec.structs.replace(arithmetic, profiles=names),)
        forged = msgspec.structs.replace(head, arithmetic=changed)
        widened = msgspec.structs.replace(sample, bounds=sample.bounds * count)
        found = problems(case, forged, widened)
        assert any("'certified' cannot be re-derived" in problem for problem in found), names


# ---------------------------------------------------------------- stock runtimes
class WholeFile(Worker):
    """A worker that runs the file as it ships, SOFTMAX included."""

    def _bytes(self, graph: Graph) -> bytes:
        return write_tflite(graph)


@pytest.mark.parametrize("peer", STOCK, ids=[peer.name for peer in STOCK])
def test_stock_runtimes_misclassify(peer: Peer) -> None:
    """Each runtime decides as its profile says; the points are all of the box."""
    if not peer.version:
        pytest.skip(peer.absence)
    points = {name: enumerate_box(case.lower, case.upper) for name, case in CASES.items()}
    parts: list[Any] = [(CASES[name].graph, points[name]) for name in CASES]
    outputs = dict(zip(CASES, WholeFile(peer.module, peer.mode).run(parts), strict=True))
    for name, case in CASES.items():
        wrong = decision.predict(outputs[name]) != case.label
        expected = case.expected[peer.profile]
        assert wrong.any() == (expected != "certified"), name
        if expected != "certified":
            assert wrong[_row(points[name], case.counterexample)], name
        if not case.graph.has_softmax:
            assert np.array_equal(outputs[name], execute(case.graph, points[name], peer.profile))


def _row(points: Int64Array, point: Int64Array) -> int:
    return int(np.flatnonzero((points == point).all(axis=1))[0])


def test_the_files_hold_what_was_built(name: str) -> None:
    graph = CASES[name].graph
    assert read_tflite(write_tflite(graph), name).fingerprint() == graph.fingerprint()
