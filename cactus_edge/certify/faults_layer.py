"""Single faults in one layer of one resolved graph: hulls over flips, split where they fail.

A flip of weight ``w`` into ``v`` changes the accumulators of its output channel alone: each by
``(v - w) x`` for the input ``x`` that it reads, less its zero point. On a box of ``x`` the least
faulty accumulator is the least fault-free one with ``min(w x)`` replaced by ``min(v x)``, exactly.
``min(v x)`` over the box is concave in ``v`` and the greatest value convex, so the extremes over
the bits of a weight are at its least and greatest flipped value; where zero points were folded
already, the ``(v - w) z`` that is added (see ``Sites``) is linear and changes nothing about that.
The hull over all sites of a channel is propagated at once; where the label might lose, the sites
are divided, down to single flips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cactus_edge.certify.faults_sites import Channel, Sites
from cactus_edge.certify.faults_suffix import Box, Suffix, Whole
from cactus_edge.execute import requantize, windows
from cactus_edge.graph import (
    BoolArray,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Int64Array,
    Linear,
    Requantization,
    Stored,
)

_PLANE_BYTES = 1 << 26

Base = dict[int, Stored]


@dataclass(frozen=True, eq=False)
class Reads:
    """What a layer reads, less its zero point, for one sample.

    ``low`` and ``high`` int64 [groups, positions, columns]; a channel reads one group.
    """

    low: Int64Array
    high: Int64Array


@dataclass(frozen=True, eq=False)
class Planes:
    """Distinct faulty outputs of one channel, one row for each set of sites with equal bounds.

    ``low`` and ``high`` int64 [rows, positions], stored integers; ``first`` int64 [rows]: a site of
    the row; ``count`` int64 [rows]: how many sites it stands for; ``row`` int64 [sites]: the row of
    each site. Rows are sorted by their effect.
    """

    channel: int
    sites: Channel
    low: Int64Array
    high: Int64Array
    first: Int64Array
    count: Int64Array
    row: Int64Array

    def of_row(self, row: int) -> Channel:
        """The sites of one row."""
        return self.sites.subset(np.flatnonzero(self.row == row))


class Layer:
    """The layer ``op`` of ``whole.graph`` and its sites; serves any number of samples."""

    def __init__(self, whole: Whole, op: Linear, sites: Sites) -> None:
        """Compile what lies behind the layer."""
        assert op.requantization is not None, "graph is not resolved"
        self.whole, self.op, self.sites = whole, op, sites
        self.suffix = Suffix(whole, op)
        source, target = (whole.graph.tensors[i] for i in (op.inputs[0], op.output))
        self._source, self._target = source, target
        self._limits = whole.graph.output_range(op)
        self.positions = target.size // op.channels
        groups = source.shape[-1] if isinstance(op, DepthwiseConv2D) else 1
        last = whole.layer
        behind = self.suffix.reaches and last is not None
        self.is_last = behind and last is not None and last.source not in self.suffix.affected
        self.group = np.arange(op.channels) // (op.channels // groups) if groups > 1 else None

    def reads(self, base: Base, sample: int) -> Reads:
        """What the layer reads in one sample of ``base``."""
        one = {self.op.inputs[0]: base[self.op.inputs[0]][sample : sample + 1]}
        ends = self.whole.box(one, self.op.inputs[0])
        shape = (1, *self._source.shape[1:])
        low, high = (columns(self.op, end.reshape(shape) - self._source.zero_point) for end in ends)
        return Reads(low, high)

    def read_of(self, part: Int64Array, channel: int) -> Int64Array:
        """Int64 [positions, columns] that a channel reads of a half of ``Reads``."""
        return part[0 if self.group is None else int(self.group[channel])]

    def accumulators(self, reads: Reads) -> Box:
        """Fault-free bounds, int64 [channels, positions]."""
        positive, negative = np.maximum(self.sites.weights, 0), np.minimum(self.sites.weights, 0)
        ends: list[Int64Array] = []
        for same, other in ((reads.low, reads.high), (reads.high, reads.low)):
            if self.group is None:
                total = positive @ same[0].T + negative @ other[0].T
            else:
                total = np.einsum("ck,cpk->cp", positive, same[self.group])
                total += np.einsum("ck,cpk->cp", negative, other[self.group])
            ends.append(total + self.sites.bias[:, None])
        return ends[0], ends[1]

    def hulls(self, reads: Reads) -> Box:
        """Stored bounds over no flip and every covered flip, int64 [channels, positions]."""
        low, high = self.accumulators(reads)
        sites = self.sites
        for channel in range(self.op.channels):
            x, y = (self.read_of(part, channel) for part in (reads.low, reads.high))
            own = sites.weights[channel]
            least, most = _product(own, x, y)
            extremes = [values[channel] for values in (sites.least, sites.greatest)]
            ends = [_product(v, x, y) for v in extremes]
            shift = [(v - own) * sites.offset for v in extremes]
            down = np.minimum(ends[0][0] + shift[0], ends[1][0] + shift[1]) - least
            up = np.maximum(ends[0][1] + shift[0], ends[1][1] + shift[1]) - most
            low[channel] += np.minimum(down.min(axis=1), sites.bias_least[channel])
            high[channel] += np.maximum(up.max(axis=1), sites.bias_greatest[channel])
        return self.stored(low.T).T, self.stored(high.T).T

    def stored(self, accumulators: Int64Array, channel: int | None = None) -> Int64Array:
        """Stored integers of accumulators [..., channels], or [...] of one channel."""
        parameters = self.op.requantization
        assert parameters is not None
        zero_point = self._target.zero_point
        if channel is None:
            return requantize(accumulators, parameters, zero_point, self._limits)
        part = slice(channel, channel + 1)
        one = Requantization(
            parameters.rounding[part], parameters.multiplier[part], parameters.shift[part]
        )
        return requantize(accumulators[..., None], one, zero_point, self._limits)[..., 0]

    def elements(self, channels: Int64Array) -> Int64Array:
        """Flat positions of channels' outputs, int64 [channels, positions]."""
        return np.arange(self.positions) * self.op.channels + channels[:, None]

    def site_accumulators(
        self, channel: int, sites: Channel, reads: Reads, base: Box
    ) -> Iterator[tuple[slice, Box]]:
        """Faulty bounds [sites, positions] of one channel, a slice of the sites at a time."""
        x, y = (self.read_of(part, channel) for part in (reads.low, reads.high))
        step = max(1, _PLANE_BYTES // (64 * self.positions))
        for start in range(0, sites.column.size, step):
            part = slice(start, start + step)
            column = sites.column[part]
            weight = column >= 0
            ends = (np.where(weight, end.T[column].T, 1).T for end in (x, y))
            low, high = ends  # a bias is a weight whose input is 1
            own, new = (v[part][:, None] for v in (sites.value, sites.flipped))
            old_ends, new_ends = _ends(own * low, own * high), _ends(new * low, new * high)
            shift = (new - own) * np.where(weight, self.sites.offset, 0)[:, None]
            yield (
                part,
                (
                    base[0][channel] + new_ends[0] - old_ends[0] + shift,
                    base[1][channel] + new_ends[1] - old_ends[1] + shift,
                ),
            )

    def planes(self, channel: int, sites: Channel, reads: Reads, base: Box) -> Planes:
        """Distinct faulty outputs of a channel, sorted by effect."""
        shape = (sites.column.size, self.positions)
        low, high = np.empty(shape, np.int32), np.empty(shape, np.int32)
        for part, (least, most) in self.site_accumulators(channel, sites, reads, base):
            low[part], high[part] = self.stored(least, channel), self.stored(most, channel)
        both = np.ascontiguousarray(np.concatenate([low, high], axis=1))
        keys = both.view(np.dtype((np.void, both.shape[1] * both.itemsize)))[:, 0]
        _, first, inverse, count = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        effect = both[first].sum(axis=1, dtype=np.int64)
        order = np.argsort(effect, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(order.size)
        first, count = first[order], count[order]
        row = place[inverse.reshape(-1)]
        least, most = (part[first].astype(np.int64) for part in (low, high))
        return Planes(channel, sites, least, most, first, count, row)

    def prove(
        self, base: Base, samples: Int64Array, channels: Int64Array, box: Box, labels: Int64Array
    ) -> tuple[Int64Array, BoolArray]:
        """Lead and verdict of rows in which one channel's output is replaced.

        Args:
            base: fault-free activations of the twin.
            samples: int64 [rows]; ``channels`` likewise.
            channels: which channel each row replaces.
            box: stored bounds of the channel, each [rows, positions].
            labels: int64 [rows].
        """
        if not self.suffix.reaches:
            return np.zeros(len(samples), np.int64), np.ones(len(samples), bool)
        lead, proved = np.empty(len(samples), np.int64), np.empty(len(samples), bool)
        for start in range(0, len(samples), self.suffix.rows):
            part = slice(start, start + self.suffix.rows)
            elements = self.elements(channels[part])
            values = self.suffix.run(base, samples[part], elements, (box[0][part], box[1][part]))
            lead[part], proved[part] = self.whole.prove(values, labels[part])
        return lead, proved

    def logits(
        self, base: Base, samples: Int64Array, channels: Int64Array, plane: Int64Array
    ) -> Int64Array:
        """Logits int64 [rows, classes] where ``base`` are points and a channel is replaced."""
        graph = self.whole.graph
        found = np.empty((len(samples), graph.tensors[graph.logits].size), np.int64)
        for start in range(0, len(samples), self.suffix.rows):
            part = slice(start, start + self.suffix.rows)
            if self.suffix.reaches:
                both = plane[part], plane[part]
                elements = self.elements(channels[part])
                values = self.suffix.run(base, samples[part], elements, both)[graph.logits]
            else:
                values = base[graph.logits][samples[part]]
            found[part] = self.whole.twin.split(graph.logits, values)[0]
        return found


def _ends(a: Int64Array, b: Int64Array) -> Box:
    return np.minimum(a, b), np.maximum(a, b)


def _product(values: Int64Array, low: Int64Array, high: Int64Array) -> Box:
    """Least and greatest ``values * x`` for x between ``low`` and ``high``."""
    return _ends(values * low, values * high)


def columns(op: Linear, x: Int64Array) -> Int64Array:
    """Int64 [groups, positions, columns]: what each output position reads of one sample [1, ...].

    Columns are in the order of ``faults_sites.matrix``; padding reads 0.
    """
    if isinstance(op, FullyConnected):
        return x.reshape(1, 1, -1)
    assert isinstance(op, Conv2D)
    taps = windows(x, op.weights.values.shape[1:3], op.stride, op.dilation, op.padding, fill=0)
    stacked = np.stack([view[0] for _, view in taps], axis=2)
    stacked = stacked.reshape(-1, len(taps), x.shape[-1])
    if isinstance(op, DepthwiseConv2D):
        return np.ascontiguousarray(stacked.transpose(2, 0, 1))
    return stacked.reshape(1, len(stacked), -1)
