"""Operators that compute nothing: they move elements, name shapes, or change no decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cactus_edge.graph import Int64Array
from cactus_edge.lowering.stages import NO_PADS
from cactus_edge.onnx_io.building import Builder
from cactus_edge.onnx_io.reading import Node


def nothing(builder: Builder, node: Node) -> None:
    """Identity, Dropout as deployed, Cast between floats."""
    value = builder.value(node)
    if node.kind == "Cast" and node.get("to", 1) not in (1, 10, 11):
        raise node.error("a cast to integers has no form")
    builder.values[node.output] = value.moved(value.index, builder.alone(node.output))


def view(builder: Builder, node: Node) -> None:
    """Reshape, Flatten, Transpose, Squeeze, Unsqueeze."""
    value = builder.value(node)
    if value.pads != NO_PADS:
        raise node.error("it reads a Pad", "pad in the convolution or pool itself")
    index = value.index
    if node.kind == "Transpose":
        order = node.get("perm", tuple(reversed(range(index.ndim))))
        if order[0] != 0:
            raise node.error(f"perm {list(order)} moves the batch", "keep axis 0 first")
        index = index.transpose(order)
    else:
        index = index.reshape(_new_shape(builder, node, index))
    builder.values[node.output] = value.moved(index, builder.alone(node.output))


def _new_shape(builder: Builder, node: Node, index: Int64Array) -> tuple[int, ...]:
    if node.kind == "Flatten":
        axis = node.get("axis", 1)
        if axis % index.ndim != 1:
            raise node.error(f"axis {axis}", "only axis 1 keeps samples apart")
        return 1, index.size
    axes: Any = builder.constant(node, 1)
    if node.kind == "Reshape":
        target = [int(v) for v in axes]
        if target and target[0] == builder.file.batch:
            target[0] = 1  # samples are taken one by one
        zero = node.get("allowzero", 0) == 0
        target = [index.shape[i] if t == 0 and zero else t for i, t in enumerate(target)]
    else:
        axes = node.get("axes", None) if axes is None else axes
        target = _squeezed(node, index, None if axes is None else [int(a) for a in axes])
    try:
        shape = index.reshape(target).shape
    except ValueError:
        raise node.error(f"{list(index.shape)} does not become {target}") from None
    if not shape or shape[0] != 1:
        raise node.error(f"the new shape {list(shape)} mixes samples", "keep the batch first")
    return shape


def shape(builder: Builder, node: Node) -> None:
    """Shape, a constant, because samples are taken one by one."""
    shape = np.array(builder.value(node).shape, np.int64)
    start, end = node.get("start", 0), node.get("end", len(shape))
    builder.constants[node.output] = shape[start:end]


def softmax(builder: Builder, node: Node) -> None:
    """Softmax and LogSoftmax of the logits, left out."""
    value = builder.value(node)
    axis = node.get("axis", -1) % len(value.shape)
    if value.shape[axis] != value.index.size:
        raise node.error(f"axis {axis} of {list(value.shape)} does not hold all classes")
    builder.made.tail.append(node.kind)
    builder.made.notes.append(
        f"node '{node.name}' ({node.kind}) is left out: the decision is taken on the logits, "
        "which it does not reorder"
    )
    nothing(builder, node)


def _squeezed(node: Node, index: Int64Array, axes: Sequence[int] | None) -> list[int]:
    """The shape after Squeeze or Unsqueeze; the batch stays."""
    if node.kind == "Squeeze":
        axes = [i for i, e in enumerate(index.shape) if i and e == 1] if axes is None else axes
        gone = {axis % index.ndim for axis in axes}
        return [extent for i, extent in enumerate(index.shape) if i not in gone]
    rank = index.ndim + len(axes or ())
    new = {axis % rank for axis in axes or ()}
    extents = iter(index.shape)
    return [1 if i in new else next(extents) for i in range(rank)]
