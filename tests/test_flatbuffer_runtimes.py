"""Written files in stock runtimes: all of them load every file and compute the graph's integers."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from graphs import CORE_OPERATORS, random_graph, random_inputs

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.execute import execute
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.graph import Graph

Run = Callable[[bytes, npt.NDArray[Any]], npt.NDArray[Any]]


@dataclass(frozen=True)
class Stock:
    """A runtime in one mode, and the rounding profile that it is measured to have on x86_64."""

    name: str
    module: str
    mode: str
    profile: str


STOCK = (
    Stock("tflite-reference", "tflite_runtime.interpreter", "BUILTIN_REF", "tflite-reference"),
    Stock(
        "tflite-optimized",
        "tflite_runtime.interpreter",
        "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
        "tflite-x86",
    ),
    Stock("tflite-default", "tflite_runtime.interpreter", "AUTO", "tflite-x86"),
    Stock("litert-reference", "ai_edge_litert.interpreter", "BUILTIN_REF", "litert-reference"),
    Stock(
        "litert-optimized",
        "ai_edge_litert.interpreter",
        "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
        "litert-x86",
    ),
    Stock("litert-default", "ai_edge_litert.interpreter", "AUTO", "litert-xnnpack-x86"),
    Stock("tflite-micro", "tflite_micro.python.tflite_micro.runtime", "", "tflite-micro"),
)


def run(stock: Stock, data: bytes, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Outputs of one sample after the other."""
    module = importlib.import_module(stock.module)
    outputs: list[npt.NDArray[Any]] = []
    if not stock.mode:
        micro = module.Interpreter.from_bytes(data, arena_size=1 << 20)
        for sample in batch:
            micro.set_input(sample[None], 0)
            micro.invoke()
            outputs.append(micro.get_output(0)[0].copy())
        return np.stack(outputs)
    resolver = getattr(module.OpResolverType, stock.mode)
    interpreter = module.Interpreter(
        model_content=data, experimental_op_resolver_type=resolver, num_threads=1
    )
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    target = interpreter.get_output_details()[0]["index"]
    for sample in batch:
        interpreter.set_tensor(source, sample[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(target)[0].copy())
    return np.stack(outputs)


@pytest.fixture(params=STOCK, ids=lambda stock: stock.name)
def stock(request: pytest.FixtureRequest) -> Stock:
    chosen: Stock = request.param
    if platform.machine() != "x86_64":
        pytest.skip("these profiles are those of x86_64")
    pytest.importorskip(chosen.module, reason=f"{chosen.module} is not installed")
    return chosen


def agrees(stock: Stock, graph: Graph, rng: np.random.Generator, samples: int = 12) -> None:
    batch = random_inputs(rng, graph, samples)
    found = run(stock, write_tflite(graph), batch.astype(np.int8))
    expected = execute(graph, batch, stock.profile)
    kinds = [op.kind for op in graph.operators]
    assert np.array_equal(found, expected), f"{stock.name}: {kinds}"


@pytest.mark.parametrize("kind", CORE_OPERATORS)
def test_each_operator(stock: Stock, kind: str) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        agrees(stock, random_graph(rng, operators=[kind], depth=2, classes=None), rng)


@pytest.mark.parametrize("bits", [(8,), (4,), (3, 5)])
def test_networks(stock: Stock, bits: tuple[int, ...]) -> None:
    for seed in range(15):
        rng = np.random.default_rng(1000 + seed)
        graph = random_graph(rng, bits=bits, depth=int(rng.integers(1, 7)))
        agrees(stock, graph, rng)


def test_universal_networks_are_the_same_everywhere(stock: Stock) -> None:
    for seed in range(15):
        rng = np.random.default_rng(2000 + seed)
        graph = random_graph(rng, universal=True, depth=int(rng.integers(1, 6)))
        batch = random_inputs(rng, graph, 12)
        found = run(stock, write_tflite(graph), batch.astype(np.int8))
        assert np.array_equal(found, execute(graph, batch)), stock.name


def test_float_edges(stock: Stock) -> None:
    """Real inputs on the grid of stored integers, real outputs that stand for stored integers."""
    for seed in range(10):
        rng = np.random.default_rng(3000 + seed)
        graph = random_graph(rng, edges=("QUANTIZE", "DEQUANTIZE"), depth=3)
        source = graph.tensors[graph.core_input].quantization
        target = graph.tensors[graph.logits].quantization
        assert source is not None
        assert target is not None
        batch = random_inputs(rng, graph, 8)
        real = ((batch - source.zero_point) * source.scale).astype(np.float32)
        found = run(stock, write_tflite(graph), real)
        stored = np.rint(found / target.scale).astype(np.int64) + target.zero_point
        assert np.array_equal(stored, execute(graph, batch, stock.profile)), stock.name


def test_softmax_keeps_the_order_of_the_logits(stock: Stock) -> None:
    for seed in range(10):
        rng = np.random.default_rng(4000 + seed)
        graph = random_graph(rng, edges=("SOFTMAX",), depth=3, classes=4)
        batch = random_inputs(rng, graph, 8)
        found = run(stock, write_tflite(graph), batch.astype(np.int8)).astype(np.int64)
        logits = execute(graph, batch, stock.profile)
        greater = logits[:, :, None] > logits[:, None, :]
        assert (found[:, :, None] >= found[:, None, :])[greater].all(), stock.name


def test_metadata_does_not_disturb(stock: Stock) -> None:
    rng = np.random.default_rng(5)
    graph = random_graph(rng)
    with_metadata = Graph(
        graph.tensors, graph.operators, graph.input, graph.output, (("a", b"1"), ("b", b""))
    )
    agrees(stock, with_metadata, rng)


def test_names_are_kept(stock: Stock) -> None:
    """The runtimes report the graph's names, so a model can be inspected with common tools."""
    if not stock.mode:
        pytest.skip("tflite-micro reports no names")
    graph = random_graph(np.random.default_rng(6))
    module = importlib.import_module(stock.module)
    interpreter = module.Interpreter(model_content=write_tflite(graph))
    names = [detail["name"] for detail in interpreter.get_tensor_details()]
    assert names[: len(graph.tensors)] == [tensor.name for tensor in graph.tensors]


def test_damaged_files_that_are_accepted_run_the_same(stock: Stock) -> None:
    """What the reader lets through is either what stock runtimes compute, or they refuse it."""
    if not stock.mode:
        pytest.skip("tflite-micro does not verify files and may crash on what others refuse")
    compared = 0
    for seed in range(5):
        rng = np.random.default_rng(6000 + seed)
        data = write_tflite(random_graph(rng, channels=4))
        for _ in range(60):
            damaged = bytearray(data)
            damaged[int(rng.integers(len(data)))] = int(rng.integers(0, 20))
            try:
                graph = read_tflite(bytes(damaged))
                batch = random_inputs(rng, graph, 3)
                expected = execute(graph, batch, stock.profile)
            except UnsupportedModelError:
                continue
            try:
                found = run(stock, bytes(damaged), batch.astype(np.int8))
            except (RuntimeError, ValueError):
                continue
            assert np.array_equal(found, expected), f"{stock.name}: file {seed}"
            compared += 1
    assert compared > 50
