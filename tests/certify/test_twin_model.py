"""The twin as a file: stock runtimes that run it compute what ``certify`` computes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import cli, flatbuffer, profiles, universal
from cactus_edge.certify.intervals import IntervalSession
from cactus_edge.certify.twin import twin
from cactus_edge.certify.twin_model import TwinModel, make_twin, twin_model
from cactus_edge.errors import UnsupportedModelError
from cactus_edge.execute import execute
from cactus_edge.graph import Graph, Int64Array, Quantization, Tensor
from cactus_edge.operators import Function, Unary
from cactus_edge.profiles import PROFILES, resolve
from cactus_edge.universalize import universalize
from cactus_edge.validate.onnx_runtime import outside
from cactus_edge.validate.runtimes import Peer, onnx_peer, peers, runner
from tests import stock
from tests.graphs import CORE_OPERATORS, random_box, random_graph

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "digits-0.05" / "model.tflite"


@functools.cache
def made(seed: int) -> tuple[Graph, TwinModel] | None:
    """A random model of every operator, and its twin; None where it has none."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, operators=CORE_OPERATORS, universal=seed % 3 == 0)
    try:
        return graph, twin_model(graph)
    except UnsupportedModelError:
        return None


def boxes(graph: Graph, seed: int, count: int, radius: int) -> tuple[Int64Array, Int64Array]:
    """Lower and upper ends, int64 [count, ...]."""
    rng = np.random.default_rng(seed)
    lower, upper = zip(*(random_box(rng, graph, radius) for _ in range(count)), strict=True)
    return np.stack(lower), np.stack(upper)


def bounds(graph: Graph, lower: Int64Array, upper: Int64Array, name: str) -> list[Int64Array]:
    """What ``certify`` computes under a profile: the twin of the resolved graph."""
    whole = Graph(graph.tensors, graph.core, graph.core_input, graph.logits)
    double = twin(resolve(whole, name))
    values = execute(double.graph, double.stack(lower, upper))
    return list(double.split(graph.logits, values))


def test_bounds_are_those_of_certify_under_every_exact_profile() -> None:
    exact = inexact = 0
    for seed in range(24):
        pair = made(seed)
        if pair is None:
            continue
        graph, model = pair
        assert set(model.profiles) | set(model.others) == set(PROFILES)
        lower, upper = boxes(graph, seed, 6, 20)
        again = flatbuffer.read_tflite(flatbuffer.write_tflite(model.twin.graph))
        for name in model.profiles:
            values = execute(again, model.twin.stack(lower, upper), name)
            found = model.twin.split(graph.logits, values)
            assert all(map(np.array_equal, found, bounds(graph, lower, upper, name))), (seed, name)
            exact += 1
        if model.universal:
            assert universal.is_universal(graph)
            assert set(model.others) == set(profiles.uncovered(graph)) | set(
                profiles.uncovered(model.twin.graph)
            )
        inexact += any("rounded by its shape" in reason for reason in model.others.values())
    assert exact > 60 and inexact > 0


STOCK = [
    peer for peer in peers() if peer.package in ("tflite-runtime", "ai-edge-litert", "tflite-micro")
]


@pytest.mark.parametrize("peer", STOCK, ids=lambda peer: peer.name)
def test_runtimes_compute_the_bounds(peer: Peer) -> None:
    """The file's bytes, on every runtime under its own profile."""
    parts: list[tuple[Graph, Int64Array]] = []
    expected: list[Int64Array] = []
    graph, model = tabled("lenet")
    lower, upper = boxes(graph, 0, 4, 9)
    parts.append((model.twin.graph, model.twin.stack(lower, upper)))
    expected.append(np.hstack(model.twin.split(graph.logits, execute(*parts[0]))))
    for seed in range(24):
        pair = made(seed)
        if pair is None or peer.profile not in pair[1].profiles:
            continue
        graph, model = pair
        lower, upper = boxes(graph, seed, 4, 20)
        parts.append((model.twin.graph, model.twin.stack(lower, upper)))
        expected.append(np.hstack(bounds(graph, lower, upper, peer.profile)))
    assert len(parts) > 3
    for (graph, _), found, wanted in zip(parts, runner(peer)(parts), expected, strict=True):
        double = found.reshape(len(found), -1)
        assert np.array_equal(double, wanted), graph.operators[-1].name


def test_onnx_runtime_computes_the_bounds() -> None:
    """Its signed kernels of layers, in the QDQ form of the twin."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    peer = onnx_peer()
    kinds = ("CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "PAD", "RESHAPE", "FULLY_CONNECTED")
    parts: list[tuple[Graph, Int64Array]] = []
    expected: list[Int64Array] = []
    universals = 0
    for seed in range(16):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, operators=kinds, bits=(8,), universal=seed % 2 == 0)
        try:
            model = twin_model(graph)
        except UnsupportedModelError:
            continue
        if outside(model.twin.graph) or peer.profile not in model.profiles:
            continue
        universals += model.universal
        lower, upper = boxes(graph, seed, 10, 20)
        parts.append((model.twin.graph, model.twin.stack(lower, upper)))
        expected.append(np.hstack(bounds(graph, lower, upper, peer.profile)))
    assert len(parts) > 4 and 0 < universals < len(parts)
    for found, wanted in zip(runner(peer)(parts), expected, strict=True):
        assert np.array_equal(found.reshape(len(found), -1), wanted)


TABLED = ("lenet", "sine")


@functools.cache
def tabled(name: str) -> tuple[Graph, TwinModel]:
    """A file of another converter in universal form: lenet has a TANH and a LOGISTIC."""
    graph, _ = universalize(stock.model(name).graph)
    return graph, twin_model(graph)


@pytest.mark.parametrize("name", TABLED)
def test_functions_of_one_value_that_fall_nowhere_have_a_twin(name: str) -> None:
    graph, model = tabled(name)
    lower, upper = boxes(graph, 1, 20, 9)
    again = flatbuffer.read_tflite(flatbuffer.write_tflite(model.twin.graph))
    assert model.universal and "tflite-micro" in model.profiles
    (wanted,) = IntervalSession(resolve(graph)).run(lower, upper).values()
    for profile in model.profiles:
        values = execute(again, model.twin.stack(lower, upper), profile)
        found = model.twin.split(graph.logits, values)
        assert all(map(np.array_equal, found, wanted)), profile


def test_functions_that_fall_have_none() -> None:
    tensors = [Tensor(n, (1, 4), quantization=Quantization.of(0.03, -9)) for n in ("x", "y")]
    op = Unary(name="gate", inputs=(0,), output=1, function=Function.HARD_SWISH)
    with pytest.raises(UnsupportedModelError, match="HARD_SWISH 'gate' has no twin"):
        twin_model(Graph(tuple(tensors), (op,), 0, 1))


def test_a_model_of_the_repository(tmp_path: Path) -> None:
    report = make_twin(MODEL, tmp_path / "twin.tflite")
    assert report.universal and not set(report.profiles) & set(report.others)
    graph, _ = flatbuffer.load(MODEL)
    assert report.output_shape == (1, 2 * graph.tensors[graph.logits].size)
    double, content = flatbuffer.load(tmp_path / "twin.tflite")
    assert len(content) == report.bytes
    lower, upper = boxes(graph, 0, 20, 12)
    model = twin_model(graph)
    points = np.random.default_rng(0).integers(lower, upper + 1)
    low, high = model.twin.split(graph.logits, execute(double, model.twin.stack(lower, upper)))
    values = execute(graph, points).reshape(len(points), -1)
    assert bool((low <= values).all() and (values <= high).all())


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "twin.tflite"
    assert cli.run(["twin", str(MODEL), "-o", str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["input_shape"] == [1, 8, 8, 2] and report["universal"]
    assert cli.run(["twin", str(MODEL), "-o", str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.run(["twin", str(MODEL), "-o", str(target), "--force"]) == 0
    assert cli.run(["twin", str(tmp_path / "none.tflite"), "-o", str(target), "--force"]) == 2


def test_a_resolved_graph_is_refused() -> None:
    graph = random_graph(np.random.default_rng(0), operators=("FULLY_CONNECTED",))
    with pytest.raises(UnsupportedModelError, match="before `resolve`"):
        twin_model(resolve(graph))
