"""An attack's gradient back through tables and moved elements.

A table's slope at a value is how much it rises between the next values on both sides, a difference
of two integers; that a table is no line only makes the attack weaker, never wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cactus_edge.graph import Graph, Int64Array, Stored
from cactus_edge.kernels import gradient
from cactus_edge.operators import Lookup, Move, Pair, sources

Int32Array = npt.NDArray[np.int32]
Values = Mapping[int, Stored]
_REACH = 128
"""A slope is measured over a share of the values, on each side: finer than most steps, wider than
one."""
_SLOPE_BITS = 9


@dataclass(frozen=True, eq=False)
class Gradient:
    """``values * 2**exponents``: int32 [samples, ...] and int64 [samples]."""

    values: Int32Array
    exponents: Int64Array


def through_factor(outgoing: Gradient, factor: int, exponent: int) -> Gradient:
    """Times ``factor * 2**-exponent``, cut to what is left room for."""
    values = outgoing.values.copy()
    exponents = outgoing.exponents - exponent
    flat = values.reshape(len(values), -1, 1)
    gradient.scale(flat, np.array([factor], np.int32), 2 * gradient.BITS, exponents)
    return Gradient(values, exponents)


def slopes(table: Int64Array) -> tuple[Int32Array, int]:
    """By the last axis: differences of entries around each value.

    Below 2**9 in magnitude, times two to the power of the second result.
    """
    levels = table.shape[-1]
    positions = np.arange(levels)
    above = np.minimum(positions + levels // _REACH, levels - 1)
    below = np.maximum(positions - levels // _REACH, 0)
    found = table[..., above] - table[..., below]
    shift = max(int(np.abs(found).max()).bit_length() - _SLOPE_BITS, 0)
    return (found >> shift).astype(np.int32), shift


def through_table(
    graph: Graph, op: Lookup | Pair, values: Values, outgoing: Gradient
) -> list[Gradient]:
    """Gradients with respect to the inputs of a table."""
    assert op.table is not None, "graph is not resolved"
    outgoing = through_factor(outgoing, 1, 0)  # leaves room for the slope
    count = len(outgoing.values)
    levels = [
        values[index].astype(np.int64) - graph.tensors[index].dtype.range[0] for index in op.inputs
    ]
    if isinstance(op, Lookup):
        flat = levels[0].reshape(count, -1)
        slope, shift = slopes(op.table)
        slope = slope[np.arange(flat.shape[1]) % len(op.table), flat]
        slope = slope.reshape(outgoing.values.shape)
        return [Gradient(outgoing.values * slope, outgoing.exponents + shift)]
    a, b = (
        level.reshape(-1, *graph.tensors[index].shape[1:])
        for level, index in zip(levels, op.inputs, strict=True)
    )
    both = slopes(op.table.T)[0][b, a], slopes(op.table)[0][a, b]
    return [
        _gathered(Gradient(outgoing.values * slope, outgoing.exponents), level.shape)
        for slope, level in zip(both, (a, b), strict=True)
    ]


def _gathered(whole: Gradient, shape: tuple[int, ...]) -> Gradient:
    """The sum over the pixels that a single one stands for."""
    if whole.values.shape == shape:
        return whole
    axes = tuple(range(1, len(shape) - 1))
    pixels = int(np.prod(whole.values.shape[1:-1]))
    shift = max(pixels.bit_length() - 6, 0)  # values have 24 bits at most
    total = (whole.values >> shift).sum(axis=axes, keepdims=True, dtype=np.int32)
    return Gradient(total, whole.exponents + shift)


def through_move(graph: Graph, op: Move, outgoing: Gradient) -> list[Gradient]:
    """Gradients of elements that were put elsewhere; 0 where one was left out."""
    flat = outgoing.values.reshape(len(outgoing.values), -1)
    found: list[Gradient] = []
    for index, (read, written) in zip(op.inputs, sources(graph, op), strict=True):
        tensor = graph.tensors[index]
        incoming = np.zeros((len(flat), tensor.size), np.int32)
        incoming[:, read] = flat[:, written]
        shape = (len(flat), *tensor.shape[1:])
        found.append(Gradient(incoming.reshape(shape), outgoing.exponents))
    return found
