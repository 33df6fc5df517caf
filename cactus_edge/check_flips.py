"""The checker's own bounds under single bit flips, in plain NumPy integers.

Shares nothing with the certifier: inputs are gathered through index maps, accumulators are sums and
radii. With ``s = lower + upper`` and ``r = upper - lower`` of what a weight reads, flipping ``w``
into ``v`` adds ``(v - w) s`` to the sum of an accumulator's bounds and ``(|v| - |w|) r`` to their
difference; where the zero point ``z`` was folded already, also ``2 (v - w) z`` to the sum. Every
flip is enumerated, and so is every bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cactus_edge import decision, semantics
from cactus_edge.check_bounds import Box, last_layer, propagate
from cactus_edge.check_margin import holds
from cactus_edge.constraints import ACCUMULATOR_LIMIT, stored_range
from cactus_edge.fault_report import FaultModel
from cactus_edge.graph import (
    BoolArray,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Weights,
    window_geometry,
)
from cactus_edge.semantics import Rounding

_ROWS = 256
_FAR = 1 << 40

Values = dict[int, Box]


@dataclass(frozen=True, eq=False)
class Flips:
    """The sites of one output channel: int64 [sites] each, ``column`` -1 for the bias.

    ``before`` and ``after``: the stored integer. ``covered``: bool [sites], where no accumulator
    can reach the limit of all graphs and no second weight of the channel becomes -128.
    """

    column: Int64Array
    before: Int64Array
    after: Int64Array
    bit: Int64Array
    covered: BoolArray


def all_values(graph: Graph, box: Box) -> Values:
    """Bounds of every activation of a resolved graph."""
    values = {graph.core_input: box}
    for op in graph.core:
        values[op.output] = propagate(graph, op, [values[i] for i in op.inputs])
    return values


def width(weights: Weights) -> int:
    """Bits of a stored weight: files hold up to 4 bits in nibbles."""
    return 8 if weights.bits > 4 else 4


def flipped(value: int, bit: int, size: int) -> int:
    """A ``size``-bit two's complement integer with one bit flipped."""
    raw = (value % (1 << size)) ^ (1 << bit)
    return raw - (1 << size) if raw >> (size - 1) else raw


def by_channel(op: Linear) -> Int64Array:
    """Weights int64 [channels, columns]."""
    values = op.weights.values.astype(np.int64)
    rows = values[0].reshape(-1, op.channels).T if isinstance(op, DepthwiseConv2D) else values
    return rows.reshape(op.channels, -1)


def largest_input(graph: Graph, op: Linear) -> int:
    """The greatest magnitude of an input less its zero point."""
    zero_point = graph.tensors[op.inputs[0]].zero_point
    return max(abs(end - zero_point) for end in stored_range(graph, op.inputs[0]))


def offset(graph: Graph, op: Linear, faults: FaultModel) -> int:
    """What a bias gains for each unit that a weight gains (see ``FaultModel.folded``)."""
    return graph.tensors[op.inputs[0]].zero_point if faults.folded else 0


def flips(graph: Graph, op: Linear, faults: FaultModel, channel: int) -> Flips:
    """The sites of a channel, covered or not."""
    size = width(op.weights)
    weights, bias = by_channel(op)[channel], int(op.bias[channel])
    largest, total = largest_input(graph, op), int(np.abs(weights).sum())
    parts: list[tuple[Int64Array, Int64Array, Int64Array, Int64Array, BoolArray]] = []
    for bit in (b for b in faults.bits if b < size):
        table = {w: flipped(w, bit, size) for w in np.unique(weights).tolist()}
        after = np.array([table[w] for w in weights.tolist()], np.int64)
        moved = bias + (after - weights) * offset(graph, op, faults)
        reach = (total - np.abs(weights) + np.abs(after)) * largest + np.abs(moved)
        columns, bits = np.arange(weights.size), np.full(weights.size, bit)
        second = (after == -128) & bool((weights == -128).sum())
        parts.append((columns, weights, after, bits, (reach < ACCUMULATOR_LIMIT) & ~second))
    if faults.bias_bits:
        bits = np.arange(faults.bias_bits)
        after = np.array([flipped(bias, bit, 32) for bit in bits.tolist()], np.int64)
        covered = total * largest + np.abs(after) < ACCUMULATOR_LIMIT
        parts.append((np.full(bits.size, -1), np.full(bits.size, bias), after, bits, covered))
    if not parts:
        empty = np.zeros(0, np.int64)
        return Flips(empty, empty, empty, empty, np.zeros(0, bool))
    return Flips(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def read_map(graph: Graph, op: Linear) -> Int64Array:
    """Int64 [channels or 1, positions, columns]: flat input element, or the input's size for 0."""
    source = graph.tensors[op.inputs[0]]
    if isinstance(op, FullyConnected):
        return np.arange(source.size).reshape(1, 1, -1)
    assert isinstance(op, Conv2D)
    _, height, breadth, depth = source.shape
    kernel = op.weights.values.shape[1:3]
    places: list[Int64Array] = []
    for axis, extent in enumerate((height, breadth)):
        count, before, _ = window_geometry(
            extent, kernel[axis], op.stride[axis], op.dilation[axis], op.padding
        )
        tap = np.arange(kernel[axis]) * op.dilation[axis]
        place = np.arange(count)[:, None] * op.stride[axis] + tap - before
        places.append(np.where((place >= 0) & (place < extent), place, -1))
    row, column = places[0][:, None, :, None], places[1][None, :, None, :]
    pixel = np.where((row < 0) | (column < 0), -1, row * breadth + column)
    pixel = pixel.reshape(-1, kernel[0] * kernel[1])
    if isinstance(op, DepthwiseConv2D):
        channel = np.arange(op.channels) // (op.channels // depth)
        index = pixel[None] * depth + channel[:, None, None]
        return np.where(pixel[None] < 0, source.size, index)
    index = pixel[:, :, None] * depth + np.arange(depth)
    index = np.where(pixel[:, :, None] < 0, source.size, index)
    return index.reshape(1, len(pixel), -1)


class FlippedLayer:
    """One layer of a resolved graph under a fault model."""

    def __init__(self, graph: Graph, index: int, faults: FaultModel) -> None:
        """``index`` is the operator's."""
        op = graph.operators[index]
        assert isinstance(op, Linear) and op.requantization is not None
        self.graph, self.op, self.index, self.faults = graph, op, index, faults
        self.weights, self.map = by_channel(op), read_map(graph, op)
        self.positions = self.map.shape[1]
        affected = {op.output}
        self.behind = [op_ for op_ in graph.core if _depends(op_.inputs, op_.output, affected)]
        self.reaches = graph.logits in affected
        last = last_layer(graph)
        self.source = None if last is None else last.inputs[0]
        self.is_last = last is op
        self.flips = [flips(graph, op, faults, c) for c in range(op.channels)]
        self.offset = offset(graph, op, faults)

    def stored(self, accumulators: Int64Array, channel: int) -> Int64Array:
        """Stored integers of one channel."""
        parameters = self.op.requantization
        assert parameters is not None
        rule = semantics.REQUANTIZE[Rounding(int(parameters.rounding[channel]))]
        multiplier, shift = int(parameters.multiplier[channel]), int(parameters.shift[channel])
        zero_point = self.graph.tensors[self.op.output].zero_point
        rounded = rule(accumulators, multiplier, shift) + zero_point
        return semantics.clamp(rounded, *self.graph.output_range(self.op))  # pyright: ignore

    def faulty(self, values: Values, sample: int, channel: int) -> Box:
        """Accumulator bounds of a channel for each covered flip, int64 [sites, positions]."""
        base_sum, base_spread, total, spread = self._fault_free(values, sample, channel)
        sites = self.flips[channel]
        chosen = np.flatnonzero(sites.covered)
        column, before, after = sites.column[chosen], sites.before[chosen], sites.after[chosen]
        weight = (column >= 0)[:, None]
        read = np.where(weight, total.T[column] + 2 * self.offset, 2)
        step = (after - before)[:, None] * read
        wider = (np.abs(after) - np.abs(before))[:, None] * np.where(weight, spread.T[column], 0)
        twice, radius = base_sum + step, base_spread + wider
        return (twice - radius) >> 1, (twice + radius) >> 1

    def _fault_free(
        self, values: Values, sample: int, channel: int
    ) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
        """Sum and difference of accumulator bounds [positions]; those of the inputs, read."""
        zero_point = self.graph.tensors[self.op.inputs[0]].zero_point
        source = values[self.op.inputs[0]]
        ends = [np.append(end[sample].reshape(-1) - zero_point, 0) for end in source]
        low, high = (end.astype(np.int64) for end in ends)
        index: Int64Array = self.map[channel if len(self.map) > 1 else 0]
        total: Int64Array = (low + high)[index]
        spread: Int64Array = (high - low)[index]
        weights = self.weights[channel]
        base_sum = total @ weights + 2 * int(self.op.bias[channel])
        return base_sum, spread @ np.abs(weights), total, spread

    def hulls(self, values: Values, sample: int) -> Box:
        """Stored bounds of each channel over no flip and every covered one, [channels, positions].

        The fault-free output is part of the hull.
        """
        ends: tuple[list[Int64Array], list[Int64Array]] = [], []
        for channel in range(self.op.channels):
            base_sum, base_spread, _, _ = self._fault_free(values, sample, channel)
            low, high = self.faulty(values, sample, channel)
            least = np.minimum(low.min(axis=0, initial=_FAR), (base_sum - base_spread) >> 1)
            most = np.maximum(high.max(axis=0, initial=-_FAR), (base_sum + base_spread) >> 1)
            ends[0].append(self.stored(least, channel))
            ends[1].append(self.stored(most, channel))
        return np.stack(ends[0]), np.stack(ends[1])

    def outcomes(self, values: Values, sample: int, channels: Int64Array, rows: Box) -> Values:
        """Logits and the last layer's input when each row replaces a channel's output."""
        changed = {
            tensor: (low[sample][None], high[sample][None])
            for tensor, (low, high) in values.items()
        }
        ends: list[Int64Array] = []
        for old, new in zip(values[self.op.output], rows, strict=True):
            end = np.repeat(old[sample][None], len(channels), axis=0)
            flat = end.reshape(len(channels), self.positions, self.op.channels)
            flat[np.arange(len(channels)), :, channels] = new
            ends.append(end)
        changed[self.op.output] = ends[0], ends[1]
        for op in self.behind:
            inputs = [changed[i] for i in op.inputs]
            most = max(len(low) for low, _ in inputs)
            spread = [
                (
                    np.broadcast_to(low, (most, *low.shape[1:])),
                    np.broadcast_to(high, (most, *high.shape[1:])),
                )
                for low, high in inputs
            ]
            changed[op.output] = propagate(self.graph, op, spread)
        return changed

    def proved(
        self, values: Values, sample: int, channels: Int64Array, rows: Box, label: int
    ) -> BoolArray:
        """For each row whether the label wins everywhere."""
        found = np.zeros(len(channels), bool)
        for start in range(0, len(channels), _ROWS):
            part = slice(start, start + _ROWS)
            ends = rows[0][part], rows[1][part]
            changed = self.outcomes(values, sample, channels[part], ends)
            low, high = (e.reshape(len(ends[0]), -1) for e in changed[self.graph.logits])
            gaps = decision.gaps(self.graph, label, low.shape[1])
            lead = low[:, label][:, None] - high - gaps
            lead[:, label] = 0
            good = (lead >= 0).all(axis=1)
            if self.source is not None and not self.is_last:
                hidden = [e.reshape(len(e), -1) for e in changed[self.source]]
                for i in np.flatnonzero(~good).tolist():
                    inner = hidden[0][i % len(hidden[0])], hidden[1][i % len(hidden[1])]
                    good[i] = holds(self.graph, (low[i], high[i]), inner, label)
            found[part] = good
        return found

    def wrong(
        self, points: Values, sample: int, channels: Int64Array, rows: Int64Array, label: int
    ) -> BoolArray:
        """For each row whether the sample itself is surely misclassified."""
        found = np.zeros(len(channels), bool)
        for start in range(0, len(channels), _ROWS):
            part = slice(start, start + _ROWS)
            both = rows[part], rows[part]
            changed = self.outcomes(points, sample, channels[part], both)
            logits = changed[self.graph.logits][0].reshape(len(both[0]), -1)
            labels = np.full(len(logits), label)
            found[part] = decision.surely_wrong(self.graph, logits, labels)
        return found

    def margin(
        self, values: Values, sample: int, channel: int, site: int, row: Box, label: int
    ) -> bool:
        """Whether the last layer's own margins, with the flip in it, prove the win."""
        if not self.is_last or self.source is None:
            return False
        sites = self.flips[channel]
        graph = self.faulty_graph(channel, self.element(channel, site), int(sites.after[site]))
        low, high = (end[sample].reshape(-1).copy() for end in values[self.graph.logits])
        low[channel], high[channel] = int(row[0][0]), int(row[1][0])
        hidden = tuple(end[sample].reshape(-1) for end in values[self.source])
        return holds(graph, (low, high), (hidden[0], hidden[1]), label)

    def element(self, channel: int, site: int) -> tuple[str, int]:
        """Tensor and stored index of a site."""
        column = int(self.flips[channel].column[site])
        if column < 0:
            return "bias", channel
        if isinstance(self.op, DepthwiseConv2D):
            return "weights", column * self.op.channels + channel
        return "weights", channel * self.weights.shape[1] + column

    def faulty_graph(self, channel: int, element: tuple[str, int], value: int) -> Graph:
        """The graph with one stored element, which belongs to ``channel``, replaced."""
        op, graph, index = self.op, self.graph, self.index
        (tensor, place), bias = element, op.bias.astype(np.int64)
        values = op.weights.values.copy()
        if tensor == "bias":
            bias[place] = value
        else:
            bias[channel] += (value - int(values.reshape(-1)[place])) * self.offset
            values.reshape(-1)[place] = value
        weights = Weights(values, width(op.weights), op.weights.scale_bits)
        changed = replace(op, weights=weights, bias=bias)
        operators = (*graph.operators[:index], changed, *graph.operators[index + 1 :])
        return replace(graph, operators=operators)


def _depends(inputs: tuple[int, ...], output: int, affected: set[int]) -> bool:
    """Whether an operator reads what is affected; its output is affected, too, then."""
    reads = not affected.isdisjoint(inputs)
    if reads:
        affected.add(output)
    return reads
