"""Exact bounds of every activation by the reference executor, for what no kernel computes.

Each bound of a linear layer is a sum of one end or the other of each input, by the sign of the
weight, requantized as any accumulator is: what ``kernels.intervals`` does to bytes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cactus_edge import execute
from cactus_edge.graph import Graph, Int64Array, Linear, Operator
from cactus_edge.operators import Lookup, Pair, looked_up, paired

Box = tuple[Int64Array, Int64Array]


def bounds(graph: Graph, lower: Int64Array, upper: Int64Array) -> dict[int, Box]:
    """Bounds of all activations of a resolved graph, by tensor.

    Args:
        graph: resolved.
        lower: int64 [boxes, *input shape], stored integers; ``upper`` likewise, nowhere below it.
        upper: see ``lower``.

    Returns:
        (lower, upper) of each activation, int64 [boxes, *shape].
    """
    found: dict[int, Box] = {graph.core_input: (lower, upper)}
    for op in graph.core:
        found[op.output] = _operator(graph, op, [found[index] for index in op.inputs])
    return found


def _operator(graph: Graph, op: Operator, boxes: list[Box]) -> Box:
    match op:
        case Linear():
            return _linear(graph, op, *boxes[0])
        case Lookup():
            return _lookup(graph, op, *boxes[0])
        case Pair():  # monotone in each operand, so the extremes lie at corners
            corners = [paired(graph, op, a, b) for a in boxes[0] for b in boxes[1]]
            return np.minimum.reduce(corners), np.maximum.reduce(corners)
        case _:  # sums, pools and moves never fall as an operand rises
            low, high = (
                execute.run_operator(graph, op, [box[end] for box in boxes]) for end in (0, 1)
            )
            return low, high


def _linear(graph: Graph, op: Linear, lower: Int64Array, upper: Int64Array) -> Box:
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    assert op.requantization is not None, "graph is not resolved"
    values = op.weights.values
    rising = replace(op, weights=replace(op.weights, values=np.maximum(values, 0)))
    falling = replace(
        op,
        weights=replace(op.weights, values=np.minimum(values, 0)),
        bias=np.zeros_like(op.bias),
    )
    ends: list[Int64Array] = []
    for same, other in ((lower, upper), (upper, lower)):
        accumulator = execute.accumulate(rising, source, same)
        accumulator = accumulator + execute.accumulate(falling, source, other)
        limits = graph.output_range(op)
        ends.append(execute.requantize(accumulator, op.requantization, target.zero_point, limits))
    return ends[0], ends[1]


def _lookup(graph: Graph, op: Lookup, lower: Int64Array, upper: Int64Array) -> Box:
    """The least and the greatest entry between both ends."""
    assert op.table is not None, "graph is not resolved"
    least, most = looked_up(graph, op, lower), looked_up(graph, op, upper)
    if (np.diff(op.table, axis=1) >= 0).all():
        return least, most
    least, most = np.minimum(least, most), np.maximum(least, most)
    for step in range(1, int((upper - lower).max(initial=0))):
        entry = looked_up(graph, op, np.minimum(lower + step, upper))
        least, most = np.minimum(least, entry), np.maximum(most, entry)
    return least, most
