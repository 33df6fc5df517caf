"""Exact linear bounds: ranges forwards, multipliers backwards, all in integers.

Let a target be an integer combination of accumulators or stored values. Going backwards, every
staircase ``q(z)`` that the target reads with coefficient A is replaced by a line ``B * z + O``,
where B is *any* integer and ``O = min over z in [l, u] of A * q(z) - B * z`` is found exactly from
the corners of the deployed staircase. The result is a lower bound of the target on the whole box,
whatever the multipliers B are; which ones are good may be searched by any means (Lagrangian
relaxation of ``z = W x + b``; DeepPoly's and CROWN's lines are special choices).

The *rule* takes for B, among 0, the staircase's own slope and its chord between the ends, the one
with the least area between line and staircase (DeepPoly, Singh et al. 2019, on exact hulls).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cactus_edge import exact
from cactus_edge.certify.linear.network import Maximum, Move, Network, Stairs
from cactus_edge.graph import Int64Array
from cactus_edge.kernels import relax

CUT_BITS = 16
LARGEST_CODE = 1 << 27
LARGEST_SHARE = 1 << 60
"""What one operator adds to a coefficient stays below; so no sum of coefficients wraps around."""
LARGEST_OPERAND = 1 << 50
"""A multiplier times an operand of ADD; the line's slope times any stored value then fits too."""
WIDE = 1 << 40
"""A restriction that restricts nothing."""
Interval = tuple[Int64Array, Int64Array]
Restrictions = Mapping[int, Interval]
"""By tensor: bounds of its stored values, less the zero point, that a branch imposes."""


class CoefficientOverflowError(ArithmeticError):
    """Coefficients grew beyond what int64 sums are proved for; a smaller scale may help."""


@dataclass(frozen=True, eq=False)
class State:
    """Ranges over one box.

    ``values``: by tensor, bounds of its offset values. ``ranges``: by node index, int64
    [6, elements] of a ``Stairs``: accumulator bounds, level bounds, largest magnitude, and
    whether a restriction names the element.
    """

    values: dict[int, Interval]
    ranges: dict[int, Int64Array]


@dataclass(frozen=True, eq=False)
class Target:
    """``scale`` times the combination whose least value is wanted; ``bits`` says how fine that is.

    ``multipliers`` weigh the accumulators of node ``node``, or the logits' offset values where
    ``node`` is the number of nodes.
    """

    node: int
    multipliers: Int64Array
    scale: int
    bits: int

    @property
    def unit(self) -> int:
        """What a code of a cut range counts in."""
        return 1 << max(0, self.bits - CUT_BITS)


@dataclass(frozen=True, eq=False)
class Line:
    """What was chosen at a ``Stairs``: its output's coefficients, the multipliers, the offsets."""

    coefficients: Int64Array
    multipliers: Int64Array
    offsets: Int64Array


@dataclass(frozen=True, eq=False)
class Bound:
    """``value`` bounds the target (not scaled) from below; ``input`` are its coefficients there."""

    value: int
    input: Int64Array
    lines: dict[int, Line]


def propagate(
    network: Network,
    box: Interval,
    restrictions: Restrictions | None = None,
    known: State | None = None,
    first: int = 0,
) -> State | None:
    """Ranges of every tensor; None where the restrictions leave no input.

    Args:
        network: of a resolved graph.
        box: offset values of the input, flattened.
        restrictions: further bounds, by tensor.
        known: a state of a larger box, of which nodes before ``first`` are taken over.
        first: the first node that has to be propagated again.
    """
    wanted = restrictions or {}
    values = dict(known.values) if known else {}
    ranges = dict(known.ranges) if known else {}
    if not known or first == 0:
        entered = _meet(box, wanted.get(network.graph.core_input))
        if entered is None:
            return None
        values[network.graph.core_input] = entered
    for index in range(first, len(network.nodes)):
        node = network.nodes[index]
        limits = wanted.get(node.output)
        if isinstance(node, Stairs):
            found = _stairs(node, [values[i] for i in node.inputs], limits)
            if found is None:
                return None
            values[node.output], ranges[index] = found
            continue
        low, high = values[node.inputs[0]]
        if isinstance(node, Move):
            result = tuple(np.append(end, 0)[node.sources] for end in (low, high))
        else:
            floor = np.int64(-(1 << 40))
            ends = [np.append(end, floor)[node.sources].max(axis=1) for end in (low, high)]
            result = tuple(np.clip(end, *node.limits) for end in ends)
        met = _meet((result[0], result[1]), limits)
        if met is None:
            return None
        values[node.output] = met
    return State(values, ranges)


def _meet(interval: Interval, other: Interval | None) -> Interval | None:
    if other is None:
        return interval
    low, high = np.maximum(interval[0], other[0]), np.minimum(interval[1], other[1])
    return (low, high) if (low <= high).all() else None


def accumulators(node: Stairs, inputs: list[Interval]) -> Interval:
    """Bounds of the accumulators over boxes of the inputs, int64 [elements] each."""
    least, most = node.bias.copy(), node.bias.copy()
    for taps, table, (low, high) in zip(node.maps, node.tables, inputs, strict=True):
        if taps is not None:
            relax.forward_interval(low, high, *taps.arrays, least, most)
        else:
            assert table is not None
            first, entries = table
            least += entries[low - first]
            most += entries[high - first]
    return least, most


def _stairs(
    node: Stairs, inputs: list[Interval], limits: Interval | None
) -> tuple[Interval, Int64Array] | None:
    least, most = accumulators(node, inputs)
    return ranged(node, least, most, limits)


def ranged(
    node: Stairs, least: Int64Array, most: Int64Array, limits: Interval | None
) -> tuple[Interval, Int64Array] | None:
    """Output interval and ranges of a node from its accumulators' bounds; None where empty."""
    steps = node.staircase
    ranges = np.zeros((6, least.size), np.int64)
    for row, end in ((2, least), (3, most)):
        relax.levels(end, steps.kinds, steps.thresholds, ranges[row])
    if limits is not None:
        first = np.maximum(ranges[2], limits[0] - steps.lowest)
        last = np.minimum(ranges[3], limits[1] - steps.lowest)
        if (first > last).any():
            return None
        padded = np.pad(steps.thresholds, ((0, 0), (1, 1)), constant_values=0)
        raised, cut = first > ranges[2], last < ranges[3]
        least = np.where(raised, padded[steps.kinds, first], least)
        most = np.where(
            cut, padded[steps.kinds, np.minimum(last + 1, padded.shape[1] - 1)] - 1, most
        )
        ranges[2], ranges[3] = first, last
        ranges[5] = (limits[0] > -WIDE) | (limits[1] < WIDE)
    ranges[0], ranges[1] = least, most
    ranges[4] = np.maximum(np.maximum(np.abs(least), np.abs(most)), np.abs(node.bias))
    ranges[4] = np.maximum(ranges[4], 1)
    return (ranges[2] + steps.lowest, ranges[3] + steps.lowest), ranges


def lower_bound(
    network: Network,
    state: State,
    target: Target,
    codes: Mapping[int, Int64Array] | None = None,
) -> Bound:
    """The bound of ``target`` by the rule, or with multipliers ``natural * code / 16384``.

    Args:
        network: of a resolved graph.
        state: ranges over the box.
        target: what is to be bounded.
        codes: by node index, int64 [elements]; nodes that are missing follow the rule.

    Raises:
        CoefficientOverflowError: the target's scale is too large for this network.
    """
    coefficients: dict[int, Int64Array] = {}
    lines: dict[int, Line] = {}
    constant = 0
    if target.node == len(network.nodes):
        coefficients[network.graph.logits] = target.multipliers
    for index in range(min(target.node, len(network.nodes) - 1), -1, -1):
        node = network.nodes[index]
        if index == target.node:
            assert isinstance(node, Stairs)
            # Scaled afterwards: it is the combination that is small, not what is combined.
            seed = target.multipliers // target.scale
            constant += target.scale * _through(network, state, node, seed, coefficients)
            for weights in coefficients.values():
                weights *= target.scale
            continue
        weights = coefficients.pop(node.output, None)
        if weights is None:
            if codes is None or index not in codes:
                continue
            weights = _zeros(network, node.output)
        if int(np.abs(weights).max()) >= relax.LARGEST_COEFFICIENT:
            raise CoefficientOverflowError
        if isinstance(node, Stairs):
            chosen = None if codes is None else codes.get(index)
            line = _line(node, state.ranges[index], weights, chosen, target.unit)
            lines[index] = line
            constant += exact.total(line.offsets)
            constant += _through(network, state, node, line.multipliers, coefficients)
        elif isinstance(node, Move):
            into = coefficients.setdefault(node.inputs[0], _zeros(network, node.inputs[0]))
            inside = node.sources >= 0
            into[node.sources[inside]] += weights[inside]
        else:
            constant += _maximum(network, state, node, weights, coefficients)
    entry = network.graph.core_input
    weights = coefficients.get(entry, _zeros(network, entry))
    if int(np.abs(weights).max()) >= relax.LARGEST_COEFFICIENT:
        raise CoefficientOverflowError
    low, high = state.values[entry]
    constant += exact.total(np.minimum(weights * low, weights * high))
    return Bound(-(-constant // target.scale), weights, lines)


def _zeros(network: Network, tensor: int) -> Int64Array:
    return np.zeros(network.sizes[tensor], np.int64)


def _line(
    node: Stairs,
    ranges: Int64Array,
    coefficients: Int64Array,
    codes: Int64Array | None,
    unit: int,
) -> Line:
    multipliers = np.empty_like(coefficients)
    offsets = np.empty_like(coefficients)
    steps = node.staircase
    shape = (ranges, steps.kinds, steps.thresholds, steps.factors, steps.lowest)
    if codes is None:
        relax.relax_by_rule(coefficients, *shape, multipliers, offsets)
    else:
        relax.relax_by_codes(coefficients, codes, *shape, unit, multipliers, offsets)
    return Line(coefficients, multipliers, offsets)


def _through(
    network: Network,
    state: State,
    node: Stairs,
    multipliers: Int64Array,
    coefficients: dict[int, Int64Array],
) -> int:
    """Add the linear map's share to the inputs' coefficients; its constant."""
    constant = exact.dot(multipliers, node.bias)
    most = exact.largest(multipliers)
    for tensor, taps, table in zip(node.inputs, node.maps, node.tables, strict=True):
        into = coefficients.setdefault(tensor, _zeros(network, tensor))
        if taps is not None:
            if most * taps.fan >= LARGEST_SHARE:
                raise CoefficientOverflowError
            relax.backward(multipliers, *taps.arrays, into)
        else:
            assert table is not None
            first, entries = table
            if most * exact.largest(entries) >= LARGEST_OPERAND:
                raise CoefficientOverflowError
            offsets = np.empty_like(multipliers)
            low, high = state.values[tensor]
            relax.relax_table(multipliers, low, high, entries, first, into, offsets)
            constant += exact.total(offsets)
        if exact.largest(into) >= 2 * LARGEST_SHARE:
            raise CoefficientOverflowError
    return constant


def _maximum(
    network: Network,
    state: State,
    node: Maximum,
    weights: Int64Array,
    coefficients: dict[int, Int64Array],
) -> int:
    """One element of the window where that is sound and tight, a constant elsewhere."""
    tensor = node.inputs[0]
    into = coefficients.setdefault(tensor, _zeros(network, tensor))
    low, high = state.values[tensor]
    floor = np.int64(-(1 << 40))
    lows, highs = (np.append(end, floor)[node.sources] for end in (low, high))
    rows = np.arange(len(lows))
    best = lows.argmax(axis=1)
    chosen = node.sources[rows, best]
    others = highs.copy()
    others[rows, best] = floor
    dominates = lows[rows, best] >= others.max(axis=1)
    least, most = (end.max(axis=1) for end in (lows, highs))
    free = (most <= node.limits[1]) & ((least >= node.limits[0]) | (weights > 0))
    free &= dominates | (weights > 0)
    out_low, out_high = state.values[node.output]
    np.add.at(into, chosen[free], weights[free])
    fixed = np.where(weights > 0, weights * out_low, weights * out_high)
    return exact.total(fixed[~free])


def codes_of(network: Network, target: Target, bound: Bound) -> dict[int, Int64Array]:
    """Codes that give the multipliers of a bound that the rule made, up to their rounding."""
    found: dict[int, Int64Array] = {}
    for index, node in enumerate(network.nodes[: target.node]):
        if not isinstance(node, Stairs):
            continue
        whole = np.zeros(node.bias.size, np.int64)
        if index in bound.lines:
            line = bound.lines[index]
            significand, shift = node.staircase.factors[node.staircase.kinds].T
            half = np.int64(1) << (shift - 1)
            natural = (line.coefficients * significand + half) >> shift
            used = natural != 0
            doubled = 2 * natural[used]
            scaled = line.multipliers[used] << 14
            codes = (2 * scaled + natural[used]) // doubled
            whole[used] = np.clip(codes, -LARGEST_CODE, LARGEST_CODE)
        found[index] = whole
    return found
