"""Where a bit can flip, and what the flip makes of the stored integer.

A *site* is one bit of one stored weight or bias of a layer. Weights of up to 4 bits lie in files as
4-bit two's complement, all others as 8-bit, biases as 32-bit. A site is *covered* while the faulty
layer keeps the side condition of every graph, |accumulator| < 2^27 for any storable input, and
while it makes no second -128 of a channel: kernels for NEON add two int8 products in int16, where
``2 * (-128) * (-128)`` wraps. Nothing is certified about the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cactus_edge.constraints import ACCUMULATOR_LIMIT, stored_range
from cactus_edge.errors import UsageError
from cactus_edge.fault_report import FaultModel
from cactus_edge.flatbuffer.packing import pack_int4
from cactus_edge.graph import (
    BoolArray,
    DepthwiseConv2D,
    Graph,
    Int64Array,
    Linear,
    Operator,
    Pad,
    Weights,
)

WEIGHTS, BIAS = "weights", "bias"
_BIAS_WIDTH = 32
_LEAST = -128


@dataclass(frozen=True)
class Site:
    """Bit ``bit`` of element ``index`` (in stored order) of ``tensor``, "weights" or "bias"."""

    tensor: str
    index: int
    bit: int


@dataclass(frozen=True, eq=False)
class Channel:
    """The covered sites of one output channel.

    ``column`` int64 [sites]: which input of the channel the weight multiplies, -1 for a bias;
    ``value`` and ``flipped`` int64 [sites]: the stored integer before and after; ``bit`` likewise.
    """

    column: Int64Array
    value: Int64Array
    flipped: Int64Array
    bit: Int64Array

    def subset(self, chosen: Int64Array) -> Channel:
        """The sites at positions ``chosen``."""
        return Channel(
            self.column[chosen], self.value[chosen], self.flipped[chosen], self.bit[chosen]
        )


def stored_width(weights: Weights) -> int:
    """Bits that a weight takes in the file."""
    return 4 if weights.bits <= 4 else 8


def flip(values: Int64Array, bit: int, width: int) -> Int64Array:
    """``values`` in two's complement of ``width`` bits with one bit flipped."""
    mask = -(1 << bit) if bit == width - 1 else 1 << bit
    return values ^ mask


def matrix(op: Linear) -> Int64Array:
    """Weights as int64 [channels, inputs of a channel]."""
    values = op.weights.values.astype(np.int64)
    if isinstance(op, DepthwiseConv2D):
        values = np.moveaxis(values, 3, 0)
    return values.reshape(op.channels, -1)


class Sites:
    """The sites of one layer under a fault model.

    ``weights`` int64 [channels, columns]; ``least`` and ``greatest`` int64, like it: the extreme
    integers that a covered flip makes of each weight, or the weight itself; ``bias_least`` and
    ``bias_greatest`` int64 [channels]: likewise for biases, as changes. ``per_channel`` int64
    [channels] counts the covered sites, ``uncovered`` all others, ``count`` both. ``offset``: a
    weight that changes by ``d`` changes the bias by ``d * offset``, see ``FaultModel.folded``.
    """

    def __init__(self, graph: Graph, op: Linear, faults: FaultModel) -> None:
        """Enumerate the sites of ``op`` and find the covered ones."""
        self.op = op
        self.width = stored_width(op.weights)
        self.bits = tuple(b for b in faults.bits if b < self.width)
        self.bias_bits = tuple(range(faults.bias_bits))
        self.weights = matrix(op)
        self.bias = op.bias.astype(np.int64)
        lower, upper = stored_range(graph, op.inputs[0])
        zero_point = graph.tensors[op.inputs[0]].zero_point
        self._largest = max(abs(lower - zero_point), abs(upper - zero_point))
        self.offset = zero_point if faults.folded else 0
        self._sums = np.abs(self.weights).sum(axis=1)
        self.least, self.greatest = self.weights.copy(), self.weights.copy()
        self.per_channel = np.zeros(op.channels, np.int64)
        for bit in self.bits:
            flipped = flip(self.weights, bit, self.width)
            covered = self._covered(flipped)
            self.per_channel += covered.sum(axis=1)
            self.least = np.where(covered, np.minimum(self.least, flipped), self.least)
            self.greatest = np.where(covered, np.maximum(self.greatest, flipped), self.greatest)
        self.bias_least, self.bias_greatest = np.zeros_like(self.bias), np.zeros_like(self.bias)
        for bit in self.bias_bits:
            change = flip(self.bias, bit, _BIAS_WIDTH) - self.bias
            covered = self._bias_covered(self.bias + change)
            self.per_channel += covered
            change = np.where(covered, change, 0)
            self.bias_least = np.minimum(self.bias_least, change)
            self.bias_greatest = np.maximum(self.bias_greatest, change)
        self.count = self.weights.size * len(self.bits) + self.bias.size * len(self.bias_bits)
        self.uncovered = self.count - int(self.per_channel.sum())

    def _covered(self, flipped: Int64Array, rows: slice = slice(None)) -> BoolArray:
        weights = self.weights[rows]
        sums = self._sums[rows, None] - np.abs(weights) + np.abs(flipped)
        bias = self.bias[rows, None] + (flipped - weights) * self.offset
        second = (flipped == _LEAST) & (weights == _LEAST).any(axis=1, keepdims=True)
        return (sums * self._largest + np.abs(bias) < ACCUMULATOR_LIMIT) & ~second

    def _bias_covered(self, flipped: Int64Array) -> BoolArray:
        return self._sums * self._largest + np.abs(flipped) < ACCUMULATOR_LIMIT

    def channel(self, channel: int) -> Channel:
        """The covered sites of one channel, weights by bit and column first, then the bias."""
        columns: list[Int64Array] = []
        values: list[Int64Array] = []
        flips: list[Int64Array] = []
        bits: list[Int64Array] = []
        rows = slice(channel, channel + 1)
        row = self.weights[rows]
        for bit in self.bits:
            flipped = flip(row, bit, self.width)
            chosen = np.flatnonzero(self._covered(flipped, rows)[0])
            columns.append(chosen)
            values.append(row[0, chosen])
            flips.append(flipped[0, chosen])
            bits.append(np.full(chosen.size, bit))
        own = self.bias[channel : channel + 1]
        for bit in self.bias_bits:
            flipped = flip(own, bit, _BIAS_WIDTH)
            if self._bias_covered(flipped - own + self.bias)[channel]:
                columns.append(np.array([-1]))
                values.append(own)
                flips.append(flipped)
                bits.append(np.array([bit]))
        empty = np.zeros(0, np.int64)
        parts = (np.concatenate([empty, *part]) for part in (columns, values, flips, bits))
        return Channel(*parts)

    def site(self, channel: int, column: int, bit: int) -> Site:
        """The site by its place in the file; ``column`` -1 is the bias."""
        if column < 0:
            return Site(BIAS, channel, bit)
        if isinstance(self.op, DepthwiseConv2D):
            return Site(WEIGHTS, column * self.op.channels + channel, bit)
        return Site(WEIGHTS, channel * self.weights.shape[1] + column, bit)

    def widened(self, lower: Int64Array, upper: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Accumulator bounds [channels] over all storable inputs, with any covered flip."""
        change = np.maximum(self.greatest - self.weights, self.weights - self.least)
        reach = change.max(axis=1, initial=0) * (self._largest + abs(self.offset))
        low = lower + np.minimum(-reach, self.bias_least)
        high = upper + np.maximum(reach, self.bias_greatest)
        return low, high

    def faulty(self, graph: Graph, site: Site) -> Graph:
        """``graph``, which holds the layer, with one flipped bit in it."""
        own = self.op
        return replace(
            graph, operators=tuple(self._flipped(site) if o is own else o for o in graph.operators)
        )

    def _flipped(self, site: Site) -> Linear:
        op, bias = self.op, self.bias.copy()
        one = slice(site.index, site.index + 1)
        if site.tensor == BIAS:
            bias[one] = flip(bias[one], site.bit, _BIAS_WIDTH)
            return replace(op, bias=bias)
        values = op.weights.values.astype(np.int64).reshape(-1)
        flipped = flip(values[one], site.bit, self.width)
        columns = 1 if isinstance(op, DepthwiseConv2D) else self.weights.shape[1]
        bias[site.index // columns % op.channels] += (flipped - values[one])[0] * self.offset
        values[one] = flipped
        shaped = values.astype(np.int8).reshape(op.weights.values.shape)
        weights = Weights(shaped, self.width, op.weights.scale_bits)
        return replace(op, weights=weights, bias=bias)


def linear_layers(graph: Graph, names: Sequence[str] | None) -> tuple[int, ...]:
    """Indices of the layers called ``names``, in the order of execution; of all if None.

    Raises:
        UsageError: no layer has such a name, or several have it.
    """
    layers = {i: op.name for i, op in enumerate(graph.operators) if isinstance(op, Linear)}
    if names is None:
        return tuple(layers)
    for name in names:
        count = list(layers.values()).count(name)
        if count != 1:
            raise UsageError(
                f"{count} layers with weights are called '{name}'; "
                f"the model has {', '.join(layers.values())}"
            )
    return tuple(i for i, name in layers.items() if name in names)


def shared(graph: Graph, op: Linear, faults: FaultModel) -> str:
    """Why a flip in ``op`` may reach another constant too, or an empty string.

    A file may store equal bytes once; then one flip changes both tensors, which is not covered.
    """
    bits = (bool(faults.bits), bool(faults.bias_bits))
    own = _constants(op)
    for flips, constant, place in zip(bits, own, range(len(own)), strict=True):
        for other in graph.core if flips else ():
            for at, bytes_ in enumerate(_constants(other)):
                if bytes_ == constant and (other is not op or at != place):
                    return (
                        f"'{op.name}' and '{other.name}' hold equal constants, stored once perhaps"
                    )
    return ""


def _constants(op: Operator) -> list[bytes]:
    """The constants of an operator as a file holds them; a linear layer's weights come first."""
    if isinstance(op, Pad):
        return [np.array(op.paddings, kind).tobytes() for kind in ("<i4", "<i8")]
    if not isinstance(op, Linear):
        return []
    values = op.weights.values
    weights = pack_int4(values) if stored_width(op.weights) == 4 else values
    return [weights.tobytes(), op.bias.astype("<i4").tobytes()]
