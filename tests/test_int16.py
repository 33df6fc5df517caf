"""Int16 activations with int8 weights: read, run as every runtime runs them, bounded, certified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge import check_bounds, constraints, profiles, scales, semantics, universal
from cactus_edge.certify import Request, margin
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.faults import covering
from cactus_edge.certify.intervals import IntervalSession
from cactus_edge.certify.linear.network import network
from cactus_edge.certify.twin_model import twin_model
from cactus_edge.check_linear import LinearChecker
from cactus_edge.csource import generate
from cactus_edge.datasets import Dataset
from cactus_edge.errors import CactusEdgeError, InvalidGraphError, UnsupportedModelError, UsageError
from cactus_edge.execute import execute, execute_all
from cactus_edge.fault_report import FaultModel
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.graph import Graph, Int64Array, Linear
from cactus_edge.inputs import Perturbation
from cactus_edge.runtime import Session
from cactus_edge.validate import Peer, peers, prefix
from cactus_edge.validate.child import Worker
from tests.certificates import certified, checked, encoded
from tests.foreign_file import INPUT
from tests.foreign_int16 import FAMILY, Wide, made

RUNTIMES = tuple(peer for peer in peers() if peer.extra == "runtimes")
COVERED = "tflite-micro", "tflite-x86", "litert-x86"


def graph_of(name: str, seed: int = 0) -> Graph:
    return read_tflite(made(name, seed), name)


def drawn(graph: Graph, count: int, seed: int = 0) -> Int64Array:
    tensor = graph.tensors[graph.core_input]
    lowest, highest = tensor.dtype.range
    rng = np.random.default_rng(seed)
    return rng.integers(lowest, highest + 1, (count, *tensor.shape[1:]))


class Bytes(Worker):
    """A runtime that is given the files themselves, which hold what our writer never writes."""

    def __init__(self, peer: Peer, files: Mapping[int, bytes]) -> None:
        super().__init__(peer.module, peer.mode)
        self._files = files

    def _bytes(self, graph: Graph) -> bytes:
        return self._files.get(id(graph)) or super()._bytes(graph)


def compared(peer: Peer, seed: int, samples: int, layers: int) -> Iterator[tuple[str, int, int]]:
    """(model, elements, mismatches): files whole, and up to each layer as we write them."""
    files: dict[int, bytes] = {}
    parts: list[tuple[str, Graph, Int64Array]] = []
    for name in FAMILY:
        graph = graph_of(name, seed)
        if peer.profile in profiles.uncovered(graph):
            continue
        if (graph.input, graph.output) == (graph.core_input, graph.logits):
            files[id(graph)] = made(name, seed)
        inputs = drawn(graph, samples, seed)
        parts.append((name, graph, inputs))
        cut = [prefix(graph, index) for index in range(len(graph.core))] if layers else []
        parts += [(name, part, inputs[:layers]) for part in cut]
    outputs = Bytes(peer, files).run([(part, inputs) for _, part, inputs in parts])
    for (name, part, inputs), output in zip(parts, outputs, strict=True):
        wanted = execute(part, inputs, peer.profile)
        yield name, wanted.size, int((output.reshape(wanted.shape) != wanted).sum())


@pytest.mark.parametrize("peer", RUNTIMES, ids=lambda peer: peer.name)
def test_every_runtime_computes_every_layer(peer: Peer) -> None:
    if peer.absence:
        pytest.skip(peer.absence)
    found = list(compared(peer, 0, 8, 3))
    assert [(name, wrong) for name, _, wrong in found if wrong] == []
    refused = set() if profiles.PROFILES[peer.profile].widens else {"int8_in_between"}
    refused |= {"residual_sums"} if peer.profile in ("litert-x86", "litert-xnnpack-x86") else set()
    assert set(FAMILY) - {name for name, _, _ in found} == refused


@pytest.mark.parametrize("name", FAMILY)
def test_written_again_it_is_the_same_graph(name: str) -> None:
    graph = graph_of(name)
    assert graph.computes_int16
    assert read_tflite(write_tflite(graph)).fingerprint() == graph.fingerprint()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("profile", ["tflite-micro", "litert-x86"])
def test_bounds_are_the_checkers_and_hold(name: str, profile: str) -> None:
    if profile in profiles.uncovered(graph_of(name)):
        profile = "litert-reference"
    graph = profiles.resolve(graph_of(name), profile)
    constraints.validate(graph)
    stored = drawn(graph, 4)
    limits = graph.tensors[graph.core_input].dtype.range
    rng = np.random.default_rng(1)
    distance = rng.integers(0, 400, (2, *stored.shape))
    lower, upper = (np.clip(stored + d, *limits) for d in (-distance[0], distance[1]))
    tensors = [graph.core_input, *(op.output for op in graph.core)]
    bounds = IntervalSession(graph, tensors=tensors).run(lower, upper)
    inside = execute_all(graph, rng.integers(lower, upper + 1))
    found = Session(graph, tensors=tensors[1:]).run_tensors(stored)
    values = execute_all(graph, stored)
    boxes = {graph.core_input: (lower, upper)}
    for op in graph.core:
        boxes[op.output] = check_bounds.propagate(graph, op, [boxes[i] for i in op.inputs])
        low, high = (end.reshape(4, -1) for end in boxes[op.output])
        assert np.array_equal(bounds[op.output][0], low), op.kind
        assert np.array_equal(bounds[op.output][1], high), op.kind
        assert np.array_equal(found[op.output], values[op.output])
        for point in (values, inside):
            flat = point[op.output].reshape(4, -1)
            assert ((low <= flat) & (flat <= high)).all(), op.kind


# ---------------------------------------------------------------------- arithmetic
_FACTOR = st.integers(1 << 30, (1 << 31) - 1), st.integers(0, 30)


@given(*_FACTOR, st.integers(1 - (1 << 35), (1 << 35) - 1))
def test_a_reduced_multiplier_rounds_once(multiplier: int, shift: int, accumulator: int) -> None:
    """As TFLite's ``MultiplyByQuantizedMultiplier`` of int64 says, in its own words."""
    real = scales.Binary(multiplier, -31 - shift)
    factor, places = scales.reduced_parameters(real)
    reduced = (multiplier + (1 << 15)) >> 16 if multiplier < 0x7FFF0000 else 0x7FFF
    total_shift = 15 + shift
    wanted = (accumulator * reduced + (1 << (total_shift - 1))) >> total_shift
    assert semantics.requantize_single(accumulator, factor, places) == wanted
    assert abs(accumulator * factor) < 1 << 62  # fits int64 with room
    array = np.array([accumulator], np.int64)
    assert semantics.requantize_single(array, factor, places)[0] == wanted  # pyright: ignore


@given(st.integers(1 << 52, (1 << 53) - 1), st.integers(53, 84), st.integers(0, (1 << 35) - 1))
@settings(max_examples=120)
def test_the_float64_rounding_holds_for_wide_accumulators(
    multiplier: int, shift: int, accumulator: int
) -> None:
    """In int64 the same as in IEEE arithmetic, which a product of two doubles is."""
    value = float(accumulator) * float(multiplier) * 2.0**-shift
    wanted = int(np.floor(value)) + int(value - np.floor(value) >= 0.5)
    signs = np.array([accumulator, -accumulator], np.int64)
    found = semantics.requantize_float64(signs, multiplier, shift)  # pyright: ignore
    assert found.tolist() == [wanted, -wanted]  # pyright: ignore


def test_roundings_differ_where_they_should() -> None:
    """A comparison with runtimes that cannot tell them apart would show nothing."""
    graph = graph_of("product_of_scales")
    stored = drawn(graph, 50)
    outputs = [execute(graph, stored, name) for name in COVERED]
    assert all((a != b).any() for a, b in zip(outputs, outputs[1:], strict=False))
    assert not universal.is_universal(graph)
    assert universal.is_universal(graph_of("convolutions"))


def test_accumulators_are_proved_to_fit() -> None:
    graph = graph_of("dense_layers")
    op = graph.core[0]
    assert isinstance(op, Linear)
    for bias, fits in ((1 << 34, True), (1 << 35, False)):
        changed = replace(op, bias=np.full(op.channels, bias))
        whole = replace(graph, operators=(changed, *graph.operators[1:]))
        if fits:
            constraints.validate(whole)
        else:
            with pytest.raises(InvalidGraphError, match="none can reach 2\\^35"):
                constraints.validate(whole)


# ---------------------------------------------------------------------- certificates
@pytest.mark.parametrize("name", ["classifier", "residual_sums", "int8_in_between", "to_int8"])
def test_certificates_are_made_and_checked(name: str) -> None:
    model = made(name)
    graph = read_tflite(model)
    classes = graph.tensors[graph.logits].size
    rng = np.random.default_rng(4)
    images = rng.random((5, *INPUT[1:]), dtype=np.float32)
    data = Dataset("made-up", images, np.zeros(5, np.int64), classes, "test", "5e" * 32)
    first = certified(model, Request(data, Perturbation.levels(0)))
    labels = np.array([sample.prediction for sample in first.samples])
    data = replace(data, labels=labels)
    verdicts: set[str] = set()
    for levels in (1, 255):
        request = Request(
            data,
            Perturbation.levels(levels),
            attack=Settings(steps=4, hops=4, restarts=0),
            method="complete",
            budget=1,
        )
        claim = certified(model, request)
        verdicts |= {sample.verdict for sample in claim.samples}
        assert {sample.verdict for sample in claim.samples} <= {"certified", "refuted", "unknown"}
        assert checked(encoded(claim.head, claim.samples), model, data).problems == ()
        [bounds, *others] = claim.samples[0].bounds
        moved = msgspec.structs.replace(bounds, lower=(bounds.lower[0] + 1, *bounds.lower[1:]))
        forged = msgspec.structs.replace(claim.samples[0], bounds=(moved, *others))
        lines = encoded(claim.head, (forged, *claim.samples[1:]))
        assert checked(lines, model, data).problems != ()
    assert "certified" in verdicts


def test_a_margin_behind_int16_reaches_beyond_the_table() -> None:
    """A range of few levels, with accumulators far above those of int8 activations."""
    graph = profiles.resolve(graph_of("dense_layers"), "tflite-micro")
    op = graph.core[-1]
    assert isinstance(op, Linear)
    last = replace(op, clamp=(-50, 50), bias=op.bias + (1 << 30))
    narrow = replace(graph, operators=(*graph.operators[:-1], last))
    layer = margin.last_layer(narrow)
    assert layer is not None and layer.thresholds is None
    size = layer.weights.shape[1]
    ends = np.zeros((1, size), np.int64)
    _, proved = margin.wins(layer, ends, ends, np.array([0]), np.zeros((1, 10), np.int64))
    logits = execute(narrow, np.zeros((1, 40), np.int64))
    assert proved.all() and (logits == 50).all()  # every logit saturates: equal, never behind
    gaps = np.ones((1, 10), np.int64)
    _, proved = margin.wins(layer, ends, ends, np.array([0]), gaps)
    assert not proved[0, 1:].any()


# ---------------------------------------------------------------------- refusals
def _pot(file: Wide) -> int:
    first = file.conv(file.input())
    return file.added(first, file.conv(first), pot=1)


def _zero(file: Wide) -> int:
    return file.conv(file.input(scale=(1e-4, 3)))


def _no_bias(file: Wide) -> int:
    return file.conv(file.input(), bias=False)


def _narrow_bias(file: Wide) -> int:
    return file.conv(file.input(), bias_type="INT32")  # pyright: ignore


def _logistic(file: Wide) -> int:
    return file.unary("LOGISTIC", file.conv(file.input()), (1 / 32768, 0))


def _softmax(file: Wide) -> int:
    logits = file.dense(file.input())
    return file.op("SOFTMAX", [logits], (1, 10), (1 / 32768, 0), {"beta": 0x3F800000})


def _product(file: Wide) -> int:
    found = file.conv(file.input())
    return file.combined("MUL", found, found)


def _mean(file: Wide) -> int:
    source = file.conv(file.input())
    axes = file.list_of(1, 2)
    return file.op("MEAN", [source, axes], (1, 1, 1, 8), file.scale(), {"keep_dims": 1})


def _byte(file: Wide) -> int:
    source = file.input(scale=(1 / 255, 0), kind="UINT8")
    return file.conv(file.op("QUANTIZE", [source], INPUT, (1e-4, 0)))


REFUSED: list[tuple[Callable[[Wide], int], str]] = [
    (_pot, "pot_scale_int16"),
    (_zero, "Int16 activations have zero point 0"),
    (_no_bias, "without a bias.*write int64 zeros"),
    (_narrow_bias, "the bias is INT32; only INT64"),
    (_logistic, "LOGISTIC"),
    (_softmax, "SOFTMAX.*int8 logits"),
    (_product, "MUL"),
    (_mean, "MEAN"),
    (_byte, "QUANTIZE of"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[b.__name__ for b, _ in REFUSED])
def test_what_is_not_described_is_refused(build: Callable[[Wide], int], message: str) -> None:
    file = Wide(np.random.default_rng(0))
    data = file.bytes(build(file))
    with pytest.raises(CactusEdgeError, match=message) as caught:
        read_tflite(data, "file.tflite")
    assert "file.tflite" in str(caught.value) and caught.value.exit_code == 3


def test_what_has_no_form_for_int16_declines_by_name() -> None:
    graph = graph_of("classifier")
    with pytest.raises(UnsupportedModelError, match="linear bounds"):
        network(profiles.resolve(graph))
    with pytest.raises(UnsupportedModelError, match="faults are not certified"):
        covering(graph, FaultModel(layers=(0,), bits=(0,)), None)
    with pytest.raises(InvalidGraphError, match="is int16; generated C"):
        generate(graph)
    with pytest.raises(UsageError, match="reference executor"):
        Session(graph).explain()
    checker = LinearChecker(profiles.resolve(graph))
    point = np.zeros(INPUT[1:], np.int64)
    assert "int16" in checker.excluded((point, point), 0, 1, ())
    reasons = profiles.uncovered(graph)
    assert set(reasons) == set(profiles.PROFILES) - {
        name for name, profile in profiles.PROFILES.items() if profile.int16
    }
    assert all("int16 activations was not measured" in reason for reason in reasons.values())


def test_the_twin_of_int16_computes_the_bounds() -> None:
    graph = graph_of("equal_sums")
    made_twin = twin_model(graph)
    assert set(COVERED) <= set(made_twin.profiles)
    stored = drawn(graph, 3)
    lower, upper = np.maximum(stored - 90, -32768), np.minimum(stored + 90, 32767)
    for name in COVERED:
        outputs = execute(made_twin.twin.graph, made_twin.twin.stack(lower, upper), name)
        found = made_twin.twin.split(graph.logits, outputs)
        wanted = IntervalSession(profiles.resolve(graph, name)).run(lower, upper)[graph.logits]
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
