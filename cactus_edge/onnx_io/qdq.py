"""The integers of a graph as an ONNX model in QDQ form, for ONNX Runtime.

Every layer is DequantizeLinear, a float operator, QuantizeLinear, with the graph's own scales and
integer weights; ONNX Runtime fuses the three into its integer kernels. Activations are unsigned
bytes (stored + 128 where they are signed), the form in which its x86 kernels are fastest, or signed
ones, of which no kernel saturates products: CPUs without VNNI do with unsigned bytes. Images are
[n, channels, height, width], as ONNX wants them; where features are flattened, the next layer's
weights change their order instead of the activations. int4 weights become int8 of the same value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_edge.errors import MissingExtraError
from cactus_edge.flow import Edge, Layer, Pool, Step, Sum, byte_offset, flow
from cactus_edge.graph import Graph

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise MissingExtraError("onnx", "onnx", "writing ONNX files") from None

Array = npt.NDArray[np.generic]

INPUT, OUTPUT = "images", "logits"
_OPSET, _IR_VERSION = 17, 9
_BATCH = "n"


def convert(graph: Graph, *, signed: bool = False) -> bytes:
    """An ONNX file that takes ``prepare``d images and returns bytes of logits, any number at once.

    Args:
        graph: with scales.
        signed: whether activations are int8 instead of uint8.

    Raises:
        ToolError: something has no form in ONNX.
    """
    steps = flow(graph, channels_first=True)
    writer = _Writer(steps.source.index, steps.target.index, signed)
    for step in steps.steps:
        writer.step(step)
    kind = TensorProto.INT8 if signed else TensorProto.UINT8
    ends = [
        helper.make_tensor_value_info(name, kind, [_BATCH, *edge.shape])
        for name, edge in ((INPUT, steps.source), (OUTPUT, steps.target))
    ]
    network = helper.make_graph(writer.nodes, "main", ends[:1], ends[1:], writer.constants)
    model = helper.make_model(
        network, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


def prepare(graph: Graph, stored: Array, *, signed: bool = False) -> Array:
    """Stored images [n, ...] as bytes [n, channels, height, width] or [n, features]."""
    tensor = graph.tensors[graph.core_input]
    shifted = stored.astype(np.int16) + byte_offset(tensor.dtype)
    values = (shifted - 128).astype(np.int8) if signed else shifted.astype(np.uint8)
    if values.ndim == 4 and values.shape[1:3] != (1, 1):
        return np.ascontiguousarray(np.moveaxis(values, 3, 1))
    return values.reshape(len(values), -1)


def finish(graph: Graph, output: Array, *, signed: bool = False) -> Array:
    """Bytes of logits, channels first where they have height and width, as stored integers."""
    tensor = graph.tensors[graph.logits]
    values = np.moveaxis(output, 1, 3) if output.ndim == 4 else output
    values = values.astype(np.int16) + 128 * signed - byte_offset(tensor.dtype)
    return values.astype(tensor.dtype.value).reshape(len(output), *tensor.shape[1:])


class _Writer:
    """Nodes and constants as they come; activations between layers are bytes."""

    def __init__(self, source: int, target: int, signed: bool) -> None:
        self._signed = signed
        self._names = {source: INPUT, target: OUTPUT}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def step(self, step: Step) -> None:
        """One layer."""
        match step:
            case Layer():
                self._layer(step)
            case Pool():
                self._pool(step)
            case Sum():
                pair = [self._real(edge) for edge in step.sources]
                self._quantize(self._node("Add", pair), step.target, step.limits)

    def _layer(self, layer: Layer) -> None:
        real = self._real(layer.source, flatten=layer.flatten)
        weights = self._constant_real(layer.weights, layer.scales)
        bias = self._constant_real(layer.bias, layer.scales * np.float32(layer.source.scale))
        if layer.weights.ndim == 2:
            value = self._node("Gemm", [real, weights, bias], transB=1)
        else:
            value = self._node(
                "Conv",
                [real, weights, bias],
                pads=layer.pads,
                strides=layer.stride,
                dilations=layer.dilation,
                group=layer.groups,
                kernel_shape=layer.weights.shape[2:],
            )
            value = self._flat(value, layer.target)
        self._quantize(value, layer.target, layer.limits)

    def _pool(self, pool: Pool) -> None:
        options: dict[str, Any] = {
            "kernel_shape": pool.window,
            "strides": pool.stride,
            "pads": pool.pads,
        }
        if pool.average:
            value = self._node("AveragePool", [self._real(pool.source)], **options)
            self._quantize(self._flat(value, pool.target), pool.target, None)
        elif len(pool.target.shape) == 1:
            value = self._node("MaxPool", [self._name(pool.source)], **options)
            self._node("Flatten", [value], self._name(pool.target), axis=1)
        else:
            self._node("MaxPool", [self._name(pool.source)], self._name(pool.target), **options)

    def _flat(self, value: str, target: Edge) -> str:
        """What windows leave of one pixel, without its height and width."""
        return self._node("Flatten", [value], axis=1) if len(target.shape) == 1 else value

    def _name(self, edge: Edge) -> str:
        return self._names.setdefault(edge.index, f"t{edge.index}")

    def _node(self, kind: str, inputs: list[str], output: str | None = None, **options: Any) -> str:
        output = output or f"v{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [output], f"n{len(self.nodes)}", **options)
        self.nodes.append(node)
        return output

    def _constant(self, values: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def _real(self, edge: Edge, flatten: bool = False) -> str:
        name = self._name(edge)
        if flatten:
            name = self._node("Flatten", [name], axis=1)
        return self._node("DequantizeLinear", [name, *self._scale(edge)])

    def _scale(self, edge: Edge) -> list[str]:
        zero = np.int8(edge.zero - 128) if self._signed else np.uint8(edge.zero)
        return [self._constant(np.float32(edge.scale)), self._constant(zero)]

    def _constant_real(self, values: Array, scales: npt.NDArray[np.float32]) -> str:
        """Integers with one scale for each index of the first axis."""
        inputs = [values, scales, np.zeros(scales.size, values.dtype)]
        return self._node("DequantizeLinear", [self._constant(x) for x in inputs], axis=0)

    def _quantize(self, value: str, edge: Edge, limits: tuple[int, int] | None) -> None:
        if limits is not None:
            ends = [np.float32((limit - edge.zero) * edge.scale) for limit in limits]
            value = self._node("Clip", [value, *(self._constant(end) for end in ends)])
        self._node("QuantizeLinear", [value, *self._scale(edge)], self._name(edge))
