"""Rules of the operators in ``operators``, of edges and of int16; ``constraints`` runs them.

A predicate's docstring is the text of the error and the line in ``docs/operators.md``; it returns
the detail of what is broken, or an empty string.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from cactus_edge import tables
from cactus_edge.graph import (
    Add,
    ArgMax,
    Dequantize,
    DType,
    Graph,
    Linear,
    Operator,
    Pad,
    Pool2D,
    Quantization,
    Quantize,
    Softmax,
    sixes,
)
from cactus_edge.operators import (
    LEVELS,
    Combination,
    Concatenation,
    Function,
    Lookup,
    Mean,
    Move,
    PadAxes,
    Pair,
    Rows,
    StridedSlice,
    ToUnsigned,
    Transpose,
    Unary,
    WithConstant,
)

Predicate = Callable[[Graph, Operator], str]
RULES: list[tuple[tuple[type[Operator], ...], Predicate]] = []
MOST_KINDS = 4096


def _rule(*kinds: type[Operator]) -> Callable[[Predicate], Predicate]:
    def register(predicate: Predicate) -> Predicate:
        RULES.append((kinds, predicate))
        return predicate

    return register


@_rule(Lookup)
def lookup_shape(graph: Graph, op: Operator) -> str:
    """Input and output have one shape."""
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    return "" if source.shape == target.shape else f"{list(source.shape)} -> {list(target.shape)}"


@_rule(Lookup, Pair)
def tabled_types(graph: Graph, op: Operator) -> str:
    """Inputs and output are int8 with a scale; QUANTIZE also takes and gives uint8 and int16.

    RELU also takes int16 to int16.
    """
    allowed = [DType.INT8]
    if isinstance(op, Unary) and op.function is Function.QUANTIZE:
        allowed += [DType.UINT8, DType.INT16]
    elif isinstance(op, Unary) and op.function is Function.RELU:
        allowed += [DType.INT16]
    for tensor in (graph.tensors[index] for index in (*op.inputs, op.output)):
        given = isinstance(op, (Lookup, Pair)) and op.table is not None
        if tensor.dtype not in allowed or not (given or tensor.quantization):
            return f"'{tensor.name}' is {tensor.dtype.value}"
    return ""


@_rule(Unary)
def function_output(graph: Graph, op: Operator) -> str:
    """LOGISTIC's output has scale 1/256 and zero point -128, TANH's 1/128 and 0."""
    unary = cast(Unary, op)
    wanted = tables.fixed_output(unary)
    target = graph.tensors[op.output]
    fits = wanted is None or unary.table is not None or target.quantization == wanted
    return "" if fits else f"'{target.name}' has another"


@_rule(Unary)
def relu6_is_the_same_everywhere(graph: Graph, op: Operator) -> str:
    """RELU6 only at output scales at which all runtimes round a stored 6 to one integer."""
    target = graph.tensors[op.output]
    if cast(Unary, op).function is not Function.RELU6 or target.quantization is None:
        return ""
    limits = {min(six, target.dtype.range[1]) for six in sixes(target)}
    return "" if len(limits) == 1 else f"{min(limits)} or {max(limits)}"


@_rule(WithConstant)
def constant_shape(graph: Graph, op: Operator) -> str:
    """The constant has one element, one for each channel, or the input's shape; up to 4096."""
    shape = cast(WithConstant, op).constant.shape
    source = graph.tensors[op.inputs[0]].shape
    plain = tuple(extent for extent in shape if extent != 1)
    channels = shape[-1:] == plain == source[-1:]
    size = int(np.prod(shape))
    fits = size <= MOST_KINDS and len(shape) <= len(source)
    fits = fits and (not plain or channels or shape == source or (1, *shape) == source)
    return "" if fits else f"constant {list(shape)} on {list(source)}"


@_rule(Pair)
def pair_shape(graph: Graph, op: Operator) -> str:
    """Operands have the output's shape, or one of them [1, 1, 1, channels] of it."""
    target = graph.tensors[op.output].shape
    pixel = (*(1 for _ in target[:-1]), target[-1])
    shapes = [graph.tensors[index].shape for index in op.inputs]
    fits = target in shapes and all(shape in (target, pixel) for shape in shapes)
    return "" if fits else f"{list(shapes[0])} and {list(shapes[1])} -> {list(target)}"


@_rule(Pair)
def pair_combination(graph: Graph, op: Operator) -> str:
    """SUB or MUL."""
    combination = cast(Pair, op).combination
    return "" if combination is not Combination.ADD else combination.value


@_rule(Lookup, Pair)
def table_fits(graph: Graph, op: Operator) -> str:
    """A table holds storable integers, and that of two inputs is monotone in each of them."""
    table = cast("Lookup | Pair", op).table
    if table is None:
        return ""
    least, most = graph.tensors[op.output].dtype.range
    first, last = graph.tensors[op.inputs[-1]].dtype.range
    levels = last - first + 1
    if table.ndim != 2 or table.shape[1] != levels or table.min() < least or table.max() > most:
        return f"table {list(table.shape)}"
    if isinstance(op, Lookup):
        size = graph.tensors[op.inputs[0]].size
        return "" if not size % len(table) else f"{len(table)} rows for {size} elements"
    if len(table) != LEVELS:
        return f"table {list(table.shape)}"
    for axis in (0, 1):
        steps = np.diff(table, axis=axis)
        if not ((steps >= 0).all(axis=axis) | (steps <= 0).all(axis=axis)).all():
            return f"not monotone along input {axis}"
    return ""


@_rule(Mean)
def mean_is_a_sum(graph: Graph, op: Operator) -> str:
    """Over height and width of [1, height, width, channels]; both extents stay as 1."""
    mean = cast(Mean, op)
    source = graph.tensors[op.inputs[0]].shape
    values = mean.weights.values
    fits = values.shape == (1, *source[1:]) and bool((values == 1).all()) and not mean.bias.any()
    return "" if fits else f"input {list(source)}, window {list(values.shape[1:3])}"


@_rule(Rows)
def rows_are_pixels(graph: Graph, op: Operator) -> str:
    """FULLY_CONNECTED on more than one row has one weight scale, and int8 weights."""
    layer = cast(Rows, op)
    fits = layer.weights.values.shape[1:3] == layer.stride == layer.dilation == (1, 1)
    fits &= not layer.weights.per_channel and layer.weights.bits > 4
    return "" if fits else f"{layer.weights.scale_bits.size} scales, {layer.weights.bits} bits"


@_rule(Move)
def move_quantization(graph: Graph, op: Operator) -> str:
    """Inputs and output have one type, scale and zero point."""
    target = graph.tensors[op.output]
    for source in (graph.tensors[index] for index in op.inputs):
        if (source.dtype, source.quantization) != (target.dtype, target.quantization):
            return f"'{source.name}' and '{target.name}' differ"
    return ""


@_rule(PadAxes)
def pad_axes_shape(graph: Graph, op: Operator) -> str:
    """Any axis but the batch is padded, with the zero point."""
    paddings = cast(PadAxes, op).paddings
    source, target = graph.tensors[op.inputs[0]].shape, graph.tensors[op.output].shape
    fits = len(paddings) == len(source) == len(target) and paddings[0] == (0, 0)
    if fits:
        extents = zip(source, target, paddings, strict=True)
        fits = all(min(pair) >= 0 and e + sum(pair) == t for e, t, pair in extents)
    return "" if fits else f"{list(source)} -> {list(target)} by {paddings}"


@_rule(Transpose)
def transpose_shape(graph: Graph, op: Operator) -> str:
    """A permutation of the axes that leaves the batch in place."""
    permutation = cast(Transpose, op).permutation
    source, target = graph.tensors[op.inputs[0]].shape, graph.tensors[op.output].shape
    fits = sorted(permutation) == list(range(len(source))) and permutation[0] == 0
    fits = fits and tuple(source[axis] for axis in permutation) == target
    return "" if fits else f"{list(source)} -> {list(target)} by {list(permutation)}"


@_rule(StridedSlice)
def slice_shape(graph: Graph, op: Operator) -> str:
    """The elements that are taken lie inside the input; no axis is added or dropped."""
    part = cast(StridedSlice, op)
    source, target = graph.tensors[op.inputs[0]].shape, graph.tensors[op.output].shape
    fits = (
        len(source) == len(target) == len(part.begin) == len(part.stride) and 0 not in part.stride
    )
    if fits:
        for extent, count, begin, stride in zip(
            source, target, part.begin, part.stride, strict=True
        ):
            last = begin + (count - 1) * stride
            fits &= 0 <= begin < extent and 0 <= last < extent
    return "" if fits else f"{list(source)} -> {list(target)} from {list(part.begin)}"


@_rule(Concatenation)
def concatenation_shape(graph: Graph, op: Operator) -> str:
    """At least one input; along ``axis``, which is not the batch, extents add up."""
    axis = cast(Concatenation, op).axis
    target = graph.tensors[op.output].shape
    shapes = [graph.tensors[index].shape for index in op.inputs]
    fits = 0 < axis < len(target) and all(len(shape) == len(target) for shape in shapes)
    if fits:
        wanted = list(target)
        wanted[axis] = sum(shape[axis] for shape in shapes)
        rest = [(*s[:axis], target[axis], *s[axis + 1 :]) == target for s in shapes]
        fits = wanted[axis] == target[axis] and all(rest)
    return "" if fits else f"{[list(s) for s in shapes]} along {axis} -> {list(target)}"


@_rule(ArgMax)
def arg_max_edge(graph: Graph, op: Operator) -> str:
    """Over one vector of int8, giving one int32 or int64 index; last operator only."""
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    fits = source.dtype is DType.INT8 and source.size == source.shape[-1]
    fits &= target.dtype in (DType.INT32, DType.INT64) and target.size == 1
    return "" if fits else f"'{source.name}' {list(source.shape)} -> {target.dtype.value}"


@_rule(Linear, Add, Pool2D, Pad, Move, Lookup, Pair)
def int16_activations(graph: Graph, op: Operator) -> str:
    """Int16 activations have zero point 0, and weights beside them are int8.

    Layers, ADD and pools take them to int16; of functions only RELU and QUANTIZE take them.
    """
    ends = [graph.tensors[index] for index in (*op.inputs, op.output)]
    found = [end for end in ends if end.dtype is DType.INT16]
    if isinstance(op, Linear) and ends[0].dtype is not DType.INT16:
        return ""  # logits of a graph built by hand
    if not found:
        return ""
    if any(end.zero_point for end in found):
        return f"'{next(end.name for end in found if end.zero_point)}' has another"
    if isinstance(op, Lookup):
        named = isinstance(op, Unary) and op.function in (Function.RELU, Function.QUANTIZE)
        same = isinstance(op, Unary) and (op.function is Function.QUANTIZE or len(found) == 2)
        byte = any(end.dtype is DType.UINT8 for end in ends)
        return "" if named and same and not byte else f"{op.kind} of '{ends[0].name}'"
    if isinstance(op, (Mean, Pair)) or len(found) != len(ends):
        return f"{op.kind} of '{ends[0].name}'"
    if isinstance(op, Linear) and op.weights.bits <= 4:
        return f"weights of {op.weights.bits} bits"
    return ""


@_rule(Quantize)
def quantize_edge(graph: Graph, op: Operator) -> str:
    """Float32 input, int8, uint8 or int16 output with a scale, one shape; first operator only."""
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    stored = (DType.INT8, DType.UINT8, DType.INT16)
    fits = source.dtype is DType.FLOAT32 and target.dtype in stored
    fits &= target.quantization is not None and source.shape == target.shape
    return "" if fits else f"{source.dtype.value} {list(source.shape)} -> {target.dtype.value}"


@_rule(Softmax)
def softmax_edge(graph: Graph, op: Operator) -> str:
    """On one vector of int8 logits, beta 1, output int8 of scale 1/256 and zero point -128."""
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    fits = source.quantization is not None and source.shape == target.shape
    fits &= source.size == source.shape[-1]
    fits &= target.quantization == Quantization.of(1 / 256, -128)  # float: exact
    fits &= source.dtype is DType.INT8 and target.dtype is DType.INT8
    return "" if fits else f"'{source.name}' -> '{target.name}'"


@_rule(Dequantize)
def dequantize_edge(graph: Graph, op: Operator) -> str:
    """Integer input with a scale; float32 of the same shape, or SOFTMAX's output plus 128; last."""
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    fits = _leaves(graph, op) and source.quantization is not None
    fits &= source.shape == target.shape
    return "" if fits else f"{source.dtype.value} -> {target.dtype.value}"


def _leaves(graph: Graph, op: Operator) -> bool:
    """Whether the output of a last edge is of the type that it gives."""
    target = graph.tensors[op.output]
    if not isinstance(op, ToUnsigned):
        return target.dtype is DType.FLOAT32
    behind = any(isinstance(o, Softmax) and o.output == op.inputs[0] for o in graph.operators)
    moved = target.quantization == Quantization.of(1 / 256, 0)  # float: exact
    return behind and target.dtype is DType.UINT8 and moved
