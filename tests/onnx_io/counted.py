"""Prints the table of docs/onnx.md, of this machine: ``python -m tests.onnx_io.counted``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cactus_edge import read_tflite
from cactus_edge.execute import execute
from cactus_edge.graph import Graph
from cactus_edge.onnx_io import export
from cactus_edge.universalize import universalize
from cactus_edge.validate.onnx_runtime import OnnxWorker
from tests.onnx_io.test_export import averaging, nothing

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("digits-0.05", "fashion-mnist-0.1", "mnist-0.1", "turbofan-0.01")
SAMPLES = 64


def default(graph: Graph, *, signed: bool = True) -> str:
    """Logits that differ in a session as it is set up, of all."""
    content = export.to_qdq(graph, signed=signed)
    found = export.compare(graph, content, nothing(graph), signed=signed)
    return f"{min(found.differences.values())} of {found.elements}"


def allowed(graph: Graph) -> str:
    """The same where ``session.qdqisint8allowed`` is set to 1."""
    shape = graph.tensors[graph.core_input].shape[1:]
    stored = np.random.default_rng(0).integers(-128, 128, (SAMPLES, *shape))
    (found,) = OnnxWorker().run([(graph, stored)])
    wanted = execute(graph, stored)
    return f"{int((wanted.ravel() != found.ravel()).sum())} of {wanted.size}"


def main() -> None:
    for name in MODELS:
        graph = read_tflite((ROOT / "models" / name / "model.tflite").read_bytes())
        print(f"| `models/{name}` | int8 (default) | {default(graph)} |")
        print(f"| the same | `--uint8` | {default(graph, signed=False)} |")
    graph = averaging(0)
    moved = universalize(graph, even_pools=True)[0]
    print(f"| a sum and a 2 x 2 average pool, universal | int8 (default) | {default(graph)} |")
    print(f"| the same, `session.qdqisint8allowed` set to `1` | int8 | {allowed(graph)} |")
    print(f"| the same after `universalize --even-pools` | int8 (default) | {default(moved)} |")
    print(f"| both | int8 | {allowed(moved)} |")


if __name__ == "__main__":
    main()
