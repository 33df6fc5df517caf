"""Models of another converter: read, run as every runtime runs them, bounded and certified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest

from cactus_edge import (
    check_bounds,
    constraints,
    constraints_imported,
    lookups,
    profiles,
    tables,
)
from cactus_edge.certify import Request
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.attack_network import Network, transposed
from cactus_edge.certify.attack_tables import Gradient, through_move
from cactus_edge.certify.engine import cover
from cactus_edge.certify.faults import covering
from cactus_edge.certify.intervals import IntervalSession
from cactus_edge.certify.linear.network import network
from cactus_edge.certify.twin import twin
from cactus_edge.csource import generate
from cactus_edge.datasets import Dataset
from cactus_edge.errors import (
    InvalidGraphError,
    ToolError,
    UnsupportedModelError,
)
from cactus_edge.execute import execute, execute_all
from cactus_edge.fault_report import FaultModel
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.flatbuffer.writer import model_values
from cactus_edge.flow import flow
from cactus_edge.graph import ArgMax, DType, Graph, Int64Array, Quantization, Tensor
from cactus_edge.inputs import Perturbation
from cactus_edge.kernels.place import core_tensors
from cactus_edge.operators import (
    Combination,
    Function,
    Lookup,
    Mean,
    Move,
    Pair,
    Unary,
    WithConstant,
    moved,
)
from cactus_edge.runtime import Session
from cactus_edge.scales import decode_float32
from cactus_edge.validate import Peer, peers, prefix
from cactus_edge.validate.child import Worker
from firmware_sim import run_host
from tests import stock
from tests.certificates import certified, checked, encoded
from tests.foreign import FAMILY, made
from tests.foreign_file import INPUT, File, pattern

# What some runtimes do not load or run at all.
NO_BIAS, WIDE_INDEX, SHAPED = "convolution_without_bias", "arg_max_int64", "flattened_by_its_shape"
REFUSED_BY = {"TFLite Micro": {WIDE_INDEX}, "tflite XNNPACK": {NO_BIAS, SHAPED}}
RUNTIMES = tuple(peer for peer in peers() if peer.extra == "runtimes")
# Described by neither of the profiles that are compared here, see ``profiles``.
UNDESCRIBED = {"mean", "mean_keeping_dimensions", "residual", "mul_enlarged"}


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
        super().__init__(peer.module, peer.mode, python=peer.python)
        self._files = files

    def _bytes(self, graph: Graph) -> bytes:
        return self._files.get(id(graph)) or super()._bytes(graph)


def _decides(graph: Graph) -> bool:
    return isinstance(graph.operators[-1], ArgMax)


def compared(peer: Peer, seed: int, samples: int, layers: int) -> Iterator[tuple[str, int, int]]:
    """(model, elements, mismatches): files whole, and up to each layer as we write them."""
    files: dict[int, bytes] = {}
    parts: list[tuple[Graph, Int64Array]] = []
    names: list[str] = []
    for name in FAMILY:
        graph = graph_of(name, seed)
        if name in REFUSED_BY.get(peer.name, {NO_BIAS}) or peer.profile in profiles.uncovered(
            graph
        ):
            continue
        if (graph.input, graph.output) == (graph.core_input, graph.logits) or _decides(graph):
            files[id(graph)] = made(name, seed)
        inputs = drawn(graph, samples, seed)
        cut = [prefix(graph, index) for index in range(len(graph.core))] if layers else []
        for part in (graph, *cut):
            names.append(name)
            parts.append((part, inputs if part is graph else inputs[:layers]))
    outputs = Bytes(peer, files).run(parts)
    for name, (part, inputs), output in zip(names, parts, outputs, strict=True):
        wanted = execute(part, inputs, peer.profile)
        if _decides(part):
            wanted = wanted.argmax(axis=-1)
        yield name, wanted.size, int((output.reshape(wanted.shape) != wanted).sum())


@pytest.mark.parametrize("peer", RUNTIMES, ids=lambda peer: peer.name)
def test_every_runtime_computes_every_layer(peer: Peer) -> None:
    if peer.absence:
        pytest.skip(peer.absence)
    found = list(compared(peer, 0, 6, 3))
    assert [(name, wrong) for name, _, wrong in found if wrong] == []
    seen = {name for name, _, _ in found}
    missing = set(FAMILY) - seen - REFUSED_BY.get(peer.name, {NO_BIAS}) - {"relu_n1_to_1"}
    assert missing <= UNDESCRIBED and len(seen) >= 40


def test_a_mean_is_written_as_it_was_read_with_its_dimensions_or_without() -> None:
    """Optimized kernels round the two otherwise, and one of them alone is described."""
    optimized = {"tflite-x86", "tflite-arm", "litert-x86", "litert-arm"}
    for name, keeps in (("mean", 0), ("mean_keeping_dimensions", 1)):
        graph = graph_of(name)
        (op,) = (op for op in graph.operators if isinstance(op, Mean))
        assert op.keeps == bool(keeps)
        (written,) = model_values(graph)["subgraphs"]  # type: ignore[misc]
        options = [op.get("builtin_options", (None, {}))[1] for op in written["operators"]]
        assert {"keep_dims": keeps} in options
        assert len(options) == len(graph.operators) - (not keeps)
        assert (optimized <= set(profiles.uncovered(graph))) is bool(keeps)
    graph = stock.model("gated").graph
    first = next(op for op in graph.operators if isinstance(op, Mean))  # a convolution reads it
    dropping = tuple(replace(op, keeps=False) if op is first else op for op in graph.operators)
    with pytest.raises(UnsupportedModelError, match="nothing but a RESHAPE behind it"):
        write_tflite(replace(graph, operators=dropping))


@pytest.mark.parametrize("name", FAMILY)
def test_written_again_it_is_the_same_graph(name: str) -> None:
    graph = graph_of(name)
    assert read_tflite(write_tflite(graph)).fingerprint() == graph.fingerprint()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("profile", ["tflite-reference", "tflite-xnnpack-x86"])
def test_kernels_and_bounds_equal_the_reference(name: str, profile: str) -> None:
    graph = profiles.resolve(graph_of(name), profile)
    constraints.validate(graph)
    stored = drawn(graph, 5)
    values = execute_all(graph, stored)
    tensors = core_tensors(graph)[1:]
    type_ = graph.tensors[graph.core_input].dtype
    found = Session(graph, tensors=tensors).run_tensors(stored.astype(type_.value))
    for index in tensors:
        assert np.array_equal(found[index].reshape(5, -1), values[index].reshape(5, -1))

    rng = np.random.default_rng(1)
    distance = rng.integers(0, 25, (2, *stored.shape))
    lower, upper = (np.clip(stored + d, *type_.range) for d in (-distance[0], distance[1]))
    bounds = IntervalSession(graph, tensors=tensors).run(lower, upper)
    inside = execute_all(graph, rng.integers(lower, upper + 1))
    boxes = {graph.core_input: (lower, upper)}
    for op in graph.core:
        boxes[op.output] = check_bounds.propagate(graph, op, [boxes[i] for i in op.inputs])
        low, high = (end.reshape(5, -1) for end in boxes[op.output])
        assert np.array_equal(bounds[op.output][0], low), op.kind
        assert np.array_equal(bounds[op.output][1], high), op.kind
        for point in (values, inside):
            flat = point[op.output].reshape(5, -1)
            assert ((low <= flat) & (flat <= high)).all(), op.kind


# ---------------------------------------------------------------------- exact rules
def alone(op: Unary | Pair | WithConstant, *tensors: Tensor) -> Graph:
    return Graph(tensors, (op,), 0, len(tensors) - 1)


def tensor(name: str, size: int, scale: float, zero_point: int) -> Tensor:
    return Tensor(name, (1, size), DType.INT8, Quantization.of(scale, zero_point))


def test_bounds_of_a_table_that_falls_and_rises_are_exact() -> None:
    """All boxes of HARD_SWISH: both ends are taken on inside."""
    op = Unary(name="swish", inputs=(0,), output=1, function=Function.HARD_SWISH)
    ends = tensor("a", 1, 0.04, 20), tensor("b", 1, 0.015, -60)
    graph = profiles.resolve(alone(op, *ends), "tflite-reference")
    values = execute(graph, np.arange(-128, 128)[:, None])[:, 0]
    assert (np.diff(values) < 0).any() and (np.diff(values) > 0).any()
    low, high = (index - 128 for index in np.triu_indices(256))
    least, most = IntervalSession(graph).run(low[:, None], high[:, None])[1]
    parts = [values[a : b + 1] for a, b in zip(low + 128, high + 128, strict=True)]
    wanted = [(part.min(), part.max()) for part in parts]
    assert np.array_equal(np.concatenate([least, most], axis=1), np.array(wanted))


@pytest.mark.parametrize("combination", [Combination.MUL, Combination.SUB])
@pytest.mark.parametrize("profile", ["tflite-micro", "litert-xnnpack-x86"])
def test_bounds_of_two_inputs_are_exact(combination: Combination, profile: str) -> None:
    op = Pair(name="two", inputs=(0, 1), output=2, combination=combination)
    given = tensor("a", 1, 0.03, 11), tensor("b", 1, 0.05, -30)
    graph = profiles.resolve(alone(op, *given, tensor("c", 1, 0.08, 5)), profile)
    operator = graph.operators[0]
    assert isinstance(operator, Pair) and operator.table is not None
    assert constraints_imported.table_fits(graph, operator) == ""
    rng = np.random.default_rng(2)
    corners = np.sort(rng.integers(-128, 128, (300, 2, 2)), axis=2)
    boxes = [(corners[:, side, :1], corners[:, side, 1:]) for side in (0, 1)]
    low, high = check_bounds.propagate(graph, operator, boxes)
    for (a, b), least, most in zip(corners + 128, low[:, 0], high[:, 0], strict=True):
        part = operator.table[a[0] : a[1] + 1, b[0] : b[1] + 1]
        assert (part.min(), part.max()) == (least, most)


def test_a_function_too_near_a_boundary_is_refused() -> None:
    """LOGISTIC at the very scale where an entry is a half: no float library decides it alike."""
    half = 200.5 / 256  # float: an entry that lies between two integers
    scale = np.float32(np.log(half / (1 - half)) / 64)
    op = Unary(name="gate", inputs=(0,), output=1, function=Function.LOGISTIC)
    ends = tensor("a", 1, float(scale), 0), tensor("b", 1, 1 / 256, -128)
    with pytest.raises(InvalidGraphError, match="rounding boundary, where the float library"):
        profiles.resolve(alone(op, *ends), "tflite-reference")
    near = tensor("a", 1, float(scale) * 1.0001, 0)
    profiles.resolve(alone(op, near, ends[1]), "tflite-reference")
    # Between the last two results it does not matter: both are stored as 127.
    top = np.float32(np.log(511.0) / 64)
    profiles.resolve(alone(op, tensor("a", 1, float(top), -128), ends[1]), "tflite-reference")


@pytest.mark.parametrize(
    ("arithmetic", "other"),
    [
        (lookups.Arithmetic.TFLITE, lookups.Arithmetic.TFLITE_HALF_UP),
        (lookups.Arithmetic.TFLITE, lookups.Arithmetic.XNNPACK),
        (lookups.Arithmetic.TFLITE_HALF_UP, lookups.Arithmetic.XNNPACK),
    ],
)
def test_arithmetics_differ_where_they_should(
    arithmetic: lookups.Arithmetic, other: lookups.Arithmetic
) -> None:
    """A comparison with runtimes that cannot tell them apart would show nothing."""
    x = np.arange(-255, 256, dtype=np.int64)
    source, target = (decode_float32(pattern(s)) for s in (0.02, 0.08))
    first, second = (lookups.requantize(x, source, target, a) for a in (arithmetic, other))
    assert (first != second).any() and np.abs(first - second).max() == 1


def test_delegates_differ_in_products_that_are_halves() -> None:
    """XNNPACK rounds them to even on x86 and up on ARM."""
    x = np.arange(-255, 256, dtype=np.int64)
    one, three = (decode_float32(pattern(s)) for s in (1.0, 3 / 6))
    names = lookups.Arithmetic.XNNPACK, lookups.Arithmetic.XNNPACK_ARM
    even, up = (lookups.product(x, x * 0 + 1, (one, three), one, name) for name in names)
    assert np.array_equal(up, (x + 1) >> 1) and np.array_equal(even, np.rint(x / 2))


@pytest.mark.parametrize("size", [7, 16, 23, 32])
def test_quantize_rounds_the_rest_of_its_vectors_otherwise(size: int) -> None:
    """Each value at each place, in every runtime: halves are met at a quarter of the scale."""
    op = Unary(name="q", inputs=(0,), output=1, function=Function.QUANTIZE)
    graph = alone(op, tensor("a", size, 0.02, 5), tensor("b", size, 0.08, -3))
    inputs = np.stack([np.roll(np.resize(np.arange(-128, 128), (256, size)), shift, 1)
                       for shift in range(size)]).reshape(-1, size)  # fmt: skip
    outside = profiles.uncovered(graph)
    half_up = {"litert-x86", "tflite-arm", "litert-arm"}
    assert set(outside) - {"single-rounding"} == (half_up if size == 23 else set())
    for peer in RUNTIMES:
        if peer.absence:
            continue
        (found,) = Bytes(peer, {}).run([(graph, inputs)])
        found = found.reshape(inputs.shape)
        if peer.profile not in outside:
            assert np.array_equal(found, execute(graph, inputs, peer.profile)), peer.name
            continue
        assert "by an element's position" in outside[peer.profile]
        for part, rule in ((np.s_[:, :16], "TFLITE_HALF_UP"), (np.s_[:, 16:], "TFLITE")):
            resolved = tables.resolved(graph, op, lookups.Arithmetic[rule])
            assert isinstance(resolved, Lookup) and resolved.table is not None
            assert np.array_equal(found[part], resolved.table[0][inputs[part] + 128]), peer.name


@pytest.mark.parametrize("types", [(DType.INT8, DType.UINT8), (DType.UINT8, DType.INT8)])
def test_no_delegate_takes_quantize_to_another_type(types: tuple[DType, DType]) -> None:
    op = Unary(name="q", inputs=(0,), output=1, function=Function.QUANTIZE)
    places = {DType.INT8: 3, DType.UINT8: 125}
    ends = [
        Tensor(name, (1, 16), kind, Quantization.of(scale, places[kind]))
        for name, kind, scale in zip("ab", types, (0.02, 0.08), strict=True)
    ]
    graph = alone(op, *ends)
    inputs = np.resize(np.arange(256) + types[0].range[0], (16, 16))
    for profile, behind in (
        ("tflite-xnnpack-arm", "tflite-arm"),
        ("litert-xnnpack-x86", "litert-x86"),
    ):
        assert np.array_equal(execute(graph, inputs, profile), execute(graph, inputs, behind))
    for peer in RUNTIMES:
        if not peer.absence:
            (found,) = Bytes(peer, {}).run([(graph, inputs)])
            wanted = execute(graph, inputs, peer.profile)
            assert np.array_equal(found.reshape(wanted.shape), wanted), peer.name


def test_relu_divides_scales_as_each_runtime_does() -> None:
    """Near a tie one of 256 entries shows whether the quotient was a float32 or a float64."""
    file = File(np.random.default_rng(0))
    for steps in range(1, 400):
        target = np.float32(0.01 + steps / 9999)
        source = np.float32(target * np.float32(60.5) / np.float32(97))
        op = Unary(name="relu", inputs=(0,), output=1, function=Function.RELU)
        ends = tensor("a", 256, float(source), -128), tensor("b", 256, float(target), -128)
        graph = alone(op, *ends)
        inputs = np.arange(-128, 128)[None, :]
        wide, narrow = (execute(graph, inputs, p) for p in ("tflite-micro", "tflite-reference"))
        if (wide != narrow).any():
            break
    else:
        raise AssertionError("no scales tell them apart")
    index = file.unary("RELU", file.input((1, 256), (float(source), -128)), (float(target), -128))
    files = {id(graph): file.bytes(index)}
    for peer in RUNTIMES:
        if not peer.absence:
            (found,) = Bytes(peer, files).run([(graph, inputs)])
            micro = peer.profile == "tflite-micro"
            assert np.array_equal(found.reshape(1, -1), wide if micro else narrow), peer.name


@pytest.mark.parametrize("name", ["unsigned_input", "unsigned_output", "relu6"])
def test_what_rounds_nothing_is_covered_by_every_profile(name: str) -> None:
    graph = graph_of(name)
    assert profiles.uncovered(graph) == {}
    index, op = next((i, op) for i, op in enumerate(graph.operators) if isinstance(op, Unary))
    for arithmetic in lookups.Arithmetic:
        resolved = profiles.resolve(graph, profiles.DEFAULT).operators[index]
        assert isinstance(resolved, Lookup) and resolved.table is not None
        assert np.array_equal(tables.resolved(graph, op, arithmetic).table, resolved.table)


# ---------------------------------------------------------------------- certificates and attacks
CERTIFIED = "squeeze_and_excite", "functions_in_a_row", "concatenation_along_3", "sub_channels"


@pytest.mark.parametrize("name", CERTIFIED)
def test_certificates_are_made_and_checked(name: str) -> None:
    model = made(name, 0)
    graph = read_tflite(model)
    classes = graph.tensors[graph.logits].size
    rng = np.random.default_rng(4)
    images = rng.random((4, *INPUT[1:]), dtype=np.float32)
    data = Dataset("made-up", images, np.zeros(4, np.int64), classes, "test", "5e" * 32)
    first = certified(model, Request(data, Perturbation.levels(0)))
    labels = np.array([sample.prediction for sample in first.samples])
    data = replace(data, labels=labels)
    request = Request(
        data, Perturbation.levels(1), attack=Settings(steps=4), method="complete", budget=0.25
    )
    claim = certified(model, request)
    assert {sample.verdict for sample in claim.samples} <= {"certified", "refuted", "unknown"}
    assert checked(encoded(claim.head, claim.samples), model, data).problems == ()


@pytest.mark.parametrize("name", ["transposed", "reversed_rows", "concatenation_along_2"])
def test_the_gradient_of_a_move_is_its_transpose(name: str) -> None:
    graph = graph_of(name)
    op = next(op for op in graph.core if isinstance(op, Move))
    rng = np.random.default_rng(5)
    inputs = [rng.integers(-9, 9, (2, *graph.tensors[i].shape[1:])) for i in op.inputs]
    output = moved(graph, op, inputs)
    seeds = rng.integers(-9, 9, output.shape).astype(np.int32)
    back = through_move(graph, op, Gradient(seeds, np.zeros(2, np.int64)))
    sums = sum((a * b.values).sum() for a, b in zip(inputs, back, strict=True))
    assert sums == (output * seeds).sum()


@pytest.mark.parametrize("name", ["hard_swish", "squeeze_and_excite", "gate_first", "one_row"])
def test_an_attack_goes_uphill(name: str) -> None:
    """Steps along the gradient raise a logit more often than steps against it."""
    graph = profiles.resolve(graph_of(name), "tflite-reference")
    whole = Network(graph)
    points = drawn(graph, 24, 6).astype(np.int8)
    seeds = np.zeros((24, graph.tensors[graph.logits].size), np.int32)
    seeds[:, 1] = 1
    slope = np.sign(transposed(whole, whole.forward(points), seeds))
    assert slope.any()
    ends = [
        execute(graph, np.clip(points.astype(np.int64) + side * 6 * slope, -128, 127)).reshape(
            24, -1
        )
        for side in (1, -1)
    ]
    rises = ends[0][:, 1] - ends[1][:, 1]
    assert (rises > 0).sum() > 2 * (rises < 0).sum()


def test_profiles_with_other_tables_are_certified_apart() -> None:
    groups = cover(graph_of("leaky_relu"), None).groups
    names = [set(group.names) for group in groups]
    assert not any({"tflite-reference", "litert-xnnpack-x86"} <= group for group in names)


# ---------------------------------------------------------------------- C
@pytest.mark.parametrize(
    "name", ["add_channels", "transposed", "concatenation_along_3", "padded_channels"]
)
def test_generated_c_is_the_same(name: str) -> None:
    graph = graph_of(name)
    stored = drawn(graph, 4)
    found = run_host(graph, stored, profiles.DEFAULT).outputs
    wanted = execute(graph, stored)
    assert np.array_equal(found.reshape(wanted.shape), wanted)


def test_generated_c_refuses_two_activations_by_name() -> None:
    with pytest.raises(InvalidGraphError, match="MUL 't.*two activations"):
        generate(graph_of("mul_tensors"))


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize("name", ["tanh", "mul_tensors", "transposed"])
def test_other_methods_decline_by_name(name: str) -> None:
    graph = profiles.resolve(graph_of(name), "tflite-reference")
    kind = next(op.kind for op in graph.core if isinstance(op, (Lookup, Pair, Move)))
    with pytest.raises(UnsupportedModelError, match=f"{kind} .*linear bounds"):
        network(graph)
    with pytest.raises(UnsupportedModelError, match=f"{kind} .*no twin"):
        twin(graph)
    with pytest.raises(UnsupportedModelError, match=f"{kind} .*faults"):
        covering(graph_of(name), FaultModel(layers=(0,), bits=(0,)), None)


@pytest.mark.parametrize("name", ["mean", "rows_of_four_dimensions"])
def test_sums_that_round_in_their_own_way_have_no_twin_in_a_file(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="no twin in a file"):
        twin(graph_of(name))
    twin(profiles.resolve(graph_of(name), "tflite-reference"))


def test_a_mean_has_no_form_in_other_frameworks() -> None:
    with pytest.raises(ToolError, match="MEAN 't.*no form"):
        flow(graph_of("mean"), channels_first=True)


@pytest.mark.parametrize("change", ["range", "rows", "monotone"])
def test_tables_of_hand_made_graphs_are_checked(change: str) -> None:
    name = "mul_tensors" if change == "monotone" else "relu"
    graph = profiles.resolve(graph_of(name), "tflite-reference")
    index, op = next((i, o) for i, o in enumerate(graph.operators) if isinstance(o, (Lookup, Pair)))
    assert op.table is not None
    table = op.table.copy()
    if change == "range":
        table[0, 3] = 128
    elif change == "rows":
        table = np.repeat(table, 7, axis=0)
    else:
        table[10, 100] = 127 if table[10, 100] < 100 else -128
        table[10, 101] = table[10, 99]
    changed = [*graph.operators]
    changed[index] = replace(op, table=table)
    with pytest.raises(InvalidGraphError, match="table holds storable"):
        constraints.validate(replace(graph, operators=tuple(changed)))
