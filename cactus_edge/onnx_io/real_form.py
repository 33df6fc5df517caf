"""The dequantized network as a float ONNX model, for verifiers of real arithmetic.

Weights are ``integer * scale``, biases ``integer * input scale * weight scale``. A fused ReLU stays
one; there is no rounding, and no saturation of other layers. So a proof about this network is none
about the integers: it is for comparing verifiers, on the same weights. Images are [1, channels,
height, width], real values in [0, 1].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_edge.errors import MissingExtraError
from cactus_edge.flow import Edge, Layer, Pool, Step, Sum, flow
from cactus_edge.graph import Activation, Graph

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise MissingExtraError("onnx", "onnx", "writing ONNX files") from None

INPUT, OUTPUT = "X", "Y"
_OPSET, _IR_VERSION = 13, 8


def convert_real(graph: Graph) -> bytes:
    """The file, with a batch of 1.

    Raises:
        ToolError: something has no form in ONNX.
    """
    steps = flow(graph, channels_first=True)
    writer = _Writer(steps.source, steps.target)
    for step in steps.steps:
        writer.step(step)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, *edge.shape])
        for name, edge in ((INPUT, steps.source), (OUTPUT, steps.target))
    ]
    network = helper.make_graph(writer.nodes, "main", ends[:1], ends[1:], writer.constants)
    model = helper.make_model(
        network, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


class _Writer:
    """Nodes and constants as they come."""

    def __init__(self, source: Edge, target: Edge) -> None:
        self._names = {source.index: INPUT}
        self._target = target.index
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def step(self, step: Step) -> None:
        """One layer."""
        match step:
            case Layer():
                value = self._layer(step)
                activation = step.activation
            case Pool():
                options = {"kernel_shape": step.window, "strides": step.stride, "pads": step.pads}
                kind = "AveragePool" if step.average else "MaxPool"
                value, activation = self._node(kind, self._name(step.source), **options), None
                value = self._flat(value, step.target)
            case Sum():
                value = self._node("Add", *(self._name(edge) for edge in step.sources))
                activation = step.activation
        if activation is Activation.RELU:
            value = self._node("Relu", value)
        elif activation is Activation.RELU6:
            value = self._node("Clip", value, self._constant(0.0), self._constant(6.0))
        self._names[step.target.index] = value
        if step.target.index == self._target:
            self.nodes[-1].output[0] = OUTPUT
            self._names[step.target.index] = OUTPUT

    def _layer(self, layer: Layer) -> str:
        scales = layer.scales.astype(np.float64)
        weight = layer.weights * scales.reshape(-1, *[1] * (layer.weights.ndim - 1))
        bias = layer.bias * scales * layer.source.scale
        inputs = [self._constant(weight), self._constant(bias)]
        source = self._name(layer.source)
        if layer.weights.ndim == 2:
            source = self._node("Flatten", source, axis=1) if layer.flatten else source
            return self._node("Gemm", source, *inputs, transB=1)
        value = self._node(
            "Conv",
            source,
            *inputs,
            pads=layer.pads,
            strides=layer.stride,
            dilations=layer.dilation,
            group=layer.groups,
            kernel_shape=layer.weights.shape[2:],
        )
        return self._flat(value, layer.target)

    def _flat(self, value: str, target: Edge) -> str:
        return self._node("Flatten", value, axis=1) if len(target.shape) == 1 else value

    def _name(self, edge: Edge) -> str:
        return self._names[edge.index]

    def _node(self, kind: str, *inputs: str, **options: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **options))
        return name

    def _constant(self, values: npt.ArrayLike) -> str:
        name = f"c{len(self.constants)}"
        array = np.asarray(values, np.float32, order="C")
        self.constants.append(numpy_helper.from_array(array, name))
        return name
