"""The checker's view of one operator: what is summed, and the staircase that rounds the sum."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cactus_edge import check_bounds, semantics
from cactus_edge.check_bounds import Box
from cactus_edge.graph import (
    Add,
    AveragePool2D,
    Graph,
    Int64Array,
    Linear,
    Operator,
    Pool2D,
)
from cactus_edge.semantics import AddRounding, Rounding


@dataclass(frozen=True, eq=False)
class Staircase:
    """The deployed function of one operator's accumulators; ``reach`` bounds their magnitude."""

    graph: Graph
    op: Operator
    kinds: Int64Array
    slopes: tuple[Fraction, ...]
    bias: Int64Array
    reach: int
    counts: Int64Array | None = None

    def stored(self, accumulators: Int64Array) -> Int64Array:
        """Stored values of accumulators [elements]."""
        return self.of_kind(accumulators, self.kinds)

    def of_kind(self, accumulators: Int64Array, kinds: Int64Array) -> Int64Array:
        """Stored values; ``kinds`` broadcasts against the accumulators."""
        op, graph = self.op, self.graph
        zero_point = graph.tensors[op.output].zero_point
        limits = graph.output_range(op)
        if self.counts is not None:
            return semantics.clamp(semantics.average(accumulators, self.counts[kinds]), *limits)  # pyright: ignore
        if isinstance(op, Add):
            rounded = _add_epilogue(op, accumulators)
        else:
            assert isinstance(op, Linear)
            assert op.requantization is not None
            parameters = op.requantization
            kinds = np.broadcast_to(kinds, accumulators.shape)
            rounded = np.empty_like(accumulators)
            for code in np.unique(parameters.rounding[kinds]).tolist():
                chosen = parameters.rounding[kinds] == code
                channel = kinds[chosen]
                rounded[chosen] = semantics.REQUANTIZE[Rounding(code)](
                    accumulators[chosen], parameters.multiplier[channel], parameters.shift[channel]
                )
        return semantics.clamp(rounded + zero_point, *limits)  # pyright: ignore


def _add_epilogue(op: Add, total: Int64Array) -> Int64Array:
    assert op.requantization is not None
    *_, multiplier, shift = op.requantization.integers
    if op.requantization.rounding is AddRounding.FIXED_POINT:
        return semantics.shift_half_up(total * multiplier, shift)  # pyright: ignore
    single = op.requantization.rounding is AddRounding.SINGLE
    rule = Rounding.SINGLE if single else Rounding.DOUBLE_HALF_AWAY
    return semantics.REQUANTIZE[rule](total, multiplier, shift)


def operand(graph: Graph, op: Add, side: int, stored: Int64Array) -> Int64Array:
    """What one operand of an ADD contributes to the sum."""
    assert op.requantization is not None
    multiplier, shift = op.requantization.integers[2 * side : 2 * side + 2]
    x = stored - graph.tensors[op.inputs[side]].zero_point
    if op.requantization.rounding is AddRounding.FIXED_POINT:
        return x * multiplier >> shift
    single = op.requantization.rounding is AddRounding.SINGLE
    rule = Rounding.SINGLE if single else Rounding.DOUBLE_HALF_AWAY
    return semantics.REQUANTIZE[rule](x * 1048576, multiplier, shift)


def staircase(graph: Graph, op: Operator) -> Staircase:
    """The staircase of a linear layer, an ADD or an average pool."""
    target = graph.tensors[op.output]
    if isinstance(op, Linear):
        assert op.requantization is not None
        kinds = np.arange(target.size, dtype=np.int64) % op.channels
        parameters = op.requantization
        slopes: list[Fraction] = []
        for channel in range(op.channels):
            double = int(parameters.rounding[channel]) in (0, 1)
            exponent = int(parameters.shift[channel]) + (31 if double else 0)
            slopes.append(Fraction(int(parameters.multiplier[channel]), 1 << exponent))
        bias = np.tile(op.bias.astype(np.int64), target.size // op.channels)
        return Staircase(graph, op, kinds, tuple(slopes), bias, 1 << 27)
    zeros = np.zeros(target.size, np.int64)
    if isinstance(op, Add):
        assert op.requantization is not None
        *_, multiplier, shift = op.requantization.integers
        double = op.requantization.rounding is AddRounding.DOUBLE_HALF_AWAY
        slope = Fraction(multiplier, 1 << (shift + (31 if double else 0)))
        ends = [
            operand(graph, op, side, np.array(graph.tensors[op.inputs[side]].dtype.range))
            for side in (0, 1)
        ]
        reach = int(sum(np.abs(end).max() for end in ends))
        return Staircase(graph, op, zeros, (slope,), zeros, reach)
    assert isinstance(op, AveragePool2D)
    inside = np.ones((1, *graph.tensors[op.inputs[0]].shape[1:3], 1), np.int64)
    counts = window_sums(op, inside)[0]
    counts = np.broadcast_to(counts, target.shape[1:]).reshape(-1)
    distinct, kinds = np.unique(counts, return_inverse=True)
    slopes_ = tuple(Fraction(1, int(count)) for count in distinct)
    zero_point = graph.tensors[op.inputs[0]].zero_point
    reach = 256 * int(distinct.max())
    return Staircase(
        graph, op, kinds.reshape(-1).astype(np.int64), slopes_, counts * zero_point, reach, distinct
    )


def window_sums(op: Pool2D, x: Int64Array) -> Int64Array:
    """Sums over the windows, elements outside counting as 0."""
    patches = check_bounds.patches(x, op.window, op.stride, (1, 1), op.padding, 0)
    return patches.sum(axis=(3, 4))


def accumulated(graph: Graph, op: Operator, boxes: list[Box]) -> Box:
    """Least and greatest accumulators over the bounds of the operator's inputs."""
    if isinstance(op, Linear):
        zero_point = graph.tensors[op.inputs[0]].zero_point
        return check_bounds.accumulators(op, boxes[0][0] - zero_point, boxes[0][1] - zero_point)
    if isinstance(op, Add):
        least, most = (
            operand(graph, op, 0, boxes[0][e]) + operand(graph, op, 1, boxes[1][e]) for e in (0, 1)
        )
        return least, most
    assert isinstance(op, AveragePool2D)
    return window_sums(op, boxes[0][0]), window_sums(op, boxes[0][1])
