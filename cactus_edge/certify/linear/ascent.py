"""Search for multipliers: gradient ascent on the slopes of the lines (alpha-CROWN style).

Everything here is floating point and decides nothing. The slopes that are found are rounded to
16384ths of each staircase's own slope, and ``bounds.lower_bound`` computes the exact bound that
they give. Slope 0 everywhere is the interval bound, so the search never has to end below it.

Xu et al., "Fast and complete: enabling complete neural network verification with rapid and
massively parallel incomplete verifiers", ICLR 2021, optimise the lower slopes of ReLU; here both
lines of every staircase are free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cactus_edge.certify.linear.bounds import State, Target
from cactus_edge.certify.linear.network import Maximum, Move, Network, Stairs
from cactus_edge.graph import Int64Array
from cactus_edge.kernels import relax

FloatArray = npt.NDArray[np.float64]
UNIT = 1 << 14
_LARGEST_CODE = 1 << 27
_LARGEST_SLOPE = 128
_MANY_STEPS = 8


@dataclass(frozen=True, eq=False)
class Corners:
    """Four corners of each staircase that is not constant, or was cut: [4, unstable].

    ``upper`` bend the staircase's upper hull, ``lower`` its lower one; ``slope`` is the natural
    slope and ``largest`` the greatest slope that is useful, in units of it. Where a branch ``cut``
    the range, the variable is not a slope but the multiplier itself, in units of ``slope``.
    """

    index: Int64Array
    upper: FloatArray
    upper_stored: FloatArray
    lower: FloatArray
    lower_stored: FloatArray
    slope: FloatArray
    largest: FloatArray
    constant: FloatArray
    cut: npt.NDArray[np.bool_]


def corners(node: Stairs, ranges: Int64Array) -> Corners:
    """The corners of a node over its ranges."""
    steps = node.staircase
    least, most, first, last, _, cut = ranges
    index = np.flatnonzero((first < last) | (cut != 0))
    kinds = steps.kinds[index]
    low, high, start, end = (part[index] for part in (least, most, first, last))
    several = start < end
    count = steps.thresholds.shape[1]
    after = np.where(several, steps.thresholds[kinds, np.minimum(start, count - 1)], high + 1)
    final = np.where(several, steps.thresholds[kinds, np.maximum(end - 1, 0)], low)
    significand, shift = steps.factors[kinds].T
    slope = np.maximum(significand, 1) / np.exp2(shift)
    chord = (end - start) / np.maximum(np.minimum(high - after + 1, final - low), 1)
    largest = np.clip(chord / slope, 1, _LARGEST_SLOPE)
    base = steps.lowest
    return Corners(
        index,
        np.stack([low, np.minimum(after, high), final, high]).astype(np.float64),
        np.stack([start, start + several, end, end]).astype(np.float64) + base,
        np.stack([low, after - 1, np.maximum(final - 1, low), high]).astype(np.float64),
        np.stack([start, start, end - several, end]).astype(np.float64) + base,
        slope,
        largest,
        (first + base).astype(np.float64),
        cut[index] != 0,
    )


@dataclass(eq=False)
class _Step:
    """What one backward pass leaves at a node for the forward pass."""

    coefficients: FloatArray
    accumulator: FloatArray
    stored: FloatArray
    prices: FloatArray


class Ascent:
    """Slopes for one target over one state; ``codes`` can be read after any number of steps."""

    def __init__(
        self,
        network: Network,
        state: State,
        target: Target,
        start: dict[int, FloatArray] | None = None,
    ) -> None:
        """``start``: by node index, slopes [elements] in natural units (zeros without)."""
        self.network, self.state, self.target = network, state, target
        self.seed = target.multipliers.astype(np.float64) / target.scale
        self.corners = {
            index: corners(node, state.ranges[index])
            for index, node in enumerate(network.nodes[: target.node])
            if isinstance(node, Stairs)
        }
        self.slopes: dict[int, FloatArray] = {}
        for index, found in self.corners.items():
            given = start[index][found.index] if start and index in start else None
            slopes = np.zeros(found.index.size) if given is None else given.astype(np.float64)
            limited = np.clip(slopes, 0, found.largest)
            self.slopes[index] = np.where(found.cut, slopes, limited)
        self.best = -np.inf
        self.best_slopes = {index: s.copy() for index, s in self.slopes.items()}
        self._moments: dict[int, tuple[FloatArray, FloatArray]] = {}
        self.point: FloatArray = np.zeros(0)
        self.gaps: dict[int, FloatArray] = {}
        self.reached: dict[int, FloatArray] = {}
        self.weights: dict[int, FloatArray] = {}
        self._adopted: dict[int, FloatArray] | None = None

    def run(self, steps: int, rate: float, enough: float = np.inf) -> float:
        """Take up to ``steps`` steps; stops where ``enough`` is reached. The best bound so far."""
        for step in range(steps):
            value, passes = self._backward()
            if value > self.best:
                self.best = value
                self.best_slopes = {index: s.copy() for index, s in self.slopes.items()}
            if self.best >= enough:
                break
            self._forward(passes, step + 1, rate * 0.96**step)
        return self.best

    def adopt(self, prices: dict[int, FloatArray]) -> float:
        """Take over multipliers [elements] that were found elsewhere; the bound they give."""
        self._adopted = prices
        value, _ = self._backward()
        self._adopted = None
        self.best = value
        self.best_slopes = {index: s.copy() for index, s in self.slopes.items()}
        return value

    def look(self, reached: dict[int, tuple[FloatArray, FloatArray]]) -> None:
        """Where a relaxation's solution (accumulators, stored values) leaves the staircases."""
        for index, (accumulator, stored) in reached.items():
            found, node = self.corners[index], self.network.nodes[index]
            assert isinstance(node, Stairs)
            steps = node.staircase
            exact = np.empty(accumulator.size, np.int64)
            rounded = np.rint(accumulator).astype(np.int64)
            relax.levels(rounded, steps.kinds[found.index], steps.thresholds, exact)
            value = exact + float(steps.lowest)
            # A division between the two excludes the solution from both children.
            self.reached[index] = np.where(stored >= value, value, value - 1)
            # Over many steps the rounding of each is no looseness that a division would cure.
            first, last = self.state.ranges[index][2:4, found.index]
            tolerance = np.where(last - first > _MANY_STEPS, 0.5, 0.0)
            away = np.abs(value - stored) - tolerance
            weights: FloatArray = self.weights.get(index, np.zeros(found.index.size))
            self.gaps[index] = np.asarray(np.abs(weights) * np.maximum(away, 0.0), np.float64)

    def codes(self, target: Target) -> dict[int, Int64Array]:
        """The best slopes as ``lower_bound`` takes them for a target of this scale."""
        unit = target.unit / target.scale
        found: dict[int, Int64Array] = {}
        for index, part in self.corners.items():
            node = self.network.nodes[index]
            assert isinstance(node, Stairs)
            whole = np.zeros(node.bias.size, np.int64)
            units = np.where(part.cut, self.best_slopes[index] / unit, 0.0)
            units += np.where(part.cut, 0.0, self.best_slopes[index] * UNIT)
            rounded = np.clip(np.rint(units), -_LARGEST_CODE, _LARGEST_CODE)
            whole[part.index] = rounded.astype(np.int64)
            found[index] = whole
        return found

    def weight(self, index: int, element: int) -> float:
        """The target's coefficient of one element, as of the last step."""
        if index not in self.weights:
            return 0.0
        return float(self.weights[index][np.searchsorted(self.corners[index].index, element)])

    def _backward(self) -> tuple[float, dict[int, _Step]]:
        network = self.network
        coefficients: dict[int, FloatArray] = {}
        passes: dict[int, _Step] = {}
        constant = 0.0
        if self.target.node == len(network.nodes):
            coefficients[network.graph.logits] = self.seed
        else:
            constant = self._spread(self.target.node, self.seed, coefficients)
        for index in range(self.target.node - 1, -1, -1):
            node = network.nodes[index]
            weights = coefficients.pop(node.output, None)
            if weights is None:
                continue
            if isinstance(node, Stairs):
                multipliers, added, step = self._lines(index, weights)
                passes[index] = step
                constant += added + self._spread(index, multipliers, coefficients)
            elif isinstance(node, Move):
                into = coefficients.setdefault(node.inputs[0], self._zeros(node.inputs[0]))
                inside = node.sources >= 0
                into[node.sources[inside]] += weights[inside]
            else:
                constant += self._maximum(node, weights, coefficients)
        entry = network.graph.core_input
        weights = coefficients.get(entry, self._zeros(entry))
        low, high = self.state.values[entry]
        self.point = np.where(weights > 0, low, high).astype(np.float64)
        return constant + float((weights * self.point).sum()), passes

    def _zeros(self, tensor: int) -> FloatArray:
        return np.zeros(self.network.sizes[tensor])

    def _lines(self, index: int, weights: FloatArray) -> tuple[FloatArray, float, _Step]:
        found = self.corners[index]
        chosen = weights[found.index]
        if self._adopted is not None and index in self._adopted:
            given = self._adopted[index][found.index] / found.slope
            used = np.where(chosen == 0, 1.0, chosen)
            slopes = np.where(found.cut, given, np.where(chosen == 0, 0.0, given / used))
            limit = float(_LARGEST_SLOPE)
            self.slopes[index] = np.where(found.cut, given, np.clip(slopes, -limit, limit))
        slope = self.slopes[index] * found.slope
        below = chosen > 0
        places = np.where(below, found.lower, found.upper)
        levels = np.where(below, found.lower_stored, found.upper_stored)
        prices = np.where(found.cut, slope, chosen * slope)
        values = chosen * levels - prices * places
        least = values.argmin(axis=0)
        rows = np.arange(chosen.size)
        self.weights[index] = chosen
        step = _Step(chosen, places[least, rows], levels[least, rows], prices)
        multipliers = np.zeros(weights.size)
        multipliers[found.index] = prices
        fixed = weights * found.constant
        fixed[found.index] = 0
        return multipliers, float(values[least, rows].sum() + fixed.sum()), step

    def _spread(
        self, index: int, multipliers: FloatArray, coefficients: dict[int, FloatArray]
    ) -> float:
        node = self.network.nodes[index]
        assert isinstance(node, Stairs)
        constant = float((multipliers * node.bias).sum())
        for tensor, taps, table in zip(node.inputs, node.maps, node.tables, strict=True):
            into = coefficients.setdefault(tensor, self._zeros(tensor))
            if taps is not None:
                relax.backward(multipliers, *taps.arrays, into)
            else:
                gain, base = self._table_line(tensor, table)
                into += multipliers * gain
                constant += float((multipliers * base).sum())
        return constant

    def _table_line(
        self, tensor: int, table: tuple[int, Int64Array] | None
    ) -> tuple[FloatArray, FloatArray]:
        assert table is not None
        first, entries = table
        low, high = self.state.values[tensor]
        begin, end = entries[low - first], entries[high - first]
        gain = (end - begin) / np.maximum(high - low, 1)
        return gain, begin - gain * low

    def _maximum(
        self, node: Maximum, weights: FloatArray, coefficients: dict[int, FloatArray]
    ) -> float:
        chosen, free = _pick(self.state, node, weights)
        into = coefficients.setdefault(node.inputs[0], self._zeros(node.inputs[0]))
        np.add.at(into, chosen[free], weights[free])
        low, high = self.state.values[node.output]
        fixed = np.where(weights > 0, weights * low, weights * high)
        return float(fixed[~free].sum())

    def _forward(self, passes: dict[int, _Step], count: int, rate: float) -> None:
        """Gradients by following the lines forwards from the minimising input; one Adam step."""
        network = self.network
        values: dict[int, FloatArray] = {network.graph.core_input: self.point}
        for index in range(self.target.node):
            node = network.nodes[index]
            if any(tensor not in values for tensor in node.inputs):
                continue
            if isinstance(node, Move):
                values[node.output] = np.append(values[node.inputs[0]], 0)[node.sources]
            elif isinstance(node, Maximum):
                sample = np.append(values[node.inputs[0]], -np.inf)[node.sources]
                values[node.output] = np.clip(sample.max(axis=1), *self.state.values[node.output])
            else:
                accumulator = self._accumulate(node, values)
                output = self.corners[index].constant.copy()
                if index in passes:
                    output[self.corners[index].index] = self._update(
                        index, passes[index], accumulator, count, rate
                    )
                values[node.output] = output

    def _accumulate(self, node: Stairs, values: dict[int, FloatArray]) -> FloatArray:
        accumulator = node.bias.astype(np.float64)
        for tensor, taps, table in zip(node.inputs, node.maps, node.tables, strict=True):
            if taps is not None:
                relax.forward(values[tensor], *taps.arrays, accumulator)
            else:
                gain, base = self._table_line(tensor, table)
                accumulator += gain * values[tensor] + base
        return accumulator

    def _update(
        self, index: int, step: _Step, accumulator: FloatArray, count: int, rate: float
    ) -> FloatArray:
        found = self.corners[index]
        away = accumulator[found.index] - step.accumulator
        slope = np.where(found.cut, 0.0, self.slopes[index] * found.slope)
        gradient = np.where(found.cut, 1.0, step.coefficients) * found.slope * away
        first, second = self._moments.get(index, (np.zeros_like(gradient),) * 2)
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        self._moments[index] = (first, second)
        change = first / (1 - 0.9**count) / (np.sqrt(second / (1 - 0.99**count)) + 1e-12)
        line = step.stored + slope * away
        self.reached[index] = _between(found, accumulator[found.index])
        self.gaps[index] = step.coefficients * (self.reached[index] - line)
        sizes = np.abs(step.coefficients)
        scale = np.maximum(sizes, sizes.sum() / max(sizes.size, 1))
        moved = self.slopes[index] + rate * change * np.where(found.cut, scale, 1.0)
        self.slopes[index] = np.where(found.cut, moved, np.clip(moved, 0, found.largest))
        return line


def _between(found: Corners, accumulator: FloatArray) -> FloatArray:
    """Stored values of accumulators, the staircase smoothed between its corners."""
    x = (found.upper + found.lower) / 2
    y = (found.upper_stored + found.lower_stored) / 2
    inside = np.clip(accumulator, x[0], x[3])
    value = y[0].copy()
    for k in range(3):
        rise = (y[k + 1] - y[k]) / np.maximum(x[k + 1] - x[k], 1e-9)
        value += rise * (np.clip(inside, x[k], x[k + 1]) - x[k])
    return value


def _pick(
    state: State, node: Maximum, weights: FloatArray
) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """The element that stands for each maximum, and where it may (as in ``bounds``)."""
    floor = np.int64(-(1 << 40))
    low, high = state.values[node.inputs[0]]
    lows, highs = (np.append(end, floor)[node.sources] for end in (low, high))
    rows = np.arange(len(lows))
    best = lows.argmax(axis=1)
    others = highs.copy()
    others[rows, best] = floor
    dominates = lows[rows, best] >= others.max(axis=1)
    least, most = (end.max(axis=1) for end in (lows, highs))
    free = (most <= node.limits[1]) & ((least >= node.limits[0]) | (weights > 0))
    return node.sources[rows, best], free & (dominates | (weights > 0))
