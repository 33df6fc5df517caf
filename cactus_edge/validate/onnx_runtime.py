"""ONNX Runtime as an executor of our models, in their QDQ form with int8 activations.

Its fused kernels of convolutions and linear layers requantize by a float32 product whose factor is
formed from left to right: the arithmetic of the profiles ``litert-xnnpack-*`` for int8 weights.
Sums it rounds in float32, which is the same where none comes near a half. Averages, and other
sums, it computes in ways that no profile describes, so that models with them are not covered.
Fusing int8 convolutions has to be allowed in the session (``served`` does).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cactus_edge import universal
from cactus_edge.errors import CactusEdgeError
from cactus_edge.graph import (
    Add,
    DType,
    Graph,
    Int64Array,
    Linear,
    MaxPool2D,
    Operator,
    Pad,
    Reshape,
)
from cactus_edge.validate.child import Part, Worker

MODE = "onnx"


def outside(graph: Graph) -> str:
    """Why ONNX Runtime's integers are not known for this model, or an empty string."""
    if graph.tensors[graph.core_input].dtype is not DType.INT8:
        return "the input is not int8"
    for op in graph.core:
        where = f"{op.kind} '{op.name}'"
        if isinstance(op, Linear):
            if op.weights.bits <= 4 and not universal.is_universal(graph):
                return f"{where}: no profile has int4 weights as ONNX Runtime rounds them"
        elif isinstance(op, Add) and universal.sum_agrees(graph, op):
            if _near_halves(graph, op):
                return f"{where}: sums come so near to halves that float arithmetic decides"
        elif not isinstance(op, MaxPool2D | Pad | Reshape):
            return f"{where}: no profile describes how ONNX Runtime computes it"
    try:
        _content(graph)
    except CactusEdgeError as error:
        return str(error)
    return ""


def _near_halves(graph: Graph, op: Add) -> int:
    from cactus_edge.onnx_io.quantized import near_halves

    return near_halves([graph.tensors[index] for index in (*op.inputs, op.output)])


def _content(graph: Graph) -> bytes:
    from cactus_edge.onnx_io import qdq

    return qdq.convert(graph, signed=True)


class OnnxWorker(Worker):
    """A ``Worker`` whose files are QDQ models."""

    def __init__(self) -> None:
        """There is one mode."""
        super().__init__("onnxruntime", MODE)

    def _bytes(self, graph: Graph) -> bytes:
        return _content(graph)

    def run(self, parts: Sequence[Part]) -> list[Int64Array]:
        """See ``Worker.run``; what only moves elements at the end of a graph is done here."""
        from cactus_edge.onnx_io import qdq

        cut = [_cut(graph) for graph, _ in parts]
        asked = [
            (graph, qdq.prepare(graph, batch, signed=True).astype(np.int64))
            for (graph, _), (_, batch) in zip(cut, parts, strict=True)
            if graph.operators
        ]
        answers = iter(super().run(asked) if asked else [])
        outputs: list[Int64Array] = []
        for (graph, moves), (_, batch) in zip(cut, parts, strict=True):
            found = batch
            if graph.operators:
                found = qdq.finish(graph, next(answers), signed=True).astype(np.int64)
            outputs.append(_moved(graph, found, moves))
        return outputs


def _cut(graph: Graph) -> tuple[Graph, tuple[Operator, ...]]:
    """The graph up to the last operator that computes, and the ones behind it."""
    core = list(graph.core)
    moves: list[Operator] = []
    while core and isinstance(core[-1], Pad | Reshape):
        moves.insert(0, core.pop())
    output = core[-1].output if core else graph.core_input
    return Graph(graph.tensors, tuple(core), graph.core_input, output), tuple(moves)


def _moved(graph: Graph, values: Int64Array, moves: Sequence[Operator]) -> Int64Array:
    for op in moves:
        target = graph.tensors[op.output]
        if isinstance(op, Pad):
            pads = ((0, 0), *op.paddings[1:])
            values = np.pad(values, pads, constant_values=target.zero_point)
        values = values.reshape(len(values), *target.shape[1:])
    return values
