"""Convolutions, matrices, what is folded into them, sums and activations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from cactus_edge.lowering.stages import NO_PADS, Flatten, FloatArray, Layer, Sum
from cactus_edge.onnx_io.building import Builder
from cactus_edge.onnx_io.reading import Node
from cactus_edge.onnx_io.windows import windows


def convolution(builder: Builder, node: Node) -> None:
    """Conv, full, depthwise or in groups."""
    value, (channels, height, width) = builder.image(node)
    weight, groups = builder.required(node, 1), node.get("group", 1)
    if weight.ndim != 4:
        raise node.error(f"weights {list(weight.shape)}", "only 2-D convolutions are supported")
    out = len(weight)
    if groups < 1 or out % groups or weight.shape[1] * groups != channels:
        raise node.error(f"weights {list(weight.shape)} in {groups} groups on {channels} channels")
    bias = _bias(builder, node, out)
    stride, dilation = node.get("strides", (1, 1)), node.get("dilations", (1, 1))
    kernel = (weight.shape[2], weight.shape[3])
    pads, extents = windows(node, (height, width), kernel, stride, dilation, value.pads)
    if groups not in (1, channels):
        weight = _ungrouped(weight, groups)
        builder.made.notes.append(
            f"node '{node.name}' ({node.kind}): {groups} groups become one, with zeros"
        )
        groups = 1
    builder.read(node.name, value)
    builder.emit(
        Layer(
            node.name, node.output, weight, bias, stride=stride, padding=pads,
            dilation=dilation, groups=groups,
        )
    )  # fmt: skip
    builder.give(node, (out, *extents))


def gemm(builder: Builder, node: Node) -> None:
    """Gemm of samples and a constant matrix."""
    if node.get("transA", 0):
        raise node.error("transA is set", "the first operand holds samples as rows")
    weight = builder.required(node, 1) * node.get("alpha", 1.0)
    weight = weight if node.get("transB", 0) else weight.T
    bias = _bias(builder, node, len(weight)) * node.get("beta", 1.0)
    _dense(builder, node, weight, bias)


def matmul(builder: Builder, node: Node) -> None:
    """MatMul of samples and a constant matrix."""
    weight = builder.required(node, 1).T
    _dense(builder, node, weight, np.zeros(len(weight)))


def _dense(builder: Builder, node: Node, weight: FloatArray, bias: FloatArray) -> None:
    """Weights [out, in]."""
    value = builder.settle(builder.value(node))
    shape = builder.shapes[value.source]
    if len(value.shape) != 2 or weight.ndim != 2 or value.shape[1] != weight.shape[1]:
        raise node.error(
            f"operands {list(value.shape)} and {list(weight.shape[::-1])}",
            "only [batch, features] times a constant matrix is supported",
        )
    columns = np.empty_like(weight)
    columns[:, value.index[0]] = weight
    builder.read(node.name, value)
    if len(shape) == 3:
        builder.emit(Flatten(f"{node.name}/flat"))
    builder.emit(Layer(node.name, node.output, columns, bias))
    builder.give(node, (len(weight),))


def normalization(builder: Builder, node: Node) -> None:
    """BatchNormalization with fixed statistics."""
    gamma, beta, mean, variance = (builder.required(node, i) for i in range(1, 5))
    if node.get("training_mode", 0):
        raise node.error("training_mode is set", "export the model in evaluation mode")
    epsilon = node.get("epsilon", 1e-5)
    if (variance + epsilon <= 0).any() or len({v.shape for v in (gamma, beta, mean, variance)}) > 1:
        raise node.error("its statistics are not one positive variance and mean for each channel")
    factor = gamma / np.sqrt(variance + epsilon)
    value = builder.settle(builder.value(node))
    shape = (1, -1, *[1] * (len(value.shape) - 2))
    offset = (beta - mean * factor).reshape(shape)
    builder.scale(node, value, factor.reshape(shape), offset)


def add(builder: Builder, node: Node) -> None:
    """Add of two activations; with a constant it is ``affine``."""
    if any(name in builder.constants for name in node.inputs):
        affine(builder, node)
        return
    first, second = (builder.settle(builder.value(node, i)) for i in (0, 1))
    pads = first.pads != NO_PADS or second.pads != NO_PADS
    same = builder.shapes[first.source] == builder.shapes[second.source]
    if pads or not same or not np.array_equal(first.index, second.index):
        raise node.error(
            f"operands {list(first.shape)} and {list(second.shape)}",
            "operands have one shape and one order of elements",
        )
    builder.add(node.name, node.output, first, second.source)
    builder.give(node, builder.shapes[first.source])
    moved = replace(first, source=node.output, alone=True)
    builder.values[node.output] = moved.moved(first.index, builder.alone(node.output))


def affine(builder: Builder, node: Node) -> None:
    """Add, Sub, Mul or Div of a value and a constant."""
    reverse = node.inputs[0] in builder.constants
    value = builder.settle(builder.value(node, int(reverse)))
    other = builder.required(node, int(not reverse))
    if node.kind == "Div" and reverse:
        raise node.error("a constant divided by activations has no form")
    one, zero = np.ones_like(other), np.zeros_like(other)
    factor, offset = {
        "Add": (one, other),
        "Sub": (-one, other) if reverse else (one, -other),
        "Mul": (other, zero),
        "Div": (1 / other if not reverse and other.all() else one, zero),
    }[node.kind]
    if not (np.isfinite(factor).all() and np.isfinite(offset).all()):
        raise node.error("its constant is not finite")
    if node.kind == "Div" and not other.all():
        raise node.error("it divides by zero")
    builder.scale(node, value, factor, offset)


def relu(builder: Builder, node: Node) -> None:
    """Relu."""
    _activated(builder, node, math.inf)


def clip(builder: Builder, node: Node) -> None:
    """Clip from 0: a ReLU, or one such as ReLU6."""
    ends: list[float] = []
    for position, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        constant = builder.constant(node, position)
        ends.append(float(node.get(name, default) if constant is None else constant))
    if ends[0] != 0 or ends[1] <= 0:
        raise node.error(f"it clips to {ends}", "only a lower end of 0 has an integer form")
    _activated(builder, node, ends[1])


def _activated(builder: Builder, node: Node, ceiling: float) -> None:
    value = builder.settle(builder.value(node))
    if value.pads != NO_PADS:
        raise node.error("it reads a Pad", "pad in the convolution or pool itself")
    index = builder.maker(value)
    if index is None:
        shape = builder.shapes[value.source]
        ones, zeros = np.ones(shape[0]), np.zeros(shape[0])
        builder.read(node.name, value)
        layer = builder.spread(node.name, value, ones, zeros, node.output)
        builder.emit(replace(layer, relu=True, ceiling=ceiling))
        builder.shapes[node.output] = shape
        moved = replace(value, source=node.output, alone=True)
        builder.values[node.output] = moved.moved(value.index, builder.alone(node.output))
        return
    stage = builder.made.stages[index]
    assert isinstance(stage, Layer | Sum)
    builder.change(node, value, index, replace(stage, relu=True, ceiling=ceiling))


def _bias(builder: Builder, node: Node, channels: int) -> FloatArray:
    """The third input, which may be left out: float64 [channels]."""
    if builder.constant(node, 2) is None:
        return np.zeros(channels)
    bias = builder.required(node, 2)
    if bias.size not in (1, channels):
        raise node.error(f"a bias {list(bias.shape)} for {channels} outputs")
    return np.broadcast_to(bias.ravel(), channels).copy()


def _ungrouped(weight: FloatArray, groups: int) -> FloatArray:
    """[out, in / groups, kh, kw] -> [out, in, kh, kw], zeros between groups."""
    out, depth, *kernel = weight.shape
    whole = np.zeros((out, depth * groups, *kernel))
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        whole[rows, group * depth : (group + 1) * depth] = weight[rows]
    return whole
