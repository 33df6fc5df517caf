"""A resolved graph as linear maps and staircases, the form in which linear bounds are taken.

Every tensor holds *offset* values, stored integers less the tensor's zero point, flattened. An
operator is one of:

- ``Stairs``: a linear map into accumulators, then a monotone staircase (CONV_2D, DEPTHWISE,
  FULLY_CONNECTED, AVERAGE_POOL_2D; ADD with the tables that rescale its operands),
- ``Maximum``: the greatest of some elements (MAX_POOL_2D),
- ``Move``: elements put elsewhere (PAD, RESHAPE).

A staircase is known by its thresholds: the least accumulator that reaches each level, found by
bisection on the deployed function, so that any rounding profile fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cactus_edge import semantics
from cactus_edge.constraints import accumulator_bounds
from cactus_edge.errors import UnsupportedModelError
from cactus_edge.execute import requantize
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
    Pool2D,
    Requantization,
    Reshape,
    Weights,
    window_geometry,
)
from cactus_edge.operators import TABLED
from cactus_edge.operators import Move as Moved
from cactus_edge.semantics import AddRounding, Rounding

_UNREACHED = 1 << 50
_SIGNIFICAND = 24


@dataclass(frozen=True, eq=False)
class Taps:
    """A linear map, see ``kernels.relax``; ``geometry`` (height, width, channels, row, column)."""

    starts: Int64Array
    taps: Int64Array
    weights: Int64Array
    geometry: Int64Array

    @property
    def arrays(self) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
        """As the kernels take them."""
        return self.starts, self.taps, self.weights, self.geometry

    @cached_property
    def fan(self) -> int:
        """At most this many times a multiplier is added to a coefficient, going backwards."""
        return int(np.abs(self.weights).sum())


@dataclass(frozen=True, eq=False)
class Staircase:
    """``stored - zero_point = lowest + number of thresholds reached``, for each kind of element.

    ``thresholds`` int64 [kinds, levels - 1], ascending; ``factors`` int64 [kinds, 2] are the real
    slope ``significand * 2**-shift``, which steers and decides nothing; ``kinds`` int64 [elements].
    """

    lowest: int
    thresholds: Int64Array
    factors: Int64Array
    kinds: Int64Array


@dataclass(frozen=True, eq=False)
class Stairs:
    """``staircase(bias + sum of the maps of the inputs)``.

    ``tables``: for each input the values that replace offset values ``first``, ``first + 1``, ...
    before they are summed (ADD), or None. ``bias`` int64 [elements].
    """

    inputs: tuple[int, ...]
    output: int
    maps: tuple[Taps | None, ...]
    tables: tuple[tuple[int, Int64Array] | None, ...]
    bias: Int64Array
    staircase: Staircase


@dataclass(frozen=True, eq=False)
class Maximum:
    """``sources`` int64 [elements, window], -1 outside; the result is limited to ``limits``."""

    inputs: tuple[int]
    output: int
    sources: Int64Array
    limits: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Move:
    """``sources`` int64 [elements]: the input element that lands here, -1 for offset value 0."""

    inputs: tuple[int]
    output: int
    sources: Int64Array


Node = Stairs | Maximum | Move


@dataclass(frozen=True, eq=False)
class Network:
    """Nodes in execution order; ``sizes`` and ``zero_points`` by tensor."""

    graph: Graph
    nodes: tuple[Node, ...]
    sizes: dict[int, int]
    zero_points: dict[int, int]


def undescribed(graph: Graph) -> Operator | None:
    """The first operator without a linear form: a table or a ``Move``; any of int16 activations."""
    if graph.computes_int16:
        return graph.core[0]
    return next((op for op in graph.core if isinstance(op, (*TABLED, Moved))), None)


def network(graph: Graph) -> Network:
    """The network of a resolved graph, from its integer input to its logits.

    Raises:
        UnsupportedModelError: see ``undescribed``.
    """
    if (op := undescribed(graph)) is not None:
        raise UnsupportedModelError(
            f"{op.kind} '{op.name}': linear bounds do not describe it; use method 'interval'"
        )
    nodes = tuple(_node(graph, op) for op in graph.core)
    held = {graph.core_input, *(op.output for op in graph.core)}
    return Network(
        graph,
        nodes,
        {index: graph.tensors[index].size for index in held},
        {index: graph.tensors[index].zero_point for index in held},
    )


def _node(graph: Graph, op: Operator) -> Node:
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    match op:
        case Linear():
            return _linear(graph, op)
        case Add():
            return _add(graph, op)
        case AveragePool2D():
            return _average(graph, op)
        case MaxPool2D():
            positions = np.arange(source.size, dtype=np.int64).reshape(source.shape[1:])
            lower, upper = graph.output_range(op)
            limits = lower - target.zero_point, upper - target.zero_point
            return Maximum((op.inputs[0],), op.output, _window(op, positions), limits)
        case Pad():
            positions = np.arange(source.size, dtype=np.int64).reshape(source.shape[1:])
            moved = np.pad(positions, op.paddings[1:], constant_values=-1)
            return Move((op.inputs[0],), op.output, moved.reshape(-1))
        case _:
            assert isinstance(op, Reshape)
            return Move((op.inputs[0],), op.output, np.arange(source.size, dtype=np.int64))


def _window(op: Pool2D, positions: Int64Array) -> Int64Array:
    """Int64 [elements, window]: what each output element reads; -1 outside the input."""
    taps: list[Int64Array] = []
    geometry = [
        window_geometry(positions.shape[a], op.window[a], op.stride[a], 1, op.padding)
        for a in (0, 1)
    ]
    borders = [geometry[0][1:], geometry[1][1:], (0, 0)]
    padded = np.pad(positions, borders, constant_values=-1)
    for row in range(op.window[0]):
        for column in range(op.window[1]):
            bottom = row + (geometry[0][0] - 1) * op.stride[0] + 1
            right = column + (geometry[1][0] - 1) * op.stride[1] + 1
            view = padded[row : bottom : op.stride[0], column : right : op.stride[1]]
            taps.append(view.reshape(-1))
    return np.stack(taps, axis=1)


def _linear(graph: Graph, op: Linear) -> Stairs:
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    parameters = op.requantization
    assert parameters is not None, "graph is not resolved"
    if isinstance(op, FullyConnected):
        taps = _matrix(op.weights.values.astype(np.int64))
    else:
        assert isinstance(op, Conv2D)
        taps = _convolution(op, source.shape[1:], target.shape[1:])
    lower, upper = accumulator_bounds(graph, op)
    limits = graph.output_range(op)

    def stored(accumulator: Int64Array) -> Int64Array:
        return requantize(accumulator, parameters, target.zero_point, limits)

    staircase = Staircase(
        limits[0] - target.zero_point,
        thresholds(stored, lower, upper, limits),
        np.array([_factor(parameters, c) for c in range(op.channels)], np.int64),
        np.arange(target.size, dtype=np.int64) % op.channels,
    )
    bias = np.tile(op.bias.astype(np.int64), target.size // op.channels)
    return Stairs((op.inputs[0],), op.output, (taps,), (None,), bias, staircase)


def _matrix(weights: Int64Array) -> Taps:
    rows, columns = np.nonzero(weights)
    taps = np.zeros((rows.size, 5), np.int64)
    taps[:, 0], taps[:, 2], taps[:, 4] = columns, 1, 1
    starts = np.searchsorted(rows, np.arange(len(weights) + 1)).astype(np.int64)
    geometry = np.array([1, 1, len(weights), 0, 0], np.int64)
    return Taps(starts, taps, weights[rows, columns], geometry)


def _convolution(op: Conv2D, source: tuple[int, ...], target: tuple[int, ...]) -> Taps:
    values = op.weights.values.astype(np.int64)
    if isinstance(op, DepthwiseConv2D):
        repeats = op.channels // source[2]
        values = np.moveaxis(values[0], 2, 0)[:, :, :, None]
        channel, row, column, reads = np.nonzero(values)
        reads = channel // repeats
        weights = values[channel, row, column, 0]
    else:
        channel, row, column, reads = np.nonzero(values)
        weights = values[channel, row, column, reads]
    taps = np.zeros((channel.size, 5), np.int64)
    for axis, place in ((0, row), (1, column)):
        extent, stride = source[axis], op.stride[axis]
        count, before, _ = window_geometry(
            extent, values.shape[1 + axis], stride, op.dilation[axis], op.padding
        )
        start = place * op.dilation[axis] - before
        taps[:, 0] += start * source[2] * (source[1] if axis == 0 else 1)
        taps[:, 1 + 2 * axis] = np.maximum(0, -(start // stride))
        taps[:, 2 + 2 * axis] = np.minimum(count, (extent - 1 - start) // stride + 1)
    taps[:, 0] += reads
    starts = np.searchsorted(channel, np.arange(op.channels + 1)).astype(np.int64)
    steps = [op.stride[0] * source[1] * source[2], op.stride[1] * source[2]]
    geometry = np.array([target[0], target[1], op.channels, *steps], np.int64)
    return Taps(starts, taps, weights, geometry)


def _average(graph: Graph, op: AveragePool2D) -> Stairs:
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    channels = source.shape[3]
    ones = DepthwiseConv2D(
        name=op.name,
        inputs=op.inputs,
        output=op.output,
        weights=Weights(np.ones((1, *op.window, channels), np.int8)),
        bias=np.zeros(channels, np.int32),
        stride=op.stride,
        padding=op.padding,
    )
    taps = _convolution(ones, source.shape[1:], target.shape[1:])
    positions = np.zeros(source.shape[1:], np.int64)
    counts = (_window(op, positions) >= 0).sum(axis=1)
    distinct, kinds = np.unique(counts, return_inverse=True)
    lower, upper = graph.output_range(op)
    least, greatest = source.dtype.range

    def stored(total: Int64Array) -> Int64Array:
        return semantics.clamp(semantics.average(total, distinct), lower, upper)  # type: ignore

    shifts = [_significand(1, int(count)) for count in distinct]
    staircase = Staircase(
        lower - target.zero_point,
        thresholds(stored, least * distinct, greatest * distinct, (lower, upper)),
        np.array(shifts, np.int64),
        kinds.astype(np.int64).reshape(-1),
    )
    return Stairs(
        (op.inputs[0],),
        op.output,
        (taps,),
        (None,),
        counts.astype(np.int64) * source.zero_point,
        staircase,
    )


def _add(graph: Graph, op: Add) -> Stairs:
    parameters = op.requantization
    assert parameters is not None, "graph is not resolved"
    target = graph.tensors[op.output]
    m_a, s_a, m_b, s_b, m_o, s_o = parameters.integers
    rounding = parameters.rounding
    tables: list[tuple[int, Int64Array]] = []
    for index, multiplier, shift in ((op.inputs[0], m_a, s_a), (op.inputs[1], m_b, s_b)):
        tensor = graph.tensors[index]
        first, last = (end - tensor.zero_point for end in tensor.dtype.range)
        values = np.arange(first, last + 1, dtype=np.int64)
        if rounding is AddRounding.FIXED_POINT:
            table = values * multiplier >> shift
        else:
            rule = semantics.REQUANTIZE[_ADD_RULE[rounding]]
            table = rule(values * 1048576, multiplier, shift)
        tables.append((first, table))
    limits = graph.output_range(op)

    def stored(total: Int64Array) -> Int64Array:
        if rounding is AddRounding.FIXED_POINT:
            rounded = semantics.shift_half_up(total * m_o, s_o)  # type: ignore
        else:
            rounded = semantics.REQUANTIZE[_ADD_RULE[rounding]](total, m_o, s_o)
        return semantics.clamp(rounded + target.zero_point, *limits)  # type: ignore

    least, most = (np.array([sum(int(t[end]) for _, t in tables)], np.int64) for end in (0, -1))
    double = rounding is AddRounding.DOUBLE_HALF_AWAY
    staircase = Staircase(
        limits[0] - target.zero_point,
        thresholds(stored, least, most, limits),
        np.array([_significand(m_o, 1 << (s_o + (31 if double else 0)))], np.int64),
        np.zeros(target.size, np.int64),
    )
    zeros = np.zeros(target.size, np.int64)
    return Stairs(op.inputs, op.output, (None, None), tuple(tables), zeros, staircase)


_ADD_RULE = {
    AddRounding.DOUBLE_HALF_AWAY: Rounding.DOUBLE_HALF_AWAY,
    AddRounding.SINGLE: Rounding.SINGLE,
}


def thresholds(
    stored: Callable[[Int64Array], Int64Array],
    lower: Int64Array,
    upper: Int64Array,
    limits: tuple[int, int],
) -> Int64Array:
    """Int64 [kinds, levels - 1]: the least accumulator in [lower, upper] that reaches each level.

    Levels that even ``upper`` does not reach get a number above every accumulator, levels that
    ``lower`` reaches one below.

    Args:
        stored: the deployed function, int64 [levels, kinds] to the same, monotone.
        lower: int64 [kinds], the least accumulator; ``upper`` the greatest.
        upper: see ``lower``.
        limits: least and greatest stored integer.
    """
    wanted = np.arange(limits[0] + 1, limits[1] + 1, dtype=np.int64)[:, None]
    low = np.broadcast_to(lower, (wanted.size, lower.size)).copy()
    high = np.broadcast_to(upper + 1, low.shape).copy()
    while (low < high).any():
        middle = (low + high) >> 1
        reaches = stored(np.minimum(middle, upper)) >= wanted
        reaches |= middle > upper
        high = np.where(reaches, middle, high)
        low = np.where(reaches, low, np.minimum(middle + 1, high))
    found = np.where(low > upper, _UNREACHED, np.where(low == lower, -_UNREACHED, low))
    return np.ascontiguousarray(found.T)


def _factor(parameters: Requantization, channel: int) -> tuple[int, int]:
    """The real slope of a channel as (significand of 24 bits, shift)."""
    code = int(parameters.rounding[channel])
    double = code in (Rounding.DOUBLE_HALF_AWAY, Rounding.DOUBLE_HALF_UP)
    shift = int(parameters.shift[channel]) + (31 if double else 0)
    return _significand(int(parameters.multiplier[channel]), 1 << shift)


def _significand(numerator: int, denominator: int) -> tuple[int, int]:
    """``numerator / denominator`` as (significand below 2**24, shift)."""
    if numerator <= 0:
        return 0, 1
    shift = max(1, _SIGNIFICAND - 1 - numerator.bit_length() + denominator.bit_length())
    shift = min(shift, 60)
    return (numerator << shift) // denominator, shift
