"""The checker's own proof that a label leads its rivals, by stored bounds or the last layer.

For each level that the rival can reach, the least accumulator that reaches it bounds the label's
accumulator from below, and the label's logit there has to lead by the gap. Where a rival has more
levels than are visited, both staircases are put between lines: a pair that breaks the claim would
have ``p_label * a_label - p_rival * a_rival`` below a number that the margin excludes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from cactus_edge import decision, semantics
from cactus_edge.check_bounds import Box, last_layer
from cactus_edge.graph import Graph, Int64Array, Linear, Requantization
from cactus_edge.semantics import Rounding

# Logits of up to this many levels are compared level by level; of wider ones, so many levels.
_NARROW_LEVELS = 256
_FEW = 64
_DOUBLE = (Rounding.DOUBLE_HALF_AWAY, Rounding.DOUBLE_HALF_UP)


def holds(graph: Graph, logits: Box, hidden: Box, label: int) -> bool:
    """Whether ``label`` wins on every input.

    Args:
        graph: resolved.
        logits: bounds of the stored logits of one sample, int64 [classes].
        hidden: bounds of the last linear layer's input, int64 [inputs], see ``logits_box``.
        label: index of a logit.
    """
    return len(excluded(graph, logits, hidden, label)) == logits[0].size - 1


def excluded(graph: Graph, logits: Box, hidden: Box, label: int) -> tuple[int, ...]:
    """The rivals, ascending, that are proved never to win against ``label``; see ``holds``."""
    lower, upper = logits
    gaps = decision.gaps(graph, label, lower.size)
    layer = last_layer(graph)
    found: list[int] = []
    for rival in range(lower.size):
        if rival == label:
            continue
        gap = int(gaps[rival])
        by_bounds = int(lower[label]) >= int(upper[rival]) + gap
        if by_bounds or (layer and _on_box(graph, layer, hidden, label, rival, gap)):
            found.append(rival)
    return tuple(found)


def _on_box(graph: Graph, op: Linear, hidden: Box, label: int, rival: int, gap: int) -> bool:
    """The proof with the exact bounds over a box of the layer's input."""
    zero_point = graph.tensors[op.inputs[0]].zero_point
    ends = np.stack([end - zero_point for end in hidden])
    weights = op.weights.values.astype(np.int64).reshape(op.channels, -1)
    own, other = units(graph, op, label, rival)

    def extremes(row: Int64Array, constant: int) -> tuple[int, int]:
        products = row * ends
        return tuple(int(x.sum()) + constant for x in (products.min(0), products.max(0)))  # pyright: ignore

    bias = [int(op.bias[c]) for c in (label, rival)]
    combined = own * weights[label] - other * weights[rival]
    margin, _ = extremes(combined, own * bias[0] - other * bias[1])
    bounds = extremes(weights[label], bias[0]), extremes(weights[rival], bias[1])
    return proved(graph, op, label, rival, gap, margin, *bounds)


def units(graph: Graph, op: Linear, label: int, rival: int) -> tuple[int, int]:
    """The integers p: two multipliers in units of the layer's greatest, rounded; 1 if all equal."""
    parameters = op.requantization
    assert parameters is not None, "graph is not resolved"
    factors = [_factor(parameters, channel) for channel in range(op.channels)]
    greatest = max(factors)
    if min(factors) == greatest:
        return 1, 1
    lowest, highest = graph.output_range(op)
    bits = (highest - lowest).bit_length() + 4
    scale = Fraction(1 << min(max(bits, 12), 28)) / greatest  # exact: Fractions
    own, other = (max(1, round(factors[channel] * scale)) for channel in (label, rival))
    return own, other


def _factor(parameters: Requantization, channel: int) -> Fraction:
    exponent = int(parameters.shift[channel])
    exponent += 31 if int(parameters.rounding[channel]) in _DOUBLE else 0
    return Fraction(int(parameters.multiplier[channel]), 1 << exponent)


def needed_margin(
    graph: Graph,
    op: Linear,
    label: int,
    rival: int,
    gap: int,
    own_bounds: tuple[int, int],
    rival_bounds: tuple[int, int],
) -> int | None:
    """The least margin within the bounds with which ``proved``.

    None where the label's greatest logit does not lead the rival's greatest one.
    """
    pair = _Pair.of(graph, op, label, rival, gap, own_bounds, rival_bounds)
    own_most = pair.own.stored(np.array(own_bounds[1]))
    if own_most < pair.rival.stored(np.array(rival_bounds[1])) + gap:
        return None
    low, most = pair.margins
    high = most + 1
    while low < high:
        middle = (low + high) >> 1
        if pair.holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def proved(
    graph: Graph,
    op: Linear,
    label: int,
    rival: int,
    gap: int,
    margin: int,
    own_bounds: tuple[int, int],
    rival_bounds: tuple[int, int],
) -> bool:
    """Whether the bounds and the margin prove ``q_label >= q_rival + gap``.

    Args:
        graph: resolved.
        op: the layer that computes the logits.
        label: the logit that has to lead.
        rival: the logit that it has to lead.
        gap: by how many stored steps.
        margin: a lower bound of ``p_label * a_label - p_rival * a_rival``, p being ``units``.
        own_bounds: least and greatest accumulator ``a_label``.
        rival_bounds: least and greatest accumulator ``a_rival``.
    """
    pair = _Pair.of(graph, op, label, rival, gap, own_bounds, rival_bounds)
    least, most = pair.margins
    # Beyond ``most`` there is no pair of accumulators, so no input.
    return margin > most or pair.holds(max(margin, least))


@dataclass(frozen=True)
class _Logit:
    """The staircase of one logit."""

    rounding: Rounding
    multiplier: int
    shift: int
    factor: Fraction
    zero_point: int
    limits: tuple[int, int]

    @staticmethod
    def of(graph: Graph, op: Linear, channel: int) -> _Logit:
        parameters = op.requantization
        assert parameters is not None, "graph is not resolved"
        return _Logit(
            Rounding(int(parameters.rounding[channel])),
            int(parameters.multiplier[channel]),
            int(parameters.shift[channel]),
            _factor(parameters, channel),
            graph.tensors[op.output].zero_point,
            graph.output_range(op),
        )

    def stored(self, accumulators: Int64Array) -> Int64Array:
        rule = semantics.REQUANTIZE[self.rounding]
        rounded = rule(accumulators, self.multiplier, self.shift) + self.zero_point
        return semantics.clamp(rounded, *self.limits)  # pyright: ignore

    def least(self, levels: Int64Array, bounds: tuple[int, int]) -> Int64Array:
        """The least accumulator that reaches each level, which the upper bound reaches."""
        below = np.full(levels.shape, bounds[0] - 1, np.int64)
        reaching = np.full(levels.shape, bounds[1], np.int64)
        while (reaching - below > 1).any():
            middle = (below + reaching) >> 1
            high_enough = self.stored(middle) >= levels
            open_ = reaching - below > 1
            reaching = np.where(open_ & high_enough, middle, reaching)
            below = np.where(open_ & ~high_enough, middle, below)
        return reaching

    def deviation(self, largest: int) -> Fraction:
        """How far the rounded value is from the exact product, for accumulators up to ``largest``.

        Half a step; double rounding adds half a unit of its first result; binary floating point
        adds half a unit in the last place of each rounding before the last.
        """
        half = Fraction(1, 2)
        if self.rounding in _DOUBLE:
            return half + (half * Fraction(1, 1 << self.shift) if self.shift else 0)
        if self.rounding is Rounding.FLOAT32:
            worst = 1 + Fraction(1, 1 << 24)
            worst *= worst if largest > 1 << 24 else 1
            return half + largest * self.factor * (worst - 1)
        if self.rounding is Rounding.FLOAT64:
            return half + largest * self.factor * Fraction(1, 1 << 53)
        return Fraction(0) if self.factor == 1 else half


@dataclass(frozen=True)
class _Pair:
    """A claim: with these bounds and a margin, ``own`` leads ``rival`` by ``gap``."""

    own: _Logit
    rival: _Logit
    parts: tuple[int, int]
    gap: int
    own_bounds: tuple[int, int]
    rival_bounds: tuple[int, int]

    @staticmethod
    def of(
        graph: Graph,
        op: Linear,
        label: int,
        rival: int,
        gap: int,
        own_bounds: tuple[int, int],
        rival_bounds: tuple[int, int],
    ) -> _Pair:
        """Arguments as for ``proved``."""
        logits = _Logit.of(graph, op, label), _Logit.of(graph, op, rival)
        return _Pair(*logits, units(graph, op, label, rival), gap, own_bounds, rival_bounds)

    @property
    def margins(self) -> tuple[int, int]:
        """The least and the greatest margin of accumulators within the bounds."""
        own, other = self.parts
        least = own * self.own_bounds[0] - other * self.rival_bounds[1]
        return least, own * self.own_bounds[1] - other * self.rival_bounds[0]

    @cached_property
    def _ends(self) -> tuple[Int64Array, Int64Array]:
        """The rival's least and greatest accumulator, and what is stored of them."""
        ends = np.array(self.rival_bounds, np.int64)
        return ends, self.rival.stored(ends)

    def holds(self, margin: int) -> bool:
        """Whether the claim holds with a margin within ``margins``."""
        if not self._led(margin, *self._ends):
            return False  # no need to look at every level
        lowest, highest = self._ends[1].tolist()
        if self.own.limits[1] - self.own.limits[0] < _NARROW_LEVELS:
            return self._at(margin, range(lowest, highest + 1))
        own_lowest, own_highest = self.own.stored(np.array(self.own_bounds, np.int64)).tolist()
        # Lower levels are led by the label's least logit, levels from ``lost`` on by none.
        lowest = max(lowest, own_lowest - self.gap + 1)
        lost = own_highest - self.gap + 1
        if lowest > highest:
            return True
        ends = {lowest, highest} | ({lost} if lowest < lost < highest else set[int]())
        if not self._at(margin, sorted(ends)):
            return False
        inner = range(lowest + 1, min(highest, lost))
        if len(inner) <= _FEW:
            return self._at(margin, inner)
        return all(self._between_lines(margin, level) for level in (inner[0], inner[-1]))

    def _at(self, margin: int, reachable: Sequence[int]) -> bool:
        """Whether the label leads wherever the rival reaches one of these levels."""
        levels = np.array(reachable, np.int64)
        return self._led(margin, self.rival.least(levels, self.rival_bounds), levels)

    def _led(self, margin: int, points: Int64Array, levels: Int64Array) -> bool:
        """Whether the label leads ``levels`` where the rival's accumulators are ``points``."""
        own, other = self.parts
        least = -(-(margin + other * points) // own)
        impossible = least > self.own_bounds[1]
        leads = self.own.stored(np.clip(least, *self.own_bounds)) >= levels + self.gap
        return bool((impossible | leads).all())

    def _between_lines(self, margin: int, level: int) -> bool:
        """Whether the margin excludes what breaking the claim at ``level`` would need."""
        own, other = self.parts
        same = (own, self.own) == (other, self.rival)
        if same and self.gap == 0:
            return margin > -own  # a rival at the level means a label at the level
        largest = max(abs(end) for end in self.own_bounds)
        behind = level + self.gap - 1 - self.own.zero_point + self.own.deviation(largest)
        largest = max(abs(end) for end in self.rival_bounds)
        reached = level - self.rival.zero_point - self.rival.deviation(largest)
        broken = own * behind / self.own.factor  # exact: Fractions
        broken -= other * reached / self.rival.factor  # exact: Fractions
        strict = self.own.rounding is Rounding.SINGLE and self.own.factor != 1
        return margin >= broken if strict else margin > broken
