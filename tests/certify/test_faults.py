"""Weight faults against the truth: every flip, every point of the box, every rounding profile."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge import decision, profiles, universal
from cactus_edge.certify.faults import FaultCertifier, FaultRequest
from cactus_edge.certify.faults_search import Effort
from cactus_edge.certify.faults_sites import (
    Site,
    Sites,
    flip,
    linear_layers,
    shared,
    stored_width,
)
from cactus_edge.check_faults_claim import equal_constants
from cactus_edge.check_flips import flipped, flips
from cactus_edge.csource import Layout, generate
from cactus_edge.csource.integrity import crc32
from cactus_edge.datasets import Dataset
from cactus_edge.errors import UsageError
from cactus_edge.execute import accumulate, execute, execute_all, run_operator
from cactus_edge.fault_report import Fault, FaultModel
from cactus_edge.graph import (
    Conv2D,
    FullyConnected,
    Graph,
    Linear,
    Pad,
    Padding,
    Quantization,
    Requantization,
    Tensor,
    Weights,
    window_geometry,
)
from cactus_edge.inputs import Perturbation
from cactus_edge.semantics import Rounding
from firmware_sim.host import run_source
from tests.graphs import TINY_SHAPES, enumerate_box, random_box, random_graph

BATCH = 64
"""Faulty layers whose outputs are carried through the rest of a network at once."""


@dataclass
class Tally:
    """What was compared; ``broken`` and ``false_refutations`` must stay empty."""

    broken: list[str] = field(default_factory=list)
    false_refutations: list[str] = field(default_factory=list)
    missed: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    widths: dict[int, int] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)
    executed: int = 0

    def assert_sound(self) -> None:
        assert not self.broken, "certified, yet a flip changes the decision"
        assert not self.false_refutations, "a refutation that does not reproduce"


def flipped_tensors(
    op: Linear, bits: tuple[int, ...], bias_bits: int
) -> Iterator[tuple[str, int, int, Linear]]:
    """Every faulty layer, from the bytes as a file holds them."""
    packed = op.weights.bits <= 4
    raw = op.weights.values.reshape(-1).view(np.uint8)
    for index in range(raw.size):
        for bit in bits:
            if bit >= (4 if packed else 8):
                continue
            byte = (int(raw[index]) & (15 if packed else 255)) ^ (1 << bit)
            value = byte - (16 if byte >= 8 else 0) if packed else byte - (256 if byte > 127 else 0)
            values = op.weights.values.copy().reshape(-1)
            values[index] = value
            shaped = values.reshape(op.weights.values.shape)
            yield (
                "weights",
                index,
                bit,
                replace(op, weights=Weights(shaped, 4 if packed else 8, op.weights.scale_bits)),
            )
    for index in range(op.bias.size):
        for bit in range(bias_bits):
            bias = op.bias.copy().view(np.uint32)
            bias[index] ^= np.uint32(1 << bit)
            yield "bias", index, bit, replace(op, bias=bias.view(np.int32))


def folded_before(op: Linear, faulty: Linear, zero_point: int) -> Linear:
    """``faulty`` as it acts when ``bias - zero_point * sum(weights)`` was taken of ``op``.

    The reference executor folds the sums of ``faulty`` itself; the bias makes up for it.
    """

    def sums(layer: Linear) -> np.ndarray:
        values = layer.weights.values.astype(np.int64)
        axes = (0, 1, 2) if layer.kind == "DEPTHWISE_CONV_2D" else tuple(range(1, values.ndim))
        return values.sum(axis=axes)

    bias = faulty.bias.astype(np.int64) + zero_point * (sums(faulty) - sums(op))
    return replace(faulty, bias=bias)


def with_operator(graph: Graph, index: int, op: Linear) -> Graph:
    operators = list(graph.operators)
    operators[index] = op
    return replace(graph, operators=tuple(operators))


def distinct(graph: Graph) -> list[Graph]:
    """One resolved graph for each arithmetic of the profiles that cover the model."""
    outside = profiles.uncovered(graph)
    resolved = [profiles.resolve(graph, name) for name in profiles.PROFILES if name not in outside]
    return list({g.fingerprint(): g for g in resolved}.values())


def exhaust(
    graph: Graph,
    tally: Tally,
    box: tuple[np.ndarray, np.ndarray],
    *,
    label: int,
    faults: FaultModel,
    effort: Effort | None = None,
) -> None:
    """Certify one box, then run everything."""
    lower, upper = box
    points = enumerate_box(lower, upper)
    stored = (lower + upper) // 2
    labels = np.array([label])
    counted = effort is not None and effort.counted
    certifier = FaultCertifier(graph, faults, effort=effort)
    sample = certifier.samples(0, stored[None], lower[None], upper[None], labels)[0]
    arithmetics = distinct(graph)
    if not sample.findings:
        wrong = [decision.surely_wrong(g, execute(g, stored[None]), labels)[0] for g in arithmetics]
        assert any(wrong)
        return
    for index, finding in zip(faults.layers, sample.findings, strict=True):
        op = graph.operators[index]
        assert isinstance(op, Linear)
        tally.layers[op.kind] = tally.layers.get(op.kind, 0) + 1
        tally.widths[op.weights.bits] = tally.widths.get(op.weights.bits, 0) + 1
        tally.verdicts[finding.verdict] = tally.verdicts.get(finding.verdict, 0) + 1
        fault = finding.fault
        if fault and not reproduces(graph, index, fault, stored, label, faults.folded):
            tally.false_refutations.append(f"{op.name} {fault}")
        broken = 0
        for resolved in arithmetics:
            layer = resolved.operators[index]
            assert isinstance(layer, Linear)
            known = execute_all(resolved, points)
            safe = 0
            sites = flipped_tensors(layer, faults.bits, faults.bias_bits)
            while part := list(itertools.islice(sites, BATCH)):
                changed = [faulty for *_, faulty in part]
                if faults.folded:
                    zero_point = graph.tensors[op.inputs[0]].zero_point
                    changed = [folded_before(layer, faulty, zero_point) for faulty in changed]
                logits = logits_with(resolved, known, index, changed)
                tally.executed += len(logits)
                every = np.full(len(logits), label)
                wrong = decision.surely_wrong(resolved, logits, every).reshape(len(part), -1)
                wrong = wrong.any(axis=1)
                broken += int(wrong.sum())
                safe += int((~wrong).sum())
                others = (decision.predict(logits) != label).reshape(len(part), -1).any(axis=1)
                if finding.verdict == "certified":
                    for i in np.flatnonzero(wrong | others).tolist():
                        tensor, place, bit, _ = part[i]
                        tally.broken.append(f"{op.name} {tensor} {place} bit {bit}")
            if counted:
                assert finding.safe <= safe
        tally.missed += int(broken > 0 and finding.verdict != "refuted")


def logits_with(
    graph: Graph, known: dict[int, np.ndarray], index: int, faulty: list[Linear]
) -> np.ndarray:
    """Logits [layers x points, classes] with each of some operators in place of ``index``.

    ``known`` are the activations without them.
    """
    values = {tensor: np.concatenate([value] * len(faulty)) for tensor, value in known.items()}
    outputs = [run_operator(graph, op, [known[op.inputs[0]]]) for op in faulty]
    values[faulty[0].output] = np.concatenate(outputs)
    for op in graph.operators[index + 1 :]:
        values[op.output] = run_operator(graph, op, [values[i] for i in op.inputs])
    logits = values[graph.logits]
    return logits.reshape(len(logits), -1)


def reproduces(
    graph: Graph, index: int, fault: Fault, stored: np.ndarray, label: int, folded: bool
) -> bool:
    op = profiles.resolve(graph, fault.profile).operators[index]
    assert isinstance(op, Linear)
    point = stored.copy()
    if fault.counterexample:
        difference = np.frombuffer(bytes.fromhex(fault.counterexample), "<i2")
        point = stored + difference.reshape(stored.shape)
    for tensor, place, bit, faulty in flipped_tensors(op, (fault.bit,), fault.bit + 1):
        if (tensor, place, bit) == (fault.tensor, fault.index, fault.bit):
            source = faulty.weights.values if tensor == "weights" else faulty.bias
            before = op.weights.values if tensor == "weights" else op.bias
            assert int(source.reshape(-1)[place]) == fault.flipped
            assert int(before.reshape(-1)[place]) == fault.value
            if folded:
                faulty = folded_before(op, faulty, graph.tensors[op.inputs[0]].zero_point)
            changed = with_operator(profiles.resolve(graph, fault.profile), index, faulty)
            logits = execute(changed, point[None])
            return bool(decision.surely_wrong(changed, logits, np.array([label]))[0])
    return False


def tiny_graph(seed: int, **options: object) -> Graph:
    rng = np.random.default_rng(seed)
    arguments: dict[str, object] = {
        "shape": TINY_SHAPES[int(rng.integers(len(TINY_SHAPES)))],
        "depth": int(rng.integers(0, 3)),
        "channels": 3,
        "classes": int(rng.integers(2, 4)),
        "universal": bool(rng.random() < 0.3),
    }
    return random_graph(rng, **(arguments | options))  # type: ignore[arg-type]


def likely_label(graph: Graph, box: tuple[np.ndarray, np.ndarray]) -> int:
    """What the model answers at the middle of the box."""
    middle = (box[0] + box[1]) // 2
    return int(decision.predict(execute(graph, middle[None]))[0])


def run(
    seed: int, tally: Tally, radius: int, effort: Effort | None = None, **options: object
) -> None:
    graph = tiny_graph(seed, **options)
    rng = np.random.default_rng(seed + 1)
    box = random_box(rng, graph, radius)
    bits = tuple(range(8)) if rng.random() < 0.6 else tuple(range(int(rng.integers(1, 6))))
    faults = FaultModel(
        linear_layers(graph, None),
        bits,
        int(rng.choice([0, 0, 12])),
        counted=effort is not None and effort.counted,
        folded=bool(rng.random() < 0.4),
    )
    exhaust(graph, tally, box, label=likely_label(graph, box), faults=faults, effort=effort)


def test_no_certified_layer_is_broken_by_any_flip_at_any_point() -> None:
    tally = Tally()
    for seed in range(16):
        run(seed, tally, radius=seed % 3)
    tally.assert_sound()
    assert set(tally.layers) == {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}
    assert set(tally.widths) == {4, 8}
    assert tally.verdicts["certified"] >= 5 and tally.verdicts["refuted"] >= 10


def test_radius_zero_is_decided_completely() -> None:
    """Bounds of a point are exact, so every site is either proved or refuted."""
    tally = Tally()
    for seed in range(100, 106):
        run(seed, tally, radius=0, effort=Effort(counted=True))
    tally.assert_sound()
    assert tally.missed == 0
    assert "unknown" not in tally.verdicts


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**32 - 1), radius=st.integers(0, 2))
def test_any_seed(seed: int, radius: int) -> None:
    tally = Tally()
    run(seed, tally, radius)
    tally.assert_sound()


def test_every_extreme_weight_and_packed_weight() -> None:
    """The weights that have no positive twin, and the nibbles of int4."""
    for bits in (8, 4, 3, 2):
        lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        values = np.array([[lowest, highest, 0], [-1, 1, lowest], [highest, lowest, -1]])
        graph = one_layer(values, bits)
        tally = Tally()
        for seed in range(12):
            box = random_box(np.random.default_rng(seed), graph, seed % 3)
            label = likely_label(graph, box)
            exhaust(graph, tally, box, label=label, faults=FaultModel((0,)))
        tally.assert_sound()
        assert tally.verdicts.get("refuted"), "no sign bit ever mattered: suspicious"


@pytest.mark.parametrize("seed", [138, 139])
def test_a_flip_may_end_the_agreement_of_profiles(seed: int) -> None:
    """Universal models whose profiles differ beyond what accumulators reach without a flip."""
    graph = tiny_graph(seed, universal=True)
    assert universal.is_universal(graph)
    faults = FaultModel(linear_layers(graph, None))
    certifier = FaultCertifier(graph, faults)
    together = [group for group in certifier.groups if group.names == certifier.profiles]
    apart = [group for group in certifier.groups if group not in together]
    assert len(together) == 1 and len(apart) >= 2
    (index,) = apart[0].layers
    assert all(group.layers == (index,) for group in apart)
    assert sorted(name for group in apart for name in group.names) == sorted(certifier.profiles)
    lower, upper = graph.tensors[graph.input].dtype.range
    shape = graph.tensors[graph.input].shape[1:]
    points = np.array(list(itertools.product((lower, upper), repeat=int(np.prod(shape)))))
    points = np.concatenate(
        [points, np.random.default_rng(0).integers(lower, upper + 1, (900, points.shape[1]))]
    )
    points = points.reshape(-1, *shape)
    plain = {execute(group.graph, points).tobytes() for group in apart}
    assert len(plain) == 1, "without a flip they compute the same"
    op = graph.operators[index]
    assert isinstance(op, Linear)
    differ = False
    for group in apart[1:]:
        pairs = zip(
            *(
                flipped_tensors(g.operators[index], faults.bits, 0)  # type: ignore[arg-type]
                for g in (apart[0].graph, group.graph)
            ),
            strict=True,
        )
        for first, second in pairs:
            graphs = [with_operator(apart[0].graph, index, first[3])]
            graphs.append(with_operator(group.graph, index, second[3]))
            values = [execute_all(g, points)[op.output] for g in graphs]
            differ = differ or not np.array_equal(*values)
    assert differ, "one group would have done"
    tally = Tally()
    for radius in (0, 1, 2):
        box = random_box(np.random.default_rng(radius), graph, radius)
        exhaust(graph, tally, box, label=likely_label(graph, box), faults=faults)
    tally.assert_sound()


def test_what_is_folded_before_the_flip_stays() -> None:
    """The accumulator gains the change times the stored input, in padding the zero point's."""
    rng = np.random.default_rng(0)
    for seed in range(6):
        graph = tiny_graph(seed, shape=(1, 2, 2, 1))
        resolved = profiles.resolve(graph)
        for index in linear_layers(graph, None):
            op = resolved.operators[index]
            assert isinstance(op, Linear)
            source = graph.tensors[op.inputs[0]]
            sites = Sites(resolved, op, FaultModel((index,), folded=True))
            place = int(rng.integers(op.weights.values.size))
            bit = int(rng.integers(stored_width(op.weights)))
            faulty = sites.faulty(resolved, Site("weights", place, bit)).operators[index]
            assert isinstance(faulty, Linear)
            x = rng.integers(-128, 128, (5, *source.shape[1:]))
            unfolded = replace(source, quantization=Quantization.of(1.0, 0))
            change = faulty.weights.values.astype(np.int64) - op.weights.values
            bare = replace(op, weights=Weights(change), bias=np.zeros(op.channels))
            padded, geometry = x, bare
            if isinstance(op, Conv2D) and op.padding is Padding.SAME:
                edges = [
                    window_geometry(
                        source.shape[1 + axis],
                        op.weights.values.shape[1 + axis],
                        op.stride[axis],
                        op.dilation[axis],
                        op.padding,
                    )[1:]
                    for axis in (0, 1)
                ]
                edges = [(0, 0), *(tuple(max(0, n) for n in edge) for edge in edges), (0, 0)]
                padded = np.pad(x, edges, constant_values=source.zero_point)
                geometry = replace(bare, padding=Padding.VALID)
            expected = accumulate(op, source, x) + accumulate(geometry, unfolded, padded)
            assert np.array_equal(accumulate(faulty, source, x), expected)


@pytest.mark.parametrize("seed", [1, 9, 10])
def test_generated_c_folds_before_the_flip(seed: int) -> None:
    """C of the model, with the weight table of a faulty model in it: a flip in flash."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, shape=(1, 3, 3, 2), depth=3, channels=4, classes=3)
    resolved = profiles.resolve(graph)
    index = linear_layers(graph, None)[0]
    op = resolved.operators[index]
    assert isinstance(op, Linear)
    sites = Sites(resolved, op, FaultModel((index,), folded=True))
    place, bit = int(rng.integers(op.weights.values.size)), stored_width(op.weights) - 1
    faulty = sites.faulty(resolved, Site("weights", place, bit))
    source = generate(resolved, layout=Layout.INT8)
    number = resolved.core.index(op)
    table = re.compile(rf"TABLE int8_t weights_{number}\[.*?\}};", re.DOTALL)
    other = generate(faulty, layout=Layout.INT8)
    flipped_table = table.search(other.files["cactus_edge.c"])
    text = source.files["cactus_edge.c"]
    assert flipped_table is not None and len(table.findall(text)) == 1
    changed = table.sub(lambda _: flipped_table[0], text)
    assert changed != text
    # The CRC is told of the flip; it would refuse to run otherwise.
    name = f"weights_{number}"
    crc = crc32({**source.tables, name: other.tables[name]})
    header = source.files["cactus_edge.h"].replace(f"{source.crc32:08x}", f"{crc:08x}")
    flashed = replace(source, files={"cactus_edge.c": changed, "cactus_edge.h": header})
    points = rng.integers(-128, 128, (64, *graph.tensors[graph.input].shape[1:]))
    found = run_source(resolved, flashed, points, trace=True).layers[op.output]
    assert np.array_equal(found, execute_all(faulty, points)[op.output])
    before = Sites(resolved, op, FaultModel((index,))).faulty(resolved, Site("weights", place, bit))
    assert not np.array_equal(found, execute_all(before, points)[op.output])


@pytest.mark.parametrize("width", [4, 8])
def test_flip_is_twos_complement(width: int) -> None:
    half = 1 << (width - 1)
    values = np.arange(-half, half)
    for bit in range(width):
        found = flip(values, bit, width)
        raw = (values % (1 << width)) ^ (1 << bit)
        assert found.tolist() == np.where(raw >= half, raw - (1 << width), raw).tolist()
        assert found.tolist() == [flipped(v, bit, width) for v in values.tolist()]
    assert flip(np.array([-(1 << 31), -1, 0]), 31, 32).tolist() == [0, (1 << 31) - 1, -(1 << 31)]


def one_layer(values: np.ndarray, bits: int, bias: int = 0) -> Graph:
    """Three inputs, one fully connected layer without scales, every step half a unit."""
    tensors = (Tensor("input", (1, values.shape[1])), Tensor("logits", (1, len(values))))
    op = FullyConnected(
        name="only",
        inputs=(0,),
        output=1,
        weights=Weights(values, bits),
        bias=np.full(len(values), bias),
        requantization=Requantization.uniform(Rounding.SINGLE, 1, 1, len(values)),
    )
    return Graph(tensors, (op,), 0, 1)


def sample_of(
    certifier: FaultCertifier, point: np.ndarray, radius: int, label: int
) -> tuple[str, Fault | None]:
    stored = point[None].astype(np.int64)
    found = certifier.samples(0, stored, stored - radius, stored + radius, np.array([label]))[0]
    return found.findings[0].verdict, found.findings[0].fault


def test_a_sign_bit_refutes_and_the_others_are_certified() -> None:
    graph = one_layer(np.array([[60, 0], [0, 20]]), 8)
    point = np.array([10, 10])
    verdict, fault = sample_of(FaultCertifier(graph, FaultModel((0,))), point, 0, 0)
    assert verdict == "refuted" and fault is not None
    low = FaultCertifier(graph, FaultModel((0,), bits=(0, 1, 2, 3)))
    assert sample_of(low, point, 1, 0)[0] == "certified"


def test_faults_that_may_overflow_are_not_covered() -> None:
    """A bias near 2^27 leaves no room; then nothing is certified, and the layer says why."""
    graph = one_layer(np.array([[60, 0], [0, 20]]), 4, bias=0)
    graph = with_operator(
        graph,
        0,
        replace(one_layer(np.array([[60, 0], [0, 20]]), 8).operators[0], bias=ROOM),  # type: ignore[arg-type]
    )
    certifier = FaultCertifier(graph, FaultModel((0,), bits=(7,)))
    layer = certifier.layers([])[0]
    assert (layer.sites, layer.uncovered) == (4, 2)
    assert "2^27" in layer.reason
    assert sample_of(certifier, np.array([0, 0]), 0, 0)[0] == "unknown"
    tally = Tally()
    high = FaultModel((0,), bits=(), bias_bits=32)
    assert FaultCertifier(graph, high).layers([])[0].uncovered >= 10
    tally.assert_sound()


ROOM = np.array([(1 << 27) - 60 * 128 - 1, 0], np.int32)


def test_a_second_least_weight_is_not_covered() -> None:
    """Kernels that add two products in int16 would wrap; the first one is harmless."""
    graph = one_layer(np.array([[-128, 1, 0], [1, 2, 3]]), 8)
    op = graph.operators[0]
    assert isinstance(op, Linear)
    faults = FaultModel((0,), bits=(7,))
    sites = Sites(graph, op, faults)
    assert (sites.count, sites.uncovered) == (6, 1)
    assert sites.channel(0).flipped.tolist() == [0, -127]
    assert sites.channel(1).flipped.tolist() == [-127, -126, -125]
    found = [flips(graph, op, faults, channel) for channel in (0, 1)]
    assert [f.covered.tolist() for f in found] == [[True, True, False], [True, True, True]]
    packed = one_layer(np.array([[-8, 1, 0], [1, 2, 3]]), 4)
    (layer,) = FaultCertifier(packed, FaultModel((0,))).layers([])
    assert layer.uncovered == 0


def test_equal_constants_are_not_covered() -> None:
    first = one_layer(np.array([[3, 1], [1, 3]]), 8)
    op = first.operators[0]
    again = replace(op, name="again", inputs=(1,), output=2)
    tensors = (*first.tensors, Tensor("more", (1, 2)))
    graph = Graph(tensors, (op, again), 0, 2)
    certifier = FaultCertifier(graph, FaultModel((0, 1)))
    assert all("equal constants" in layer.reason for layer in certifier.layers([]))
    assert sample_of(certifier, np.array([20, -20]), 0, 0)[0] == "unknown"


def test_bytes_may_be_shared_by_any_two_constants() -> None:
    """Weights with the layer's own bias, packed ones with a bias, a bias with a PAD."""
    own = one_layer(np.array([[3, 0, 0, 0]]), 8, bias=3)
    assert shared(own, own.operators[0], FaultModel((0,)))  # type: ignore[arg-type]
    other = one_layer(np.array([[3, 0, 0, 1]]), 8, bias=3)
    assert not shared(other, other.operators[0], FaultModel((0,)))  # type: ignore[arg-type]
    packed = one_layer(np.array([[3, 0, 0, 0, 0, 0, 0, 0]]), 4, bias=3)
    assert shared(packed, packed.operators[0], FaultModel((0,)))  # type: ignore[arg-type]
    pad = Pad(name="pad", inputs=(0,), output=1, paddings=((0, 0), (1, 1), (1, 1), (0, 0)))
    bias = np.array([0, 0, 1, 1, 1, 1, 0, 0])
    layer = replace(one_layer(np.ones((8, 1)), 8).operators[0], bias=bias, inputs=(1,), output=2)
    assert isinstance(layer, Linear)
    tensors = (Tensor("input", (1, 1, 1, 1)), Tensor("a", (1, 3, 3, 1)), Tensor("b", (1, 8)))
    graph = Graph(tensors, (pad, layer), 0, 2)
    assert not shared(graph, layer, FaultModel((1,)))
    assert shared(graph, layer, FaultModel((1,), bias_bits=1))
    for g, op, faults in (
        (own, own.operators[0], FaultModel((0,))),
        (other, other.operators[0], FaultModel((0,))),
        (packed, packed.operators[0], FaultModel((0,))),
        (graph, layer, FaultModel((1,))),
        (graph, layer, FaultModel((1,), bias_bits=1)),
    ):
        assert isinstance(op, Linear)
        found = equal_constants(g, op, bool(faults.bits), faults.bias_bits > 0)
        assert found == bool(shared(g, op, faults))


def test_unknown_layers_and_bits_are_named() -> None:
    graph = one_layer(np.array([[3, 1], [1, 3]]), 8)
    with pytest.raises(UsageError, match="0 layers with weights are called 'x'.*only"):
        linear_layers(graph, ("x",))
    with pytest.raises(UsageError, match="operator 4 has no weights"):
        FaultCertifier(graph, FaultModel((4,)))
    data = Dataset("d", np.zeros((1, 2), np.float32), np.zeros(1, np.int64), 1, "test", "")
    with pytest.raises(UsageError, match="positions from 0 to 7"):
        FaultRequest(data, bits=(8,))
    with pytest.raises(UsageError, match="no bit may flip"):
        FaultRequest(data, bits=())
    for around in (Perturbation.levels(1).patched(1, 1), Perturbation.each("levels", [0, 1])):
        with pytest.raises(UsageError, match="one radius"):
            FaultRequest(data, around)
