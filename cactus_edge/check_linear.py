"""The checker's own linear bounds: proofs that needed more than intervals, re-derived.

A proof is a tree of cases. Splits divide the range of one stored value, so that the children of a
case are the case. In each leaf the activations are bounded again within its cuts, and then either
intervals suffice, or every input of the leaf is run, or a linear bound does: going backwards, a
staircase ``q(z)`` with coefficient A is replaced by ``B z + min over z of A q(z) - B z`` for an
integer B that the leaf gives. Any B is sound, so nothing here trusts whoever
found it; the minimum is exact, over the ends of every step of the deployed staircase.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cactus_edge import check_bounds, check_margin, decision
from cactus_edge.check_bounds import Box
from cactus_edge.check_stairs import Staircase, accumulated, operand, staircase
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
from cactus_edge.proofs import Leaf, Split

POINTS = 4096
_LARGEST_TREE = 200_000
_COEFFICIENT, _PRODUCT, _MULTIPLIER, _CODE = 1 << 34, 1 << 44, 1 << 38, 1 << 27
_FAR = 1 << 50

Cuts = dict[tuple[int, int], tuple[int, int]]
"""(tensor, element) -> least and greatest stored value in a case."""


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


@dataclass(eq=False)
class LinearChecker:
    """Re-derives proofs on one resolved graph."""

    graph: Graph
    tables: dict[tuple[int, int], Int64Array] = field(default_factory=dict)

    def excluded(self, box: Box, label: int, rival: int, nodes: Sequence[Split | Leaf]) -> str:
        """What is wrong with a proof that ``rival`` never wins against ``label``; empty if nothing.

        Args:
            box: stored integers, lower and upper ends, in the input's shape.
            label: index of a logit.
            rival: another one.
            nodes: the tree, in preorder.
        """
        try:
            used = 0
            for leaf, cuts, count in self._leaves(nodes):
                used = count
                self._leaf(box, label, rival, leaf, cuts)
        except Refused as error:
            return str(error)
        return "" if used == len(nodes) else f"{len(nodes) - used} nodes behind the tree's end"

    def _leaves(self, nodes: Sequence[Split | Leaf]) -> Iterator[tuple[Leaf, Cuts, int]]:
        """Each leaf with the cuts on its path, and the number of nodes read so far."""
        if len(nodes) > _LARGEST_TREE:
            raise Refused(f"a tree of {len(nodes)} nodes")
        open_: list[Cuts] = [{}]
        for count, node in enumerate(nodes, 1):
            if not open_:
                return
            cuts = open_.pop()
            if isinstance(node, Leaf):
                yield node, cuts, count
                continue
            tensor = self._splittable(node)
            limits = self.graph.tensors[tensor].dtype.range
            key = tensor, node.element
            low, high = cuts.get(key, limits)
            open_.append({**cuts, key: (max(low, node.level + 1), high)})
            open_.append({**cuts, key: (low, min(high, node.level))})
        if open_:
            raise Refused("the tree leaves out a case")

    def _splittable(self, node: Split) -> int:
        stairs = {
            op.output for op in self.graph.core if isinstance(op, (Linear, Add, AveragePool2D))
        }
        known = node.tensor == self.graph.core_input or node.tensor in stairs
        if not known or not 0 <= node.element < self.graph.tensors[node.tensor].size:
            raise Refused(f"no element {node.element} of tensor {node.tensor} to split")
        return node.tensor

    def _leaf(self, box: Box, label: int, rival: int, leaf: Leaf, cuts: Cuts) -> None:
        case = self.case(box, cuts)
        if case is None:
            return
        if leaf.method == "points":
            self._points(case, label, rival)
            return
        graph = self.graph
        layer = check_bounds.last_layer(graph)
        if layer is None:
            raise Refused("the logits are no linear map of one tensor")
        gap = int(decision.gaps(graph, label, graph.tensors[graph.logits].size)[rival])
        steps = case.steps[layer.output]
        bounds = [(int(steps.least[c]), int(steps.most[c])) for c in (label, rival)]
        own, other = check_margin.units(graph, layer, label, rival)
        weights = layer.weights.values.astype(np.int64).reshape(layer.channels, -1)
        combined = own * weights[label] - other * weights[rival]
        seed = np.zeros(layer.channels, np.int64)
        seed[label], seed[rival] = own, -other
        if leaf.method == "bounds":
            zero_point = graph.tensors[layer.inputs[0]].zero_point
            ends = [end.reshape(-1) - zero_point for end in case.values[layer.inputs[0]]]
            value = int(np.minimum(combined * ends[0], combined * ends[1]).sum())
            value += int((seed * layer.bias.astype(np.int64)).sum())
            reached = False
        else:
            backward = _Backward(self, case, leaf)
            value = backward.bound(layer, seed, int(np.abs(combined).max()))
            reached = bool(steps.cut[rival])
        if check_margin.proved(graph, layer, label, rival, gap, value, *bounds):
            return
        if reached:  # or the case is empty, because the rival does not reach its cut
            seed = np.zeros(layer.channels, np.int64)
            seed[rival] = -1
            value = _Backward(self, case, leaf).bound(
                layer, seed, int(np.abs(weights[rival]).max())
            )
            if value > -bounds[1][0]:
                return
        raise Refused(f"a leaf closed by '{leaf.method}' is not closed")

    def _points(self, case: Case, label: int, rival: int) -> None:
        low, high = (end.reshape(-1) for end in case.values[self.graph.core_input])
        extents = [int(e) for e in (high - low + 1)]
        count = 1
        for extent in extents:
            count *= extent
            if count > POINTS:
                raise Refused(f"a leaf of more than {POINTS} points")
        numbers = np.arange(count, dtype=np.int64)
        points = np.tile(low, (count, 1))
        for element, extent in enumerate(extents):
            points[:, element] += numbers % extent
            numbers //= extent
        shape = self.graph.tensors[self.graph.core_input].shape[1:]
        points = points.reshape(-1, *shape)
        logits = check_bounds.logits_box(self.graph, (points, points))[0][0]
        gap = decision.gaps(self.graph, label, logits.shape[1])[rival]
        if not (logits[:, label] >= logits[:, rival] + gap).all():
            raise Refused("a point of a leaf breaks the claim")

    # ------------------------------------------------------------------ forwards
    def case(self, box: Box, cuts: Cuts) -> Case | None:
        """Bounds within the cuts; None where they leave no input."""
        graph = self.graph
        entry = graph.core_input
        low, high = (end.reshape(graph.tensors[entry].shape[1:]).copy() for end in box)
        if not _cut(entry, low, high, cuts):
            return None
        case = Case({entry: (low, high)})
        for op in graph.core:
            if isinstance(op, (Linear, Add, AveragePool2D)):
                steps = self._steps(op, case, cuts)
                if steps is None:
                    return None
                case.steps[op.output] = steps
                shape = graph.tensors[op.output].shape[1:]
                case.values[op.output] = steps.low.reshape(shape), steps.high.reshape(shape)
            else:
                boxes = [(case.values[i][0][None], case.values[i][1][None]) for i in op.inputs]
                low, high = check_bounds.propagate(graph, op, boxes)
                case.values[op.output] = low[0], high[0]
        return case

    def _steps(self, op: Operator, case: Case, cuts: Cuts) -> Steps | None:
        graph = self.graph
        target = graph.tensors[op.output]
        stairs = staircase(graph, op)
        boxes = [(case.values[i][0][None], case.values[i][1][None]) for i in op.inputs]
        least, most = (end.reshape(-1) for end in accumulated(graph, op, boxes))
        lowest, highest = graph.output_range(op)
        low, high = (stairs.stored(end) for end in (least, most))
        named = np.zeros(target.size, np.int64)
        for (tensor, element), (first, last) in cuts.items():
            if tensor != op.output:
                continue
            named[element] = 1
            first, last = max(first, int(low[element])), min(last, int(high[element]))
            if first > last:
                return None
            table = self._table(op, stairs)[stairs.kinds[element]]
            if first > low[element]:
                least[element] = table[first - lowest]
            if last < high[element]:
                most[element] = table[last + 1 - lowest] - 1
            low[element], high[element] = first, last
        bias = stairs.bias
        return Steps(
            least, most, low, high, bias, named, lowest,
            self._table(op, stairs), stairs.kinds, _factors(stairs),
        )  # fmt: skip

    def _table(self, op: Operator, stairs: Staircase) -> Int64Array:
        """Int64 [kinds, levels]: the least accumulator that reaches each level, by bisection."""
        key = id(op), op.output
        if key not in self.tables:
            lowest, highest = self.graph.output_range(op)
            levels = np.arange(lowest, highest + 1, dtype=np.int64)
            kinds = np.arange(len(stairs.slopes), dtype=np.int64)
            below = np.full((kinds.size, levels.size), -stairs.reach - 1, np.int64)
            above = np.full(below.shape, stairs.reach + 1, np.int64)
            while (above - below > 1).any():
                middle = (above + below) >> 1
                enough = stairs.of_kind(middle, kinds[:, None]) >= levels
                wide = above - below > 1
                above = np.where(wide & enough, middle, above)
                below = np.where(wide & ~enough, middle, below)
            above[above > stairs.reach] = _FAR
            self.tables[key] = above
        return self.tables[key]


def _cut(tensor: int, low: Int64Array, high: Int64Array, cuts: Cuts) -> bool:
    """Apply the cuts of a tensor in place; False where nothing is left."""
    flat_low, flat_high = low.reshape(-1), high.reshape(-1)
    for (where, element), (first, last) in cuts.items():
        if where == tensor:
            flat_low[element] = max(int(flat_low[element]), first)
            flat_high[element] = min(int(flat_high[element]), last)
    return bool((low <= high).all())


def _factors(stairs: Staircase) -> Int64Array:
    rows: list[tuple[int, int]] = []
    for slope in stairs.slopes:
        if slope <= 0:
            rows.append((0, 1))
            continue
        bits = slope.numerator.bit_length() - slope.denominator.bit_length()
        shift = min(max(1, 23 - bits), 60)
        rows.append(((slope.numerator << shift) // slope.denominator, shift))
    return np.array(rows, np.int64)


class _Backward:
    """One linear bound of one leaf."""

    def __init__(self, checker: LinearChecker, case: Case, leaf: Leaf) -> None:
        self.graph, self.case = checker.graph, case
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
        constant = self._through(layer, seed << shift)
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
        constant += int(np.minimum(weights * low, weights * high).sum())
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
        unit = 1 << max(0, self.bits - 20)
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
        return multipliers, int(fixed.sum()) + int(best.sum())

    def _through(self, op: Operator, multipliers: Int64Array) -> int:
        """Add the sum's share to the inputs' coefficients; its constant."""
        shape = self.graph.tensors[op.output].shape[1:]
        if isinstance(op, Add):
            return sum(self._operand(op, side, multipliers.reshape(shape)) for side in (0, 1))
        steps = self.case.steps[op.output]
        into = self._into(op.inputs[0])
        transposed(op, multipliers.reshape(shape), into)
        return int((multipliers * steps.bias).sum())

    def _operand(self, op: Add, side: int, multipliers: Int64Array) -> int:
        """``multiplier * f(x)`` from below by a line with an exact offset, for each element."""
        tensor = op.inputs[side]
        low, high = self.case.values[tensor]
        begin, end = (operand(self.graph, op, side, edge) for edge in (low, high))
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
        return int(best.sum())

    def _moved(self, op: Operator, weights: Int64Array) -> int:
        """PAD, RESHAPE and MAX_POOL_2D."""
        into = self._into(op.inputs[0])
        if isinstance(op, Reshape):
            into += weights.reshape(into.shape)
            return 0
        if isinstance(op, Pad):
            (top, _), (left, _), (before, _) = op.paddings[1:]
            height, width, channels = into.shape
            into += weights[top : top + height, left : left + width, before : before + channels]
            return 0
        assert isinstance(op, MaxPool2D)
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
        out_low, out_high = (end - zero_point for end in self.case.values[op.output])
        fixed = np.minimum(weights * out_low, weights * out_high)
        return int(fixed[~free].sum())


def _small(weights: Int64Array) -> Int64Array:
    """Coefficients for which no sum leaves int64."""
    if int(np.abs(weights).max(initial=0)) >= _COEFFICIENT:
        raise Refused("coefficients that are too large")
    return weights


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
