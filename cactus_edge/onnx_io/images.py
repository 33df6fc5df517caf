"""Pools, padding and concatenation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cactus_edge.lowering.stages import NO_PADS, Layer, Pool
from cactus_edge.onnx_io.building import LARGEST_DENSE, Builder
from cactus_edge.onnx_io.reading import Node
from cactus_edge.onnx_io.values import Value, plain
from cactus_edge.onnx_io.windows import windows


def pad(builder: Builder, node: Node) -> None:
    """Pad, left to the window behind it."""
    value, _ = builder.image(node)
    pads = builder.constant(node, 1)
    pads = np.array(node.get("pads", ())) if pads is None else pads
    fill, axes = builder.constant(node, 2), builder.constant(node, 3)
    mode, filled = node.get("mode", "constant"), 0.0 if fill is None else float(fill)
    if mode != "constant" or filled != 0:
        raise node.error(f"mode '{mode}' with {filled}", "only zeros can be padded")
    whole = np.zeros((2, 4), np.int64)
    whole[:, slice(None) if axes is None else axes] = pads.reshape(2, -1)
    if whole[:, :2].any() or (whole < 0).any():
        raise node.error(f"pads {pads.tolist()}", "only height and width can be padded")
    both = tuple(_sum(old, new) for old, new in zip(value.pads, whole.T[2:], strict=True))
    moved = value.moved(value.index, builder.alone(node.output))
    builder.values[node.output] = replace(moved, pads=(both[0], both[1]))


def pool(builder: Builder, node: Node) -> None:
    """MaxPool and AveragePool."""
    value, (channels, height, width) = builder.image(node)
    window = node.get("kernel_shape", ())
    stride, dilation = node.get("strides", (1, 1)), node.get("dilations", (1, 1))
    if len(window) != 2 or dilation != (1, 1):
        raise node.error(f"kernel {list(window)}, dilations {list(dilation)}", "use neither")
    if len(node.outputs) > 1 and builder.uses.get(node.outputs[1]):
        raise node.error("its indices are read", "only the maxima can be")
    average = node.kind == "AveragePool"
    own, extents = windows(node, (height, width), window, stride, (1, 1), NO_PADS)
    pads, counts = own, bool(node.get("count_include_pad", 0))
    if value.pads != NO_PADS:
        if own != NO_PADS:
            raise node.error("it pads, and reads a Pad", "pad once")
        pads, extents = windows(node, (height, width), window, stride, (1, 1), value.pads)
        counts = True
    if node.get("ceil_mode", 0):
        fits = all(
            (size + sum(pair) - k) % s == 0
            for size, pair, k, s in zip((height, width), pads, window, stride, strict=True)
        )
        if not fits:
            raise node.error("ceil_mode adds windows that reach outside", "pad, or crop, before")
    kind = "average" if average else "max"
    builder.read(node.name, value)
    builder.emit(Pool(node.output, kind, window, stride, pads, average and counts))
    builder.give(node, (channels, *extents))


def global_pool(builder: Builder, node: Node) -> None:
    """GlobalAveragePool, and ReduceMean that is the same."""
    value, (channels, height, width) = builder.image(node)
    keeps = True
    if node.kind == "ReduceMean":
        axes = builder.constant(node, 1)
        axes = node.get("axes", ()) if axes is None else axes
        if {int(axis) % 4 for axis in axes} != {2, 3}:
            raise node.error(f"axes {list(axes)}", "only the mean over height and width exists")
        keeps = bool(node.get("keepdims", 1))
    if value.pads != NO_PADS:
        raise node.error("it reads a Pad", "pad in the convolution or pool itself")
    window = (height, width)
    builder.read(node.name, value)
    builder.emit(Pool(node.output, "average", window, window))
    builder.give(node, (channels, 1, 1))
    if not keeps:
        made = builder.values[node.output]
        builder.values[node.output] = made.moved(made.index.reshape(1, channels), True)


def concat(builder: Builder, node: Node) -> None:
    """A sum of layers, each of which puts one operand at its place."""
    values = [builder.settle(builder.value(node, i)) for i in range(len(node.inputs))]
    axis, rank = node.get("axis", 1), len(values[0].shape)
    if axis % rank != 1 or any(v.pads != NO_PADS or not v.is_plain for v in values):
        raise node.error(f"axis {axis}", "only whole images or features, along axis 1, can be")
    parts = [v.shape[1] for v in values]
    if any(v.shape[2:] != values[0].shape[2:] for v in values) or rank not in (2, 4):
        raise node.error(f"operands {[list(v.shape) for v in values]} do not fit together")
    if any(v.shape[1:] != builder.shapes[v.source] for v in values):
        raise node.error("an operand is a flattened image", "concatenate before flattening")
    total = sum(parts)
    if total * max(parts) > LARGEST_DENSE:
        raise node.error(f"{total} channels are too many to be put together by layers")
    made: list[Value] = []
    for i, (value, count) in enumerate(zip(values, parts, strict=True)):
        weight = np.zeros((total, count))
        weight[sum(parts[:i]) + np.arange(count), np.arange(count)] = 1
        name = f"{node.name}/{i}"
        builder.read(name, value)
        builder.emit(
            Layer(name, name, weight.reshape(*weight.shape, *[1] * (rank - 2)), np.zeros(total))
        )
        shape = (total, *value.shape[2:])
        builder.shapes[name] = shape
        made.append(plain(name, shape, True))
    builder.made.notes.append(
        f"node '{node.name}' ({node.kind}) becomes {len(made)} layers and their sum"
    )
    first = made[0]
    for i, other in enumerate(made[1:], 1):
        output = node.output if i == len(made) - 1 else f"{node.name}/sum{i}"
        builder.add(f"{node.name}/sum{i}", output, first, other.source)
        first = replace(first, source=output)
    builder.give(node, (total, *values[0].shape[2:]), first.source)


def _sum(old: tuple[int, int], new: Any) -> tuple[int, int]:
    return old[0] + int(new[0]), old[1] + int(new[1])
