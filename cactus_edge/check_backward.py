"""One linear bound of the checker: multipliers backwards, exact offsets, all in int64.

Coefficients and multipliers are limited so that no sum leaves int64; a proof that needs larger ones
is refused.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass, field

import numpy as np

from cactus_edge import check_bounds, exact
from cactus_edge.check_bounds import Box
from cactus_edge.check_stairs import operand
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
    Reshape,
    window_geometry,
)
from cactus_edge.proofs import Leaf

_COEFFICIENT, _PRODUCT, _MULTIPLIER, _CODE = 1 << 34, 1 << 44, 1 << 38, 1 << 27
_SHARE = 1 << 60
"""What one operator adds to a coefficient stays below; so no sum of coefficients wraps around."""
_OPERAND = 1 << 50
"""A multiplier times an operand of ADD; the line's slope times any stored value then fits too."""


class Refused(Exception):
    """A proof that does not prove; the message says why."""


@dataclass(frozen=True, eq=False)
class Steps:
    """One operator's staircase over a box, flattened: [elements] each, but for the last two.

    ``least``, ``most`` accumulators; ``low``, ``high`` stored; ``bias`` what is added to the sum;
    ``cut`` whether a split names the element; ``table`` int64 [kinds, levels]: the least
    accumulator that reaches each stored level from ``lowest`` on; ``kinds`` picks the row;
    ``factors`` int64 [kinds, 2]: the slope as (significand below 2**24, shift).
    """

    least: Int64Array
    most: Int64Array
    low: Int64Array
    high: Int64Array
    bias: Int64Array
    cut: Int64Array
    lowest: int
    table: Int64Array
    kinds: Int64Array
    factors: Int64Array


@dataclass(eq=False)
class Case:
    """Bounds of every tensor, in its own shape, and the staircases of the operators."""

    values: dict[int, Box]
    steps: dict[int, Steps] = field(default_factory=dict)


class Backward:
    """One linear bound of one leaf."""

    def __init__(self, graph: Graph, case: Case, leaf: Leaf) -> None:
        """Read the leaf's multipliers.

        Raises:
            Refused: they cannot be read.
        """
        self.graph, self.case = graph, case
        if not 0 <= leaf.bits <= 26:
            raise Refused(f"a target of {leaf.bits} bits")
        self.bits = leaf.bits
        try:
            packed = base64.b64decode(leaf.multipliers, validate=True)
            limit = 4 * sum(steps.low.size for steps in case.steps.values())
            raw = zlib.decompressobj().decompress(packed, limit + 1)
            self.codes = np.frombuffer(raw, "<i4").astype(np.int64)
        except (ValueError, binascii.Error, zlib.error):
            raise Refused("multipliers that cannot be read") from None
        if np.abs(self.codes).max(initial=0) > _CODE:
            raise Refused("a multiplier out of range")

    def bound(self, layer: Linear, seed: Int64Array, largest: int) -> int:
        """A lower bound of ``seed`` times the accumulators of ``layer``."""
        shift = max(0, self.bits - max(largest, 1).bit_length())
        self.coefficients: dict[int, Int64Array] = {}
        codes = self._by_operator(layer)
        operators = self.graph.core[: self.graph.core.index(layer)]
        # Scaled afterwards: it is the combination that is small, not what is combined.
        constant = self._through(layer, seed) << shift
        self.coefficients[layer.inputs[0]] <<= shift
        for op in reversed(operators):
            weights = self.coefficients.pop(op.output, None)
            if op.output in self.case.steps:
                shape = self.graph.tensors[op.output].shape[1:]
                given = np.zeros(shape, np.int64) if weights is None else _small(weights)
                multipliers, offset = self._line(op, given.reshape(-1), codes[op.output])
                constant += offset + self._through(op, multipliers)
            elif weights is not None:
                constant += self._moved(op, _small(weights))
        entry = self.graph.core_input
        low, high = (end - self.graph.tensors[entry].zero_point for end in self.case.values[entry])
        weights = _small(self._into(entry))
        constant += exact.total(np.minimum(weights * low, weights * high))
        return -(-constant // (1 << shift))

    def _by_operator(self, layer: Linear) -> dict[int, Int64Array]:
        """The codes of each operator before ``layer``, for its elements that have one."""
        found: dict[int, Int64Array] = {}
        start = 0
        for op in self.graph.core[: self.graph.core.index(layer)]:
            if op.output in self.case.steps:
                steps = self.case.steps[op.output]
                count = int(((steps.low < steps.high) | (steps.cut != 0)).sum())
                found[op.output] = self.codes[start : start + count]
                start += count
        if start != self.codes.size:
            raise Refused(f"{self.codes.size} multipliers where {start} are needed")
        return found

    def _into(self, tensor: int) -> Int64Array:
        shape = self.graph.tensors[tensor].shape[1:]
        return self.coefficients.setdefault(tensor, np.zeros(shape, np.int64))

    def _line(self, op: Operator, weights: Int64Array, codes: Int64Array) -> tuple[Int64Array, int]:
        """Multipliers of the accumulators, and the sum of the exact offsets."""
        steps = self.case.steps[op.output]
        zero_point = self.graph.tensors[op.output].zero_point
        free = np.flatnonzero((steps.low < steps.high) | (steps.cut != 0))
        fixed = weights * (steps.low - zero_point)
        fixed[free] = 0
        chosen, kinds = weights[free], steps.kinds[free]
        significand, shift = steps.factors[kinds].T
        half = np.int64(1) << (shift - 1)
        unit = 1 << max(0, self.bits - 16)
        natural = (chosen * significand + half) >> shift
        priced = (codes * unit * significand + half) >> shift
        prices = np.where(steps.cut[free] != 0, priced, (natural * codes + 8192) >> 14)
        least, most, bias = steps.least[free], steps.most[free], steps.bias[free]
        largest = np.maximum.reduce(
            [np.abs(least), np.abs(most), np.abs(bias), np.ones_like(least)]
        )
        prices[np.abs(prices) > np.minimum(_PRODUCT // largest, _MULTIPLIER)] = 0
        best = np.full(free.size, 1 << 62, np.int64)
        rows = np.arange(free.size)
        level = steps.low[free]
        while rows.size:
            at = level[rows]
            column, kind = at - steps.lowest, kinds[rows]
            left = np.where(at == steps.low[free[rows]], least[rows], steps.table[kind, column])
            last = at == steps.high[free[rows]]
            after = steps.table[kind, np.minimum(column + 1, steps.table.shape[1] - 1)]
            right = np.where(last, most[rows], after - 1)
            price = prices[rows]
            value = chosen[rows] * (at - zero_point) - np.maximum(price * left, price * right)
            best[rows] = np.minimum(best[rows], value)
            rows = rows[~last]
            level[rows] += 1
        multipliers = np.zeros_like(weights)
        multipliers[free] = prices
        return multipliers, exact.total(fixed) + exact.total(best)

    def _through(self, op: Operator, multipliers: Int64Array) -> int:
        """Add the sum's share to the inputs' coefficients; its constant."""
        shape = self.graph.tensors[op.output].shape[1:]
        if isinstance(op, Add):
            return sum(self._operand(op, side, multipliers.reshape(shape)) for side in (0, 1))
        if exact.largest(multipliers) * _fan(op) >= _SHARE:
            raise Refused("multipliers that are too large")
        steps = self.case.steps[op.output]
        into = self._into(op.inputs[0])
        transposed(op, multipliers.reshape(shape), into)
        _summed(into)
        return exact.dot(multipliers, steps.bias)

    def _operand(self, op: Add, side: int, multipliers: Int64Array) -> int:
        """``multiplier * f(x)`` from below by a line with an exact offset, for each element."""
        tensor = op.inputs[side]
        low, high = self.case.values[tensor]
        begin, end = (operand(self.graph, op, side, edge) for edge in (low, high))
        reach = max(exact.largest(begin), exact.largest(end))
        if exact.largest(multipliers) * reach >= _OPERAND:
            raise Refused("multipliers that are too large for an ADD")
        run = np.maximum(high - low, 1)
        slope = (2 * multipliers * (end - begin) + run) // (2 * run)
        best = np.full(low.shape, 1 << 62, np.int64)
        zero_point = self.graph.tensors[tensor].zero_point
        for step in range(int((high - low).max()) + 1):
            x = np.minimum(low + step, high)
            value = multipliers * operand(self.graph, op, side, x) - slope * (x - zero_point)
            best = np.minimum(best, value)
        into = self._into(tensor)
        into += slope
        _summed(into)
        return exact.total(best)

    def _moved(self, op: Operator, weights: Int64Array) -> int:
        """PAD, RESHAPE and MAX_POOL_2D."""
        into = self._into(op.inputs[0])
        if isinstance(op, Reshape):
            into += weights.reshape(into.shape)
            _summed(into)
            return 0
        if isinstance(op, Pad):
            (top, _), (left, _), (before, _) = op.paddings[1:]
            height, width, channels = into.shape
            into += weights[top : top + height, left : left + width, before : before + channels]
            _summed(into)
            return 0
        if not isinstance(op, MaxPool2D):
            raise Refused(f"a linear bound through {op.kind}, which has none")
        return self._maximum(op, weights, into)

    def _maximum(self, op: MaxPool2D, weights: Int64Array, into: Int64Array) -> int:
        """One element stands for the maximum where it dominates, or bounds it from below."""
        zero_point = self.graph.tensors[op.inputs[0]].zero_point
        far = 1 << 40
        arguments = (op.window, op.stride, (1, 1), op.padding)

        def taken(x: Int64Array, fill: int) -> Int64Array:
            part = check_bounds.patches(x[None], *arguments, fill)[0]
            return np.moveaxis(part, 4, 2).reshape(*part.shape[:2], part.shape[4], -1)

        low, high = self.case.values[op.inputs[0]]
        lows, highs = taken(low - zero_point, -far), taken(high - zero_point, -far)
        where = taken(np.arange(into.size, dtype=np.int64).reshape(into.shape), -1)
        best = lows.argmax(axis=-1)[..., None]
        others = highs.copy()
        np.put_along_axis(others, best, -far, axis=-1)
        strongest = np.take_along_axis(lows, best, axis=-1)[..., 0]
        source = np.take_along_axis(where, best, axis=-1)[..., 0]
        dominates = strongest >= others.max(axis=-1)
        least, most = lows.max(axis=-1), highs.max(axis=-1)
        lowest, highest = (limit - zero_point for limit in self.graph.output_range(op))
        free = (most <= highest) & ((least >= lowest) | (weights > 0)) & (dominates | (weights > 0))
        np.add.at(into.reshape(-1), source[free], weights[free])
        _summed(into)
        out_low, out_high = (end - zero_point for end in self.case.values[op.output])
        fixed = np.minimum(weights * out_low, weights * out_high)
        return exact.total(fixed[~free])


def _small(weights: Int64Array) -> Int64Array:
    """Coefficients for which no sum leaves int64."""
    if int(np.abs(weights).max(initial=0)) >= _COEFFICIENT:
        raise Refused("coefficients that are too large")
    return weights


def _summed(into: Int64Array) -> None:
    """Refuse coefficients to which another share could not be added in int64."""
    if exact.largest(into) >= 2 * _SHARE:
        raise Refused("coefficients that are too large")


def _fan(op: Operator) -> int:
    """At most this many times the largest multiplier is added to an input's coefficient."""
    if not isinstance(op, Linear):
        assert isinstance(op, AveragePool2D)
        return op.window[0] * op.window[1]
    weights = np.abs(op.weights.values.astype(np.int64))
    if isinstance(op, DepthwiseConv2D):  # one input channel serves neighbouring output channels
        return int(weights.sum())
    return int(weights.reshape(-1, weights.shape[-1]).sum(axis=0).max(initial=0))


def transposed(op: Operator, multipliers: Int64Array, into: Int64Array) -> None:
    """Add the transposed sum of a linear layer or an average pool to ``into``, in tensor shapes."""
    if isinstance(op, FullyConnected):
        into += (multipliers @ op.weights.values.astype(np.int64)).reshape(into.shape)
        return
    assert isinstance(op, (Conv2D, AveragePool2D))
    pooled = isinstance(op, AveragePool2D)
    kernel = op.window if isinstance(op, AveragePool2D) else op.weights.values.shape[1:3]
    dilation = (1, 1) if isinstance(op, AveragePool2D) else op.dilation
    borders: list[tuple[int, int, int]] = []
    for axis in (0, 1):
        borders.append(
            window_geometry(
                into.shape[axis], kernel[axis], op.stride[axis], dilation[axis], op.padding
            )
        )
    (rows, top, bottom), (columns, left, right) = borders
    padded = np.zeros(
        (into.shape[0] + top + bottom, into.shape[1] + left + right, into.shape[2]), np.int64
    )
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            if pooled:
                share = multipliers
            else:
                assert isinstance(op, Conv2D)
                values = op.weights.values.astype(np.int64)
                if isinstance(op, DepthwiseConv2D):
                    product = multipliers * values[0, row, column]
                    share = product.reshape(*product.shape[:2], into.shape[2], -1).sum(axis=-1)
                else:
                    share = multipliers @ values[:, row, column]
            y, x = row * dilation[0], column * dilation[1]
            padded[
                y : y + (rows - 1) * op.stride[0] + 1 : op.stride[0],
                x : x + (columns - 1) * op.stride[1] + 1 : op.stride[1],
            ] += share
    into += padded[top : top + into.shape[0], left : left + into.shape[1]]
