"""The checker's own linear bounds: proofs that needed more than intervals, re-derived.

A proof is a tree of cases. Splits divide the range of one stored value, so that the children of a
case are the case. In each leaf the activations are bounded again within its cuts, and then either
intervals suffice, or every input of the leaf is run, or a linear bound does: going backwards, a
staircase ``q(z)`` with coefficient A is replaced by ``B z + min over z of A q(z) - B z`` for an
integer B that the leaf gives (``check_backward``). Any B is sound, so nothing here trusts whoever
found it; the minimum is exact, over the ends of every step of the deployed staircase.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cactus_edge import check_bounds, check_margin, exact, specification
from cactus_edge.check_backward import Backward, Case, Refused, Steps
from cactus_edge.check_backward import _small as small  # pyright: ignore[reportPrivateUsage]
from cactus_edge.check_bounds import Box
from cactus_edge.check_stairs import Staircase, accumulated, staircase
from cactus_edge.graph import (
    Add,
    AveragePool2D,
    Graph,
    Int64Array,
    Linear,
    Operator,
)
from cactus_edge.proofs import Leaf, Split
from cactus_edge.specification import Atom, Disjunct

POINTS = 4096
_LARGEST_TREE = 200_000
_FAR = 1 << 50
LARGEST_WEIGHT = 1 << 27
"""Of an atom whose linear bound is computed in int64."""

Cuts = dict[tuple[int, int], tuple[int, int]]
"""(tensor, element) -> least and greatest stored value in a case."""
_Goal = tuple[Atom, tuple[int, int, int] | None]
"""An atom to exclude; as (label, rival, gap) where it is done through the last layer."""


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
        rivals = specification.top(self.graph, label).unsafe
        return self.never(box, rivals[rival - (rival > label)], nodes)

    def never(self, box: Box, disjunct: Disjunct, nodes: Sequence[Split | Leaf]) -> str:
        """What is wrong with a proof that a disjunct holds nowhere; empty if nothing.

        The tree has to exclude one of the atoms, and the proof does not say which: each is tried,
        through the last layer where it is about the lead of one logit over another, and then on the
        stored logits.

        Args:
            box: stored integers, lower and upper ends, in the input's shape.
            disjunct: a conjunction of atoms.
            nodes: the tree, in preorder.
        """
        if self.graph.computes_int16:
            return "proofs beyond bounds and margins are not made of int16 activations"
        problems: list[str] = []
        for atom in disjunct:
            pair = atom.pair()
            ways = [None] if pair is None or pair[2] < 0 else [pair, None]
            for way in ways:
                try:
                    self._tree(box, disjunct, (atom, way), nodes)
                    return ""
                except Refused as error:
                    problems.append(str(error))
        return problems[0] if problems else "what has no atoms holds everywhere"

    def _tree(
        self, box: Box, disjunct: Disjunct, goal: _Goal, nodes: Sequence[Split | Leaf]
    ) -> None:
        used = 0
        for leaf, cuts, count in self._leaves(nodes):
            used = count
            case = self.case(box, cuts)
            if case is None:
                continue
            if leaf.method == "points":
                self._points(case, disjunct)
                continue
            atom, pair = goal
            if not (self._sum(case, atom, leaf) if pair is None else self._lead(case, pair, leaf)):
                raise Refused(f"a leaf closed by '{leaf.method}' is not closed")
        if used != len(nodes):
            raise Refused(f"{len(nodes) - used} nodes behind the tree's end")

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
        lowest, highest = self.graph.tensors[node.tensor].dtype.range
        if not lowest <= node.level < highest:
            raise Refused(f"level {node.level} of tensor {node.tensor} divides nothing")
        return node.tensor

    def _sum(self, case: Case, atom: Atom, leaf: Leaf) -> bool:
        """Whether a leaf shows ``sum(c q) < bound`` of an atom, on the stored logits ``q``."""
        logits = self.graph.logits
        if leaf.method == "bounds":
            low, high = (end.reshape(-1).tolist() for end in case.values[logits])
            return atom.most(low, high) < atom.bound
        weights = np.zeros(self.graph.tensors[logits].size, np.int64)
        for index, coefficient in atom.terms:
            if abs(coefficient) >= LARGEST_WEIGHT:
                raise Refused("an atom with coefficients that are too large")
            weights[index] = -coefficient
        value = LogitsBackward(self.graph, case, leaf).combined(weights)
        total = sum(coefficient for _, coefficient in atom.terms)
        return value > self.graph.tensors[logits].zero_point * total - atom.bound

    def _lead(self, case: Case, pair: tuple[int, int, int], leaf: Leaf) -> bool:
        """Whether a leaf shows ``q_label >= q_rival + gap``, through the last layer."""
        label, rival, gap = pair
        graph = self.graph
        layer = check_bounds.last_layer(graph)
        if layer is None:
            raise Refused("the logits are no linear map of one tensor")
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
            value = exact.total(np.minimum(combined * ends[0], combined * ends[1]))
            value += exact.dot(seed, layer.bias.astype(np.int64))
            return check_margin.proved(graph, layer, label, rival, gap, value, *bounds)
        value = Backward(graph, case, leaf).bound(layer, seed, int(np.abs(combined).max()))
        if check_margin.proved(graph, layer, label, rival, gap, value, *bounds):
            return True
        if not steps.cut[rival]:
            return False
        # Or the case is empty, because the rival does not reach its cut.
        seed = np.zeros(layer.channels, np.int64)
        seed[rival] = -1
        largest = int(np.abs(weights[rival]).max())
        return Backward(graph, case, leaf).bound(layer, seed, largest) > -bounds[1][0]

    def _points(self, case: Case, disjunct: Disjunct) -> None:
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
        for values in logits.tolist():
            if all(atom.holds(values) for atom in disjunct):
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
        lowest, _ = graph.output_range(op)
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


class LogitsBackward(Backward):
    """A linear bound of a combination of stored logits."""

    def combined(self, weights: Int64Array) -> int:
        """A lower bound of ``weights`` times the logits less their zero point.

        Args:
            weights: int64 [classes], below ``LARGEST_WEIGHT`` in magnitude.
        """
        graph, entry = self.graph, self.graph.core_input
        largest = int(np.abs(weights).max(initial=0))
        shift = max(0, self.bits - max(largest, 1).bit_length())
        shape = graph.tensors[graph.logits].shape[1:]
        self.coefficients = {graph.logits: (weights << shift).reshape(shape)}
        constant, start = 0, self.codes.size
        for op in reversed(graph.core):
            given = self.coefficients.pop(op.output, None)
            if op.output in self.case.steps:
                steps = self.case.steps[op.output]
                end, start = start, start - int(((steps.low < steps.high) | (steps.cut != 0)).sum())
                if start < 0:
                    raise Refused(f"{self.codes.size} multipliers, fewer than are needed")
                if given is None:
                    given = np.zeros(graph.tensors[op.output].shape[1:], np.int64)
                row = small(given).reshape(-1)
                multipliers, offset = self._line(op, row, self.codes[start:end])
                constant += offset + self._through(op, multipliers)
            elif given is not None:
                constant += self._moved(op, small(given))
        if start:
            raise Refused(f"{self.codes.size} multipliers, {start} more than are needed")
        low, high = (end - graph.tensors[entry].zero_point for end in self.case.values[entry])
        weights = small(self._into(entry))
        constant += exact.total(np.minimum(weights * low, weights * high))
        return -(-constant // (1 << shift))


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
