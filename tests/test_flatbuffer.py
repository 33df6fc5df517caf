"""Graphs written to ``.tflite`` and read back: nothing is lost, nothing depends on chance."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tflite
from graphs import CORE_OPERATORS, EDGES, graphs, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge import profiles
from cactus_edge.errors import (
    InvalidGraphError,
    MalformedModelError,
    OutputError,
    UnsupportedModelError,
    UsageError,
)
from cactus_edge.flatbuffer import load, read_tflite, save, schema, storable, write_tflite
from cactus_edge.flatbuffer.packing import pack_int4, packed_size, unpack_int4
from cactus_edge.graph import (
    Activation,
    Add,
    Conv2D,
    DType,
    FullyConnected,
    Graph,
    Linear,
    MaxPool2D,
    Operator,
    Pad,
    Padding,
    Quantization,
    Reshape,
    Tensor,
    Weights,
)

ROOT = Path(__file__).resolve().parent.parent


def first(graph: Graph, kind: type[Operator]) -> Operator:
    return next(op for op in graph.operators if isinstance(op, kind))


def with_first(graph: Graph, kind: type[Operator], **changes: object) -> Graph:
    old = first(graph, kind)
    new = replace(old, **changes)
    return replace(graph, operators=tuple(new if op is old else op for op in graph.operators))


def layer(**changes: object) -> Graph:
    """One FULLY_CONNECTED of 3 inputs and 2 outputs, with per-channel scales."""
    scale = Quantization.of(0.05, -3)
    tensors = (Tensor("x", (1, 3), DType.INT8, scale), Tensor("y", (1, 2), DType.INT8, scale))
    bits = np.array([0.01, 0.02], np.float32).view(np.uint32)
    op = FullyConnected(
        name="dense",
        inputs=(0,),
        output=1,
        weights=Weights(np.array([[1, -2, 3], [-7, 5, 6]]), 8, bits),
        bias=np.array([10, -20]),
    )
    return Graph(tensors, (replace(op, **changes),), 0, 1)


# --------------------------------------------------------------------------------------- round trip
@given(
    graphs(bits=(8, 7, 4, 3, 2)),
    st.lists(st.tuples(st.text("abc/ é", max_size=5), st.binary(max_size=9)), max_size=3),
)
def test_round_trip_keeps_everything(graph: Graph, metadata: list[tuple[str, bytes]]) -> None:
    graph = replace(graph, metadata=tuple(metadata))
    data = write_tflite(graph)
    read = read_tflite(data)
    assert read.fingerprint() == graph.fingerprint()
    assert read.metadata == graph.metadata
    assert read.tensors == graph.tensors
    assert [op.name for op in read.operators] == [op.name for op in graph.operators]
    assert write_tflite(read) == data


@pytest.mark.parametrize("kind", CORE_OPERATORS)
def test_each_operator_alone(kind: str) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, operators=[kind], depth=2, classes=None)
        read = read_tflite(write_tflite(graph))
        assert read.fingerprint() == graph.fingerprint()
        assert kind in [op.kind for op in read.operators]


@pytest.mark.parametrize("edges", [EDGES, ("QUANTIZE",), ("SOFTMAX",), ("DEQUANTIZE",)])
def test_edges_survive(edges: tuple[str, ...]) -> None:
    for seed in range(10):
        graph = random_graph(np.random.default_rng(seed), edges=edges)
        read = read_tflite(write_tflite(graph))
        assert read.fingerprint() == graph.fingerprint()
        assert [op.kind for op in read.operators if op.kind in EDGES] == [
            kind for kind in EDGES if kind in edges
        ]


@given(st.lists(st.integers(-8, 7), max_size=40))
def test_int4_packing_is_invertible(values: list[int]) -> None:
    packed = pack_int4(np.array(values, np.int8))
    assert packed.size == packed_size(len(values))
    assert unpack_int4(packed, len(values)).tolist() == values


def test_int4_packs_the_low_nibble_first() -> None:
    assert pack_int4(np.array([[1, -2], [7, -8], [3, 0]], np.int8)[:, :]).tolist() == [
        0xE1,
        0x87,
        0x03,
    ]
    assert pack_int4(np.array([-1, 2, -3], np.int8)).tolist() == [0x2F, 0x0D]


def test_arithmetic_of_the_file_is_that_of_the_graph() -> None:
    """Bias scale is float32(input * weight), zero points are 0; read by the stock bindings."""
    model = tflite.Model.GetRootAs(write_tflite(layer()))
    subgraph = model.Subgraphs(0)
    names = [subgraph.Tensors(i).Name().decode() for i in range(subgraph.TensorsLength())]
    assert names == ["x", "y", "dense/weight", "dense/bias"]
    weights, bias = subgraph.Tensors(2), subgraph.Tensors(3)
    expected = np.float32(0.05) * np.array([0.01, 0.02], np.float32)
    assert bias.Quantization().ScaleAsNumpy().tolist() == expected.tolist()
    assert bias.Quantization().ZeroPointAsNumpy().tolist() == [0, 0]
    assert bias.Type() == tflite.TensorType.INT32
    assert weights.Quantization().ZeroPointAsNumpy().tolist() == [0, 0]
    assert weights.Quantization().QuantizedDimension() == 0
    data = model.Buffers(weights.Buffer()).DataAsNumpy().view(np.int8)
    assert data.tolist() == [1, -2, 3, -7, 5, 6]


def test_buffers_are_aligned_and_buffer_0_is_empty() -> None:
    for seed in range(10):
        data = write_tflite(random_graph(np.random.default_rng(seed)))
        model = tflite.Model.GetRootAs(data)
        assert model.Buffers(0).DataIsNone()
        for index in range(1, model.BuffersLength()):
            buffer = model.Buffers(index)
            start = buffer._tab.Vector(buffer._tab.Offset(4))
            assert start % schema.DATA_ALIGNMENT == 0


def test_operator_versions_are_the_lowest_that_all_runtimes_take() -> None:
    versions = {kind.name: kind.version for kind in schema.KINDS.values()}
    assert versions == {
        "CONV_2D": 3,
        "DEPTHWISE_CONV_2D": 3,
        "FULLY_CONNECTED": 4,
        "ADD": 2,
        "AVERAGE_POOL_2D": 2,
        "MAX_POOL_2D": 2,
        "PAD": 2,
        "RESHAPE": 1,
        "SOFTMAX": 2,
        "QUANTIZE": 1,
        "DEQUANTIZE": 2,
        "RELU": 2,
        "RELU6": 2,
        "RELU_N1_TO_1": 1,
        "LEAKY_RELU": 2,
        "LOGISTIC": 2,
        "TANH": 2,
        "HARD_SWISH": 1,
        "SUB": 2,
        "MUL": 2,
        "CONCATENATION": 2,
        "TRANSPOSE": 2,
        "STRIDED_SLICE": 2,
        "SLICE": 2,
        "PADV2": 2,
        "MEAN": 2,
        "SQUEEZE": 1,
        "EXPAND_DIMS": 1,
        "ARG_MAX": 2,
        "SHAPE": 1,
        "PACK": 1,
    }


def test_depthwise_is_quantized_along_the_last_dimension() -> None:
    graph = random_graph(
        np.random.default_rng(0),
        operators=["DEPTHWISE_CONV_2D"],
        depth=1,
        classes=None,
        per_channel=True,
        shape=(1, 4, 4, 3),
    )
    subgraph = tflite.Model.GetRootAs(write_tflite(graph)).Subgraphs(0)
    assert subgraph.Tensors(2).Quantization().QuantizedDimension() == 3


# ------------------------------------------------------------------------------------- determinism
def test_bytes_do_not_depend_on_the_hash_seed() -> None:
    script = (
        "import hashlib, sys; sys.path.insert(0, 'tests')\n"
        "import numpy as np; from graphs import EDGES, random_graph\n"
        "from cactus_edge.flatbuffer import write_tflite\n"
        "for s in range(5):\n"
        "    g = random_graph(np.random.default_rng(s), edges=EDGES, bits=(8, 3))\n"
        "    print(hashlib.sha256(write_tflite(g)).hexdigest())\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "20")
    ]
    assert outputs[0] == outputs[1]
    options = {"edges": EDGES, "bits": (8, 3)}
    here = [
        hashlib.sha256(write_tflite(random_graph(np.random.default_rng(s), **options))).hexdigest()
        for s in range(5)
    ]
    assert outputs[0].split() == here


# --------------------------------------------------------------------------------------- the schema
@pytest.mark.parametrize("package", ["tflite", "ai_edge_litert.schema_py_generated"])
def test_schema_agrees_with_generated_bindings(package: str) -> None:
    """Slot, type and default of each field; LiteRT's bindings are newer and know all of them."""
    bindings = (
        importlib.import_module(package) if package == "tflite" else pytest.importorskip(package)
    )
    missing: set[str] = set()
    for table, fields in schema.TABLES.items():
        for item in fields.values():
            words = item.name.split("_")
            function = f"{table}Add{''.join(word.capitalize() for word in words)}"
            if not hasattr(bindings, function):
                missing.add(f"{table}.{item.name}")
                continue
            source = inspect.getsource(getattr(bindings, function))
            found = re.search(r"Prepend(\w+)Slot\((\d+), .*, ([-\d.]+)\)", source)
            assert found is not None, source
            kind, slot, default = found.groups()
            assert int(slot) == item.slot, item
            assert kind.lower() == (item.type if item.scalar else "uoffsettrelative"), item
            assert float(default) == item.default, item
    newer = {
        "Tensor.external_buffer",
        "Model.external_buffer_groups",
        "Model.external_buffers",
        "FullyConnectedOptions.quant_spec",
    }
    deprecated = {"SignatureDef.deprecated_tag"}  # has no accessor
    assert missing == deprecated | (newer if package == "tflite" else set())


# ------------------------------------------------------------------- what a file cannot hold
def refused(graph: Graph, text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text) as caught:
        write_tflite(graph)
    assert "\n" not in str(caught.value)


def test_resolved_graphs_are_refused() -> None:
    refused(profiles.resolve(layer()), "operator 0 .*'dense'.*before `resolve`")


def test_clamps_are_written_as_activations_or_refused() -> None:
    graph = layer()
    for activation in Activation:
        op = replace(graph.operators[0], activation=activation)
        explicit = layer(clamp=graph.output_range(op))
        assert read_tflite(write_tflite(explicit)).operators[0].activation is activation
    refused(layer(clamp=(-5, 7)), r"clamp \(-5, 7\) is none of NONE, RELU, RELU6")


def test_int4_fully_connected_per_channel_is_refused() -> None:
    weights = replace(layer().operators[0].weights, bits=4)
    refused(layer(weights=weights), "'dense'.*1x1 CONV_2D")
    single = replace(weights, scale_bits=weights.scale_bits[:1])
    assert read_tflite(write_tflite(layer(weights=single))).operators[0].weights.bits == 4


def test_missing_scales_are_refused() -> None:
    weights = layer().operators[0].weights
    refused(layer(weights=replace(weights, scale_bits=[])), "'dense'.*weights have no scale")
    graph = layer()
    bare = replace(graph.tensors[1], quantization=None)
    refused(replace(graph, tensors=(graph.tensors[0], bare)), "tensor 'y'.*need a scale")


def test_bad_weight_scales_are_refused() -> None:
    for scale in (0.0, -1.0, float("nan"), float("inf"), 1e-40):
        bits = np.array([scale], np.float32).view(np.uint32)
        weights = replace(layer().operators[0].weights, scale_bits=bits)
        refused(layer(weights=weights), "'dense'.*is not a positive, normal float32")


def test_uint8_is_refused() -> None:
    graph = random_graph(np.random.default_rng(0), input_type=DType.UINT8)
    refused(graph, "tensor 'input': uint8 beside int8 weights")


@pytest.mark.parametrize("name", ["line\nbreak", "\x00", "\ud800"])
def test_unprintable_names_are_refused(name: str) -> None:
    graph = layer()
    refused(
        replace(graph, tensors=(replace(graph.tensors[0], name=name), graph.tensors[1])), "name"
    )
    refused(layer(name=name), "name")
    refused(replace(graph, metadata=((name, b""),)), "metadata entry")


@pytest.mark.parametrize(
    "name", [storable.BITS_ENTRY, "OfflineMemoryAllocation", "COMPRESSION_METADATA"]
)
def test_reserved_metadata_is_refused(name: str) -> None:
    refused(replace(layer(), metadata=((name, b"1"),)), f"metadata entry '{name}'.*reserved")


def test_a_reshape_must_be_the_only_reader_of_its_input() -> None:
    """Stock runtimes overwrite the input, see ``storable``."""
    scale = Quantization.of(0.05, 0)
    names = ("x", "y", "z", "s")
    tensors = tuple(Tensor(name, (1, 3), DType.INT8, scale) for name in names)
    identity = FullyConnected(
        name="dense",
        inputs=(0,),
        output=1,
        weights=Weights(np.eye(3), 8, np.array([0.5], np.float32).view(np.uint32)),
        bias=np.zeros(3),
    )
    reshape = Reshape(name="z", inputs=(1,), output=2)
    good = Add(name="s", inputs=(2, 2), output=3)
    graph = Graph(tensors, (identity, reshape, good), 0, 3)
    assert read_tflite(write_tflite(graph)).fingerprint() == graph.fingerprint()
    refused(with_first(graph, Add, inputs=(2, 1)), "RESHAPE 'z'.*used elsewhere")


def test_steps_that_runtimes_refuse_are_refused() -> None:
    graph = random_graph(
        np.random.default_rng(1),
        operators=["CONV_2D"],
        depth=1,
        classes=None,
        shape=(1, 1, 1, 2),
    )
    for steps in ({"stride": (1 << 15, 1)}, {"dilation": (1, 1 << 15)}):
        refused(with_first(graph, Conv2D, padding=Padding.SAME, **steps), "reach too far")


def test_activations_beyond_all_memory_are_refused() -> None:
    scale = Quantization.of(0.05, 0)
    shapes = ((1, 1, 1, 1), (1, 1 << 14, 1 << 14, 1))
    tensors = tuple(Tensor(n, s, DType.INT8, scale) for n, s in zip("xy", shapes, strict=True))
    pad = Pad(name="y", inputs=(0,), output=1, paddings=((0, 0), *[((1 << 14) - 1, 0)] * 2, (0, 0)))
    refused(Graph(tensors, (pad,), 0, 1), "tensor 'y': 268435456 elements")
    pool = MaxPool2D(
        name="y", inputs=(0,), output=1, window=(4, 1), stride=(1, 1), padding=Padding.SAME
    )
    small = (tensors[0], replace(tensors[0], name="y"))
    refused(Graph(small, (pool,), 0, 1), "more than twice the input")


def test_a_graph_that_breaks_a_constraint_is_refused_first() -> None:
    with pytest.raises(InvalidGraphError, match="operator 0 .*'dense'"):
        write_tflite(layer(bias=np.zeros(3)))


# --------------------------------------------------------------------------------------- files
def test_load_and_save(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.tflite"
    data = save(layer(), path)
    graph, read = load(path)
    assert read == data == path.read_bytes()
    assert graph.fingerprint() == layer().fingerprint()
    with pytest.raises(OutputError, match="exists already"):
        save(layer(), path)
    assert save(layer(bias=np.array([1, 2])), path, force=True) != data
    with pytest.raises(UsageError, match="no such model"):
        load(tmp_path / "absent.tflite")
    path.write_bytes(b"GIF89a")
    with pytest.raises(MalformedModelError, match=r"model\.tflite: not a \.tflite file"):
        load(path)


@settings(max_examples=25)
@given(graphs(depth=st.integers(1, 3)))
def test_linear_bits_are_kept_in_the_fewest_bytes(graph: Graph) -> None:
    """Only widths that the tensor types do not say cost a metadata entry."""
    data = write_tflite(graph)
    widths = {op.weights.bits for op in graph.operators if isinstance(op, Linear)}
    assert (storable.BITS_ENTRY.encode() in data) == (not widths <= {4, 8})
