"""The checker's own interval propagation: sums and radii, in plain NumPy integers.

With ``s = lower + upper`` and ``r = upper - lower`` of a layer's input less zero points,
``W s + 2 b`` and ``|W| r`` are the sum and the difference of the accumulator's bounds.
"""

from __future__ import annotations

import numpy as np

from cactus_edge import semantics
from cactus_edge.graph import (
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    MaxPool2D,
    Operator,
    Pad,
    Padding,
    Pool2D,
    Requantization,
    Reshape,
    window_geometry,
)
from cactus_edge.operators import Lookup, Move, Pair, moved, paired
from cactus_edge.semantics import Rounding

Box = tuple[Int64Array, Int64Array]


def logits_box(graph: Graph, box: Box) -> tuple[Box, Box]:
    """Bounds of the stored logits and of the last linear layer's input, int64 [samples, -1]."""
    values = {graph.core_input: box}
    for op in graph.core:
        values[op.output] = propagate(graph, op, [values[i] for i in op.inputs])
    last = last_layer(graph)
    hidden = box if last is None else values[last.inputs[0]]
    flat = [v.reshape(len(v), -1) for v in (*values[graph.logits], *hidden)]
    return (flat[0], flat[1]), (flat[2], flat[3])


def propagate(graph: Graph, op: Operator, boxes: list[Box]) -> Box:
    """Bounds of an operator's output over boxes of its inputs, stored integers [samples, ...]."""
    lower, upper = boxes[0]
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    limits = graph.output_range(op)
    if isinstance(op, Linear):
        least, most = accumulators(op, lower - source.zero_point, upper - source.zero_point)
        assert op.requantization is not None
        low, high = (
            _stored(op.requantization, a, target.zero_point, limits) for a in (least, most)
        )
        return low, high
    if isinstance(op, Add):
        assert op.requantization is not None
        zeros = [graph.tensors[i].zero_point for i in op.inputs]
        rule, integers = semantics.ADD[op.requantization.rounding], op.requantization.integers
        ends = [rule(boxes[0][e] - zeros[0], boxes[1][e] - zeros[1], *integers) for e in (0, 1)]
        low, high = (semantics.clamp(e + target.zero_point, *limits) for e in ends)
        return low, high  # pyright: ignore
    if isinstance(op, Pool2D):
        low, high = (semantics.clamp(_pooled(op, end), *limits) for end in boxes[0])  # pyright: ignore
        return low, high  # pyright: ignore
    if isinstance(op, Pad):
        fill = source.zero_point
        return tuple(np.pad(end, op.paddings, constant_values=fill) for end in boxes[0])  # pyright: ignore
    if isinstance(op, Move):
        ends = [moved(graph, op, [box[end] for box in boxes]) for end in (0, 1)]
        return ends[0], ends[1]
    if isinstance(op, Lookup):
        return _between(graph, op, lower, upper)
    if isinstance(op, Pair):
        corners = [paired(graph, op, a, b) for a in boxes[0] for b in boxes[1]]
        return np.minimum.reduce(corners), np.maximum.reduce(corners)
    assert isinstance(op, Reshape)
    return tuple(end.reshape(-1, *target.shape[1:]) for end in boxes[0])  # pyright: ignore


def _between(graph: Graph, op: Lookup, lower: Int64Array, upper: Int64Array) -> Box:
    """Least and greatest entry of a table between both ends, for any table."""
    assert op.table is not None
    first = graph.tensors[op.inputs[0]].dtype.range[0]
    a, b = (end.reshape(len(end), -1) - first for end in (lower, upper))
    kinds = np.arange(a.shape[1]) % len(op.table)
    least, most = op.table[kinds, a], op.table[kinds, b]
    if (np.diff(op.table, axis=1) >= 0).all():
        return least.reshape(lower.shape), most.reshape(lower.shape)
    least, most = np.minimum(least, most), np.maximum(least, most)
    for step in range(1, int((b - a).max(initial=0)) + 1):
        entry = op.table[kinds, np.minimum(a + step, b)]
        least, most = np.minimum(least, entry), np.maximum(most, entry)
    return least.reshape(lower.shape), most.reshape(lower.shape)


def accumulators(op: Linear, lower: Int64Array, upper: Int64Array) -> Box:
    """Least and greatest accumulator from sums and radii (see the module's docstring)."""
    weights = op.weights.values.astype(np.int64)
    total = _linear(op, lower + upper, weights) + 2 * op.bias.astype(np.int64)
    spread = _linear(op, upper - lower, np.abs(weights))
    return (total - spread) >> 1, (total + spread) >> 1


def _linear(op: Linear, x: Int64Array, weights: Int64Array) -> Int64Array:
    if isinstance(op, FullyConnected):
        return x.reshape(len(x), -1) @ weights.T
    assert isinstance(op, Conv2D)
    taken = patches(x, weights.shape[1:3], op.stride, op.dilation, op.padding, 0)
    if isinstance(op, DepthwiseConv2D):
        repeats = op.channels // x.shape[-1]
        return np.einsum("nhwklc,klc->nhwc", np.repeat(taken, repeats, axis=-1), weights[0])
    rows = taken.reshape(*taken.shape[:3], -1)
    return rows @ weights.reshape(op.channels, -1).T


def patches(
    x: Int64Array,
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: Padding,
    fill: int,
) -> Int64Array:
    """Int64 [samples, out height, out width, kernel height, kernel width, channels]."""
    axes = []
    borders = [(0, 0)]
    for a in (0, 1):
        count, before, after = window_geometry(
            x.shape[1 + a], kernel[a], stride[a], dilation[a], padding
        )
        borders.append((before, after))
        axes.append(np.arange(count)[:, None] * stride[a] + np.arange(kernel[a]) * dilation[a])
    padded = np.pad(x, [*borders, (0, 0)], constant_values=fill)
    rows, columns = axes
    return padded[:, rows[:, None, :, None], columns[None, :, None, :]]


def _pooled(op: Pool2D, x: Int64Array) -> Int64Array:
    arguments = (op.window, op.stride, (1, 1), op.padding)
    if isinstance(op, MaxPool2D):
        return patches(x, *arguments, fill=-(1 << 40)).max(axis=(3, 4))
    assert isinstance(op, AveragePool2D)
    total = patches(x, *arguments, fill=0).sum(axis=(3, 4))
    inside = np.ones((1, *x.shape[1:3], 1), np.int64)
    count = patches(inside, *arguments, fill=0).sum(axis=(3, 4))
    return semantics.average(total, count)  # pyright: ignore


def _stored(
    parameters: Requantization, accumulator: Int64Array, zero_point: int, limits: tuple[int, int]
) -> Int64Array:
    """Stored integers of accumulators [..., channels]."""
    output = np.empty_like(accumulator)
    for channel in range(accumulator.shape[-1]):
        rule = semantics.REQUANTIZE[Rounding(int(parameters.rounding[channel]))]
        output[..., channel] = rule(
            accumulator[..., channel],
            int(parameters.multiplier[channel]),
            int(parameters.shift[channel]),
        )
    return semantics.clamp(output + zero_point, *limits)  # pyright: ignore


def last_layer(graph: Graph) -> Linear | None:
    """The layer whose accumulators become the logits, where it is a matrix on its whole input."""
    tensor = graph.logits
    for op in reversed(graph.core):
        if op.output == tensor and isinstance(op, Reshape):
            tensor = op.inputs[0]
        elif op.output == tensor:
            if isinstance(op, DepthwiseConv2D) or not isinstance(op, Linear):
                return None
            source = graph.tensors[op.inputs[0]].shape
            if isinstance(op, Conv2D):
                exact = op.weights.values.shape[1:3] == source[1:3] and op.dilation == (1, 1)
                inside = op.padding is Padding.VALID or source[1:3] == (1, 1)
                return op if exact and inside else None
            return op
    return None
