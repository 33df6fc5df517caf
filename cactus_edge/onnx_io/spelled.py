"""QLinear operators of ONNX and of ONNX Runtime, spelled out as QDQ nodes of the same integers.

A QLinearConv says in one node what DequantizeLinear, Conv and QuantizeLinear say in several. So do
QLinearMatMul, and in ONNX Runtime's own domain QGemm and QLinearAdd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import helper

from cactus_edge.onnx_io.reading import RUNTIME_KINDS, Array, File, Node

KINDS = frozenset({"QLinearConv", "QLinearMatMul", *RUNTIME_KINDS})


def spelled_out(file: File) -> File:
    """The file without QLinear operators.

    Raises:
        UnsupportedModelError: a scale is not a constant.
    """
    if not any(node.kind in KINDS for node in file.nodes):
        return file
    writer = _Writer(file.constants)
    for node in file.nodes:
        writer.node(node)
    return replace(file, nodes=tuple(writer.nodes), constants=writer.constants)


class _Writer:
    def __init__(self, constants: Mapping[str, Array]) -> None:
        self.nodes: list[Node] = []
        self.constants = dict(constants)

    def node(self, node: Node) -> None:
        """One node, as one or several."""
        match node.kind:
            case "QLinearConv":
                self._layer(node, "Conv", node.attributes, 0, (3, 4, 5), (6, 7), 8)
            case "QLinearMatMul":
                self._layer(node, "MatMul", {}, 1, (3, 4, 5), (6, 7), None)
            case "QGemm":
                axis = 0 if node.get("transB", 0) else 1
                self._layer(node, "Gemm", node.attributes, axis, (3, 4, 5), (7, 8), 6)
            case "QLinearAdd":
                pair = [self._real(node, position) for position in ((0, 1, 2), (3, 4, 5))]
                self._quantized(node, self._made(node, "Add", pair, {}), (6, 7))
            case _:
                self.nodes.append(node)

    def _layer(
        self,
        node: Node,
        kind: str,
        attributes: Mapping[str, Any],
        axis: int,
        weights: tuple[int, int, int],
        target: tuple[int, int],
        bias: int | None,
    ) -> None:
        inputs = [self._real(node, (0, 1, 2)), self._real(node, weights, axis)]
        if bias is not None and _given(node, bias):
            source = self._constant(node, 1)
            if source.size != 1:
                raise node.error("activations have one scale")
            # Nothing says so, but a bias is stored at input scale times weight scale.
            scale = source * self._constant(node, weights[1])
            name, zero = f"{node.output}/bias_scale", f"{node.output}/bias_zero"
            self.constants[name] = scale.astype(np.float32).reshape(-1)
            self.constants[zero] = np.zeros(scale.size, np.int32)
            parts = [node.inputs[bias], name, zero]
            inputs.append(self._made(node, "DequantizeLinear", parts, {"axis": 0}))
        self._quantized(node, self._made(node, kind, inputs, attributes), target)

    def _constant(self, node: Node, position: int) -> Array:
        name = node.inputs[position] if _given(node, position) else ""
        if name not in self.constants:
            raise node.error("scale and zero point must be constants, both given")
        values = self.constants[name]
        if values.dtype.name not in ("float32", "int8", "uint8"):
            raise node.error(f"its scale or zero point is {values.dtype}")
        return values

    def _real(self, node: Node, positions: tuple[int, int, int], axis: int = 1) -> str:
        scale, zero = (self._constant(node, position) for position in positions[1:])
        names = [node.inputs[position] for position in positions]
        if zero.size == 1 and scale.size > 1:
            names[2] = f"{names[2]}/{scale.size}"
            self.constants[names[2]] = np.repeat(zero.reshape(1), scale.size)
        return self._made(node, "DequantizeLinear", names, {"axis": axis})

    def _quantized(self, node: Node, real: str, positions: tuple[int, int]) -> None:
        for position in positions:
            self._constant(node, position)
        names = [real, *(node.inputs[position] for position in positions)]
        self._made(node, "QuantizeLinear", names, {}, node.output)

    def _made(
        self,
        node: Node,
        kind: str,
        inputs: list[str],
        attributes: Mapping[str, Any],
        output: str = "",
    ) -> str:
        output = output or f"{node.output}/{kind}{len(self.nodes)}"
        proto = helper.make_node(kind, inputs, [output], node.name)
        self.nodes.append(Node(kind, node.name, tuple(inputs), (output,), attributes, proto))
        return output


def _given(node: Node, position: int) -> bool:
    return position < len(node.inputs) and bool(node.inputs[position])
