"""ONNX nodes to the stages of ``lowering``: one function for each operator that has a form there.

Normalization, biases and activations are folded into the layer that made their input when nothing
else reads it; otherwise they become a depthwise 1x1 layer of their own. Concat becomes a sum of
layers that put each operand at its place. What is left is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cactus_edge.lowering.stages import INPUT, NO_PADS, Layer, Sum, output_of
from cactus_edge.onnx_io import images, linear, views
from cactus_edge.onnx_io.building import Builder, Translation
from cactus_edge.onnx_io.merge import merged
from cactus_edge.onnx_io.reading import File, Node, fitting, fold

_MOVING: dict[str, Callable[[Builder, Node], None]] = {
    "Cast": views.nothing,
    "Dropout": views.nothing,
    "Flatten": views.view,
    "Identity": views.nothing,
    "Reshape": views.view,
    "Shape": views.shape,
    "Squeeze": views.view,
    "Transpose": views.view,
    "Unsqueeze": views.view,
}
_COMPUTING: dict[str, Callable[[Builder, Node], None]] = {
    "Add": linear.add,
    "AveragePool": images.pool,
    "BatchNormalization": linear.normalization,
    "Clip": linear.clip,
    "Concat": images.concat,
    "Conv": linear.convolution,
    "Div": linear.affine,
    "Gemm": linear.gemm,
    "GlobalAveragePool": images.global_pool,
    "LogSoftmax": views.softmax,
    "MatMul": linear.matmul,
    "MaxPool": images.pool,
    "Mul": linear.affine,
    "Pad": images.pad,
    "ReduceMean": images.global_pool,
    "Relu": linear.relu,
    "Softmax": views.softmax,
    "Sub": linear.affine,
}
_QUANTIZED = (
    "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
    "QuantizeLinear",
)  # fmt: skip
_RANDOM = (
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
)  # fmt: skip
OPERATORS = tuple(sorted({**_MOVING, **_COMPUTING}))


def translate(file: File) -> Translation:
    """The stages that compute a file's output.

    Raises:
        UnsupportedModelError: something has no form; the message names node, operator and remedy.
    """
    for node in file.nodes:
        if node.kind in _QUANTIZED:
            raise node.error(
                "the file is quantized already", "convert it without --calibration, or its original"
            )
    builder = Builder(file)
    for node in file.nodes:
        with fitting(node):
            _node(builder, node)
    return _finished(builder)


def _node(builder: Builder, node: Node) -> None:
    """One node, folded where nothing in it depends on the input."""
    if node.kind in _RANDOM:
        raise node.error("its values are drawn anew each time", "export in evaluation mode")
    if all(name in builder.constants for name in node.inputs if name):
        values = fold(builder.file, node, builder.constants)
        builder.constants.update(zip(node.outputs, values, strict=False))
    elif builder.made.tail and node.kind not in _MOVING:
        raise node.error(f"it reads a {builder.made.tail[-1]}, which may only end the network")
    elif node.kind in _MOVING:
        _MOVING[node.kind](builder, node)
    elif node.kind in _COMPUTING:
        _COMPUTING[node.kind](builder, node)
    else:
        known = ", ".join(OPERATORS)
        raise node.error("the operator has no integer form", f"known are {known}")


def _finished(builder: Builder) -> Translation:
    """Check the output."""
    file, made = builder.file, builder.made
    end, last = file.nodes[-1], builder.values.get(file.output)
    if last is None or not any(isinstance(stage, Layer) for stage in made.stages):
        raise end.error("the output does not depend on the input through a layer")
    if last.pads != NO_PADS or last.source != output_of(made.stages[-1]):
        raise end.error("the output is not what the last layer yields")
    classes = [extent for extent in last.shape if extent != 1]
    if len(classes) > 1 or not last.is_plain:
        raise end.error(
            f"the output has shape {list(last.shape)}", "logits are one vector, [1, classes]"
        )
    if isinstance(made.stages[-1], Sum):  # integer graphs end in a layer
        size = builder.shapes[last.source][0]
        name = f"{last.source}/logits"
        builder.emit(builder.spread(name, last, np.ones(size), np.zeros(size)))
    assert builder.order is not None
    made.order = builder.order.reshape(file.shape[1:])
    made.shape = builder.shapes[INPUT]
    made.stages = merged(made.stages)
    return made
