"""Options and constant tensors of the operators in ``cactus_edge.operators``, in both directions.

Source: ``kernels/strided_slice.cc``, ``slice.cc``, ``reduce.cc``, ``concatenation.cc``,
``transpose.cc``, ``mul.cc``, ``sub.cc`` of TensorFlow Lite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_edge.flatbuffer import schema
from cactus_edge.flatbuffer.node import Constant, Node
from cactus_edge.flatbuffer.wire import Values
from cactus_edge.graph import (
    Activation,
    Add,
    ArgMax,
    DType,
    Graph,
    Operator,
    Pad,
    Padding,
    Quantization,
    Reshape,
    Tensor,
    Weights,
)
from cactus_edge.operators import (
    Combination,
    Concatenation,
    Function,
    Mean,
    PadAxes,
    Pair,
    Rows,
    StridedSlice,
    Transpose,
    Unary,
    WithConstant,
)

_ONE_BITS = 0x3F800000
_MOST_AVERAGED = 1 << 20
"""Elements that a MEAN may read; each has a weight in memory, whatever the file's size."""

_MOST_SQUEEZED = 8
"""Axes that TFLite's SQUEEZE has room for."""


@dataclass(frozen=True)
class Split:
    """A file's operator that is several of a graph, with tensors between them.

    ``extras`` are those tensors, which the reader numbers; tensor -1 stands for the first of them,
    -2 for the second.
    """

    operators: tuple[Operator, ...]
    extras: tuple[Tensor, ...]

    def numbered(self, index: int) -> list[Operator]:
        """The operators, the first of ``extras`` being tensor ``index``."""

        def of(tensor: int) -> int:
            return tensor if tensor >= 0 else index - 1 - tensor

        return [
            replace(op, inputs=tuple(map(of, op.inputs)), output=of(op.output))
            for op in self.operators
        ]


def reshaped(node: Node, first: Operator, shape: tuple[int, ...]) -> Operator | Split:
    """``first``, whose output has ``shape``, followed by a RESHAPE where the file has another."""
    target = node.target
    if target.shape == shape:
        return first
    extra = replace(target, name=f"{target.name}/{first.kind.lower()}", shape=shape)
    second = Reshape(name=target.name, inputs=(-1,), output=node.output)
    return Split((replace(first, output=-1), second), (extra,))


def rows(node: Node, layer: Rows) -> Operator | Split:
    """``layer`` between two RESHAPEs, where the file's tensors have three dimensions."""
    source, target = node.source, node.target
    if len(source.shape) == 4:
        return layer
    before = replace(source, name=f"{target.name}/rows", shape=(1, *source.shape))
    after = replace(target, name=f"{target.name}/layer", shape=(1, *target.shape))
    first = Reshape(name=before.name, inputs=node.inputs, output=-1)
    last = Reshape(name=target.name, inputs=(-2,), output=node.output)
    return Split((first, replace(layer, inputs=(-1,), output=-2), last), (before, after))


# ------------------------------------------------------------------------------------------ encode
def encode(graph: Graph, op: Operator) -> tuple[Values | None, list[Constant]]:
    """Options, None without a table, and constants; all of other operators are empty."""
    match op:
        case Unary():
            slope = op.function is Function.LEAKY_RELU
            return ({"alpha": op.alpha_bits} if slope else None), []
        case WithConstant():
            return _activation(op.activation), [_operand(op)]
        case Pair():
            return _activation(op.activation), []
        case Mean():
            axes = int32_constant(f"{op.name}/axes", np.array([1, 2]))
            return {"keep_dims": int(op.keeps)}, [axes]
        case Transpose():
            order = int32_constant(f"{op.name}/permutation", np.array(op.permutation))
            return None, [order]
        case StridedSlice():
            return _slice_options(graph, op)
        case ArgMax():
            kind = graph.tensors[op.output].dtype.name
            axis = int32_constant(f"{op.name}/axis", np.array([-1]))
            return {"output_type": schema.TYPE_CODES[kind]}, [axis]
        case Concatenation():
            return {"axis": op.axis, **_activation(Activation.NONE)}, []
        case _:
            return None, []


def _activation(activation: Activation) -> dict[str, object]:
    return {"fused_activation_function": schema.ACTIVATION_CODES[activation.value]}


def _operand(op: WithConstant) -> Constant:
    return Constant(
        f"{op.name}/constant",
        "INT8",
        op.constant.shape,
        op.constant.reshape(-1).view(np.uint8),
        np.array([op.quantization.scale_bits], np.uint32),
        np.array([op.quantization.zero_point], np.int64),
    )


def _slice_options(graph: Graph, op: StridedSlice) -> tuple[Values, list[Constant]]:
    extents = graph.tensors[op.output].shape
    begin, stride = np.array(op.begin), np.array(op.stride)
    last = begin + (np.array(extents) - 1) * stride
    end = last + np.sign(stride)
    # An end before the first element cannot be said in numbers, which count from the back below 0.
    mask = sum(1 << axis for axis in np.flatnonzero(end < 0).tolist())
    values = {"begin": begin, "end": np.maximum(end, 0), "strides": stride}
    constants = [int32_constant(f"{op.name}/{name}", array) for name, array in values.items()]
    return {"end_mask": mask}, constants


def int32_constant(name: str, values: npt.NDArray[np.integer[Any]]) -> Constant:
    """A constant of int32 without quantization."""
    data = np.ascontiguousarray(values.astype("<i4")).reshape(-1).view(np.uint8)
    none = np.zeros(0, np.uint32), np.zeros(0, np.int64)
    return Constant(name, "INT32", values.shape, data, *none)


# ------------------------------------------------------------------------------------------ decode
def plain(node: Node, constants: int = 0) -> None:
    """Refuse inputs beyond those that the operator takes."""
    if len(node.constants) != constants:
        count = len(node.inputs) + constants
        given = len(node.inputs) + len(node.constants)
        raise node.place.malformed(f"has {given} inputs instead of {count}")


def integers(node: Node, position: int, what: str) -> list[int]:
    """The int32 values of a constant with at most one axis."""
    constant = node.constant(position, what, "INT32")
    if constant is None:
        raise node.place.unsupported(f"{what} is not constant")
    if len(constant.shape) > 1:
        raise node.place.malformed(f"{what} is a tensor {list(constant.shape)}, not a list")
    return constant.values().reshape(-1).tolist()


def _unary(node: Node) -> Operator:
    plain(node)
    function = Function(node.kind.name)
    alpha = 0
    if function is Function.LEAKY_RELU:
        alpha = node.integer("alpha")
        if not 0 < alpha >> 23 < 255:
            raise node.place.unsupported("alpha that is not a positive, normal float32")
    return Unary(
        name=node.target.name,
        inputs=node.inputs,
        output=node.output,
        function=function,
        alpha_bits=alpha,
    )


def combination(node: Node) -> Operator:
    """ADD, SUB and MUL, of two activations or with a constant."""
    kind = Combination(node.kind.name)
    if len(node.inputs) + len(node.constants) != 2:
        raise node.place.malformed(f"has {len(node.inputs) + len(node.constants)} inputs, not 2")
    head = {"inputs": node.inputs, "output": node.output, "activation": node.activation()}
    wide = node.source.dtype is DType.INT16 and kind is not Combination.MUL
    if wide and node.integer("pot_scale_int16"):
        raise node.place.unsupported(
            "'pot_scale_int16', another arithmetic; 16x8 converters write it as false"
        )
    if not node.constants:
        if kind is Combination.ADD:
            return Add(name=node.target.name, **head)  # pyright: ignore
        return Pair(name=node.target.name, combination=kind, **head)  # pyright: ignore
    constant = node.constant(0, "the constant operand", "INT8")
    if constant is None or constant.scale_bits.size != 1:
        raise node.place.unsupported("its constant operand has no scale, or several")
    zero_point = int(constant.zero_points[0])
    if not -128 <= zero_point <= 127:
        raise node.place.malformed(f"zero point {zero_point} of its constant is no int8")
    return WithConstant(
        name=node.name("/constant"),
        combination=kind,
        constant=constant.data.view(np.int8).reshape(constant.shape),
        quantization=Quantization(int(constant.scale_bits[0]), zero_point),
        first=node.constant_first,
        **head,  # pyright: ignore
    )


def _concatenation(node: Node) -> Operator:
    plain(node)
    if node.activation() is not Activation.NONE:
        raise node.place.unsupported("a fused activation")
    axis, rank = node.integer("axis"), len(node.target.shape)
    return Concatenation(
        name=node.target.name,
        inputs=node.inputs,
        output=node.output,
        axis=axis + rank if axis < 0 else axis,
    )


def _transpose(node: Node) -> Operator:
    plain(node, 1)
    order = integers(node, 0, "the permutation")
    rank = len(node.source.shape)
    permutation = tuple(axis + rank if axis < 0 else axis for axis in order)
    if sorted(permutation) != list(range(rank)):
        raise node.place.malformed(f"permutation {order} of {rank} dimensions")
    return Transpose(
        name=node.name("/permutation"),
        inputs=node.inputs,
        output=node.output,
        permutation=permutation,
    )


def _strided_slice(node: Node) -> Operator | Split:
    plain(node, 3)
    for option in ("ellipsis_mask", "new_axis_mask", "offset"):
        if node.integer(option):
            raise node.place.unsupported(f"'{option}'")
    names = ("begin", "end", "strides")
    begin, end, stride = (integers(node, i, f"'{name}'") for i, name in enumerate(names))
    extents = node.source.shape
    if not len(begin) == len(end) == len(stride) <= len(extents) or 0 in stride:
        raise node.place.malformed(f"begin {begin}, end {end}, strides {stride}")
    masks = [node.integer(f"{name}_mask") for name in ("begin", "end", "shrink_axis")]
    starts, shape = [0] * len(extents), list(extents)
    for axis in range(len(begin)):
        opened, closed, shrunk = (bool(mask >> axis & 1) for mask in masks)
        given = slice(None if opened else begin[axis], None if closed else end[axis], stride[axis])
        if shrunk:
            index = begin[axis] + (extents[axis] if begin[axis] < 0 else 0)
            if opened or not 0 <= index < extents[axis]:
                raise node.place.unsupported(f"takes element {begin[axis]} of {extents[axis]}")
            if stride[axis] < 0:  # kernels then copy nothing, and leave what was there
                raise node.place.unsupported(f"takes one element with a stride of {stride[axis]}")
            taken = range(index, index + 1)
            stride[axis] = 1
        else:
            taken = range(extents[axis])[given]
        if not len(taken):
            raise node.place.malformed(f"takes nothing of axis {axis}")
        starts[axis], shape[axis] = taken[0], len(taken)
    strides = (*stride, *[1] * (len(extents) - len(stride)))
    op = StridedSlice(
        name=node.name("/begin"),
        inputs=node.inputs,
        output=node.output,
        begin=tuple(starts),
        stride=strides,
    )
    kept = [e for axis, e in enumerate(shape) if not masks[2] >> axis & 1]
    if tuple(kept) != node.target.shape:
        raise node.place.malformed(f"takes {kept}, the output is {list(node.target.shape)}")
    return reshaped(node, op, tuple(shape))


def _slice(node: Node) -> Operator:
    plain(node, 2)
    begin, size = integers(node, 0, "'begin'"), integers(node, 1, "'size'")
    rank = len(node.source.shape)
    if not len(begin) == len(size) == rank:
        raise node.place.malformed(f"begin {begin}, size {size} of {rank} dimensions")
    extents = zip(begin, size, node.source.shape, strict=True)
    shape = tuple(extent - start if count == -1 else count for start, count, extent in extents)
    if shape != node.target.shape:
        raise node.place.malformed(f"takes {list(shape)}, the output is {list(node.target.shape)}")
    return StridedSlice(
        name=node.target.name,
        inputs=node.inputs,
        output=node.output,
        begin=tuple(begin),
        stride=(1,) * rank,
    )


def _mean(node: Node) -> Operator | Split:
    plain(node, 1)
    shape = node.source.shape
    axes = integers(node, 0, "the axes")
    # Negative axes are another kernel's in tflite-runtime's XNNPACK, with another rounding.
    if sorted(axes) != [1, 2] or len(shape) != 4:
        raise node.place.unsupported(
            f"over axes {axes} of {list(shape)}; supported: height and width, written as 1 and 2"
        )
    if math.prod(shape) > _MOST_AVERAGED:
        raise node.place.unsupported(
            f"over {math.prod(shape):,} elements; supported: up to {_MOST_AVERAGED:,}"
        )
    kept = (1, 1, 1, shape[3])
    if node.target.shape != (kept if node.integer("keep_dims") else (1, shape[3])):
        raise node.place.malformed(f"its output is {list(node.target.shape)}")
    op = Mean(
        name=node.name("/axes"),
        inputs=node.inputs,
        output=node.output,
        weights=Weights(np.ones((1, *shape[1:]), np.int8), 8, np.array([_ONE_BITS], np.uint32)),
        bias=np.zeros(shape[3], np.int32),
        padding=Padding.VALID,
        keeps=node.target.shape == kept,
    )
    return reshaped(node, op, kept)


def _padv2(node: Node) -> Operator:
    plain(node, 2)
    paddings, value = node.constant(0, "the tensor of paddings", "INT32"), node.constants[1]
    rank = len(node.source.shape)
    if paddings is None or paddings.shape != (rank, 2):
        raise node.place.unsupported(f"paddings that are no constant [{rank}, 2]")
    if value is None or value.type != "INT8" or value.size != 1:
        raise node.place.unsupported("a padding that is no single int8")
    if int(value.data.view(np.int8)[0]) != node.source.zero_point:
        raise node.place.unsupported("a padding other than the zero point")
    rows: list[list[int]] = paddings.values().tolist()
    if min(min(row) for row in rows) < 0:
        raise node.place.malformed(f"negative paddings {rows}")
    return padded(node, rows)


def padded(node: Node, rows: list[list[int]]) -> Operator:
    """A PAD, whose form says whether other axes than height and width are padded."""
    paddings = tuple((before, after) for before, after in rows)
    head = {"name": node.name("/paddings"), "inputs": node.inputs, "output": node.output}
    plane = len(paddings) == 4 and paddings[0] == paddings[3] == (0, 0)
    return (Pad if plane else PadAxes)(**head, paddings=paddings)  # pyright: ignore


def _squeeze(node: Node) -> Operator:
    plain(node)
    given = node.source.shape
    dims = node.options.integers("squeeze_dims") if node.options is not None else ()
    axes = {dim + len(given) if dim < 0 else dim for dim in dims}
    if len(dims) > _MOST_SQUEEZED or any(
        not 0 <= axis < len(given) or given[axis] != 1 for axis in axes
    ):
        raise node.place.malformed(f"removes axes {list(dims)} of {list(given)}")
    gone = axes or {axis for axis, extent in enumerate(given) if extent == 1}
    return _of_shape(node, tuple(e for axis, e in enumerate(given) if axis not in gone))


def _expand_dims(node: Node) -> Operator:
    plain(node, 1)
    given = node.source.shape
    axes = integers(node, 0, "the axis")
    if len(axes) != 1 or not -len(given) - 1 <= axes[0] <= len(given):
        raise node.place.malformed(f"adds axes {axes} to {list(given)}")
    at = axes[0] % (len(given) + 1)
    return _of_shape(node, (*given[:at], 1, *given[at:]))


def _of_shape(node: Node, shape: tuple[int, ...]) -> Operator:
    if node.target.shape != shape:
        raise node.place.malformed(f"its output is {list(node.target.shape)}, not {list(shape)}")
    return Reshape(name=node.target.name, inputs=node.inputs, output=node.output)


def _arg_max(node: Node) -> Operator:
    plain(node, 1)
    axis, rank = integers(node, 0, "the axis"), len(node.source.shape)
    if axis not in ([-1], [rank - 1]):
        raise node.place.unsupported(f"over axis {axis} of {list(node.source.shape)}, not the last")
    if schema.TYPE_NAMES.get(node.integer("output_type")) != node.target.dtype.name:
        raise node.place.malformed(f"its output is {node.target.dtype.value}, not as it says")
    return ArgMax(name=node.name("/axis"), inputs=node.inputs, output=node.output)


def _unknown_shape(node: Node) -> Operator:
    """What ``folding`` has left."""
    raise node.place.unsupported("of other than int32 shapes, which are known beforehand")


DECODERS: dict[str, Callable[[Node], Operator | Split]] = {
    **{function.value: _unary for function in Function if function is not Function.QUANTIZE},
    "ADD": combination,
    "SUB": combination,
    "MUL": combination,
    "CONCATENATION": _concatenation,
    "TRANSPOSE": _transpose,
    "STRIDED_SLICE": _strided_slice,
    "SLICE": _slice,
    "MEAN": _mean,
    "PADV2": _padv2,
    "SQUEEZE": _squeeze,
    "EXPAND_DIMS": _expand_dims,
    "ARG_MAX": _arg_max,
    "SHAPE": _unknown_shape,
    "PACK": _unknown_shape,
}


def quantize(node: Node) -> Operator:
    """QUANTIZE between two integer types."""
    return _unary(node)
