"""Bytes that are no flatbuffer, or one that costs more to read than it is long."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import tflite

from cactus_edge.errors import (
    MalformedModelError,
    UnsupportedModelError,
)
from cactus_edge.flatbuffer import read_tflite, schema, storable, wire, write_tflite
from cactus_edge.flatbuffer.writer import model_values
from cactus_edge.graph import (
    DType,
    FullyConnected,
    Graph,
    Quantization,
    Reshape,
    Tensor,
    Weights,
)
from tests.flatbuffer_edits import (
    check,
    edited,
    float_bits,
    model,
    operator,
    options,
    put,
    sample,
    tensor,
    thaw,
)


@pytest.mark.parametrize("data", [b"", b"TFL3", b"\x1c\0\0\0TFL2" + bytes(40), b"PK\3\4" * 20])
def test_not_a_model(data: bytes) -> None:
    check(data, MalformedModelError, "not a .tflite file")


def test_root_outside_the_file() -> None:
    for root in (0, 4, 5, 48, 2**31, 2**32 - 1):
        data = struct.pack("<I", root) + b"TFL3" + bytes(40)
        with pytest.raises(MalformedModelError, match="^m: "):
            read_tflite(data, "m")


def test_fields_of_a_newer_schema_are_refused() -> None:
    """Slots behind the known ones may change what a runtime does."""
    table = schema.TABLES["SoftmaxOptions"]
    table["future"] = schema.Field(1, "future", "int32")
    try:
        data = edited(put(options(7), future=1))
    finally:
        del table["future"]
    with pytest.raises(UnsupportedModelError, match=r"field 1 of its SoftmaxOptions table"):
        read_tflite(data)


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ("Tensor", "sparsity"),
        ("Tensor", "variant_tensors"),
        ("Operator", "builtin_options_2"),
        ("Model", "external_buffers"),
        ("FullyConnectedOptions", "quant_spec"),
    ],
)
def test_opaque_fields_are_refused(table: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse tensors above all, which stock runtimes silently read as if they were dense."""
    known = schema.TABLES[table][field]
    places = {
        "Tensor": tensor("logits/weight"),
        "Operator": operator(1),
        "Model": model,
        "FullyConnectedOptions": options(6),
    }
    stand_in = schema.Field(known.slot, field, "[int32]")
    with monkeypatch.context() as patch:
        patch.setitem(schema.TABLES[table], field, stand_in)
        data = edited(put(places[table], **{field: [1]}))
    with pytest.raises(UnsupportedModelError, match="not supported|quant_spec"):
        read_tflite(data)


def test_a_vector_longer_than_the_file() -> None:
    data = bytearray(write_tflite(sample()))
    subgraph = tflite.Model.GetRootAs(data).Subgraphs(0)
    start = subgraph._tab.Vector(subgraph._tab.Offset(4)) - 4
    for length in (1 << 20, (1 << 32) - 1):
        struct.pack_into("<I", data, start, length)
        with pytest.raises(MalformedModelError, match=f"'tensors' of {length} elements is longer"):
            read_tflite(bytes(data))


def test_work_is_bounded_by_the_size_of_the_file() -> None:
    """Entries that all refer to one long name would cost the product of their sizes."""
    tree = thaw(model_values(sample()))
    tree["operator_codes"][0]["custom_code"] = "x" * 16_000
    tree["metadata"] += [{"name": "n"} for _ in range(3000)]
    data = bytearray(wire.serialize(tree))
    assert len(read_tflite(bytes(data)).metadata) == 3001
    model = tflite.Model.GetRootAs(data)
    table = model.OperatorCodes(0)._tab
    target = table.Vector(table.Offset(6)) - 4
    for index in range(1, model.MetadataLength()):
        table = model.Metadata(index)._tab
        at = table.Pos + table.Offset(4)
        struct.pack_into("<I", data, at, target - at)
    with pytest.raises(MalformedModelError, match="refers to the same bytes over and over"):
        read_tflite(bytes(data))


def test_too_many_operators() -> None:
    tree = thaw(model_values(sample()))
    operators = tree["subgraphs"][0]["operators"]
    tree["subgraphs"][0]["operators"] = operators * (storable.MOST_OPERATORS // 4)
    with pytest.raises(UnsupportedModelError, match="operators; up to 4096 are supported"):
        read_tflite(wire.serialize(tree))


def test_long_chains_do_not_exhaust_the_stack() -> None:
    scale = Quantization.of(0.05, 0)
    count = 1500
    tensors = tuple(Tensor(f"t{i}", (1, 3), DType.INT8, scale) for i in range(count + 2))
    chain = [Reshape(name=f"r{i}", inputs=(i,), output=i + 1) for i in range(count)]
    dense = FullyConnected(
        name="dense",
        inputs=(count,),
        output=count + 1,
        weights=Weights(np.eye(3), 8, float_bits(0.5)),
        bias=np.zeros(3),
    )
    graph = Graph(tensors, (*chain, dense), 0, count + 1)
    assert read_tflite(write_tflite(graph)).fingerprint() == graph.fingerprint()
