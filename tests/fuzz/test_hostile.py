"""Files that ask for more than they hold; too large to be stored, so they are made here."""

from __future__ import annotations

import io
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cactus_edge.flatbuffer.wire import open_root, serialize
from tests.fuzz import seeds
from tests.fuzz.limits import SECONDS, memory_limit
from tests.fuzz.targets import TARGETS

_DECLARED = b"".join(b"(declare-const %s Real)" % n for n in (b"X_0", b"X_1", b"Y_0", b"Y_1"))
_CODE = {"deprecated_builtin_code": 9, "builtin_code": 9, "version": 4}


def _model(
    tensors: list[dict[str, object]], operators: list[dict[str, object]], **more: object
) -> bytes:
    subgraph = {"tensors": tensors, "inputs": (0,), "outputs": (0,), "operators": operators}
    values = {"version": 3, "operator_codes": [_CODE], "buffers": [{}], "subgraphs": [subgraph]}
    return serialize({**values, **more})


def one_table_many_times() -> bytes:
    """A list of 40,000 tensors that all are the same table."""
    count, data = 40_000, bytearray(_model([{"shape": (1, 4), "type": 9, "name": "t"}], []))
    subgraph = open_root(bytes(data), "model").tables("subgraphs", "subgraph")[0]
    data += bytes(-len(data) % 4)
    start, table = len(data), len(data) + 4 + 4 * count + 4
    vector = subgraph._at("tensors")
    assert vector is not None
    struct.pack_into("<I", data, vector, start - vector)
    offsets = (table - (start + 4 + 4 * i) for i in range(count))
    data += struct.pack("<I", count) + b"".join(struct.pack("<I", offset) for offset in offsets)
    return bytes(data + struct.pack("<HHi", 4, 4, 4))


def one_constant_many_times() -> bytes:
    """A megabyte of weights in 400 layers."""
    side, layers = 1000, 400
    scale = {"scale": np.full(1, 0.01, np.float32).view(np.uint32), "zero_point": (0,)}
    square = {"shape": (side, side), "type": 9, "name": "w", "buffer": 1, "quantization": scale}
    tensors: list[dict[str, object]] = [square]
    tensors += [
        {"shape": (1, side), "type": 9, "name": f"t{i}", "quantization": scale}
        for i in range(layers + 1)
    ]
    options = {"builtin_options_type": 8, "builtin_options": ("FullyConnectedOptions", {})}
    operators = [
        {"opcode_index": 0, "inputs": (i + 1, 0, -1), "outputs": (i + 2,), **options}
        for i in range(layers)
    ]
    return _model(tensors, operators, buffers=[{}, {"data": bytes(side * side)}])


def a_missing_declaration() -> bytes:
    """The last of 20,000 variables is called otherwise."""
    names = (b"(declare-const X_%d Real)" % i for i in (*range(20_000), 30_000))
    return b"".join(names) + b"(declare-const Y_0 Real)(assert (<= X_0 1))"


def empty_lists() -> bytes:
    """A formula of 600,000 empty lists."""
    return _DECLARED + b"(assert (and " + b"()" * 600_000 + b"))"


def many_nodes() -> bytes:
    """5,000 ReLUs."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Relu", [f"r{i}"], [f"r{i + 1}"]) for i in range(5_000)]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("r0", "r5000")
    ]
    graph = helper.make_graph(nodes, "main", ends[:1], ends[1:])
    model: onnx.ModelProto = helper.make_model(graph)
    return model.SerializeToString()


def packed_zeros() -> bytes:
    """An archive of arrays a thousand times its size."""
    stream = io.BytesIO()
    labels, zeros = np.arange(2), np.zeros((2, 1 << 25), np.uint8)
    np.savez_compressed(stream, x_train=zeros, y_train=labels, x_test=zeros, y_test=labels)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("target", "make"),
    [
        ("tflite", one_table_many_times),
        ("tflite", one_constant_many_times),
        ("query", a_missing_declaration),
        ("query", empty_lists),
        ("onnx", many_nodes),
        ("arrays", packed_zeros),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_small_files_that_ask_for_much(target: str, make: Callable[[], bytes]) -> None:
    data, read = make(), TARGETS[target]
    read.accepts(read.seeds()[0])  # imports what it needs
    start = time.process_time()
    assert not read.accepts(data)
    assert time.process_time() - start < SECONDS
    tracemalloc.start()
    try:
        read.accepts(data)
        assert tracemalloc.get_traced_memory()[1] <= memory_limit(len(data))
    finally:
        tracemalloc.stop()


def test_checkpoints_run_no_code(tmp_path: Path) -> None:
    """A pickle under a checkpoint's name is refused, and nothing in it is called."""

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (tmp_path.joinpath("ran").write_text, ("",))

    for data in (pickle.dumps(Payload()), seeds.checkpoint()[0] + pickle.dumps(Payload())):
        assert not TARGETS["checkpoint"].accepts(data)
    assert not (tmp_path / "ran").exists()
