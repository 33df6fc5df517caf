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

from cactus_edge import check_bounds, check_margin, decision
from cactus_edge.check_backward import Backward, Case, Refused, Steps
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

POINTS = 4096
_LARGEST_TREE = 200_000
_FAR = 1 << 50

Cuts = dict[tuple[int, int], tuple[int, int]]
"""(tensor, element) -> least and greatest stored value in a case."""


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
            backward = Backward(self.graph, case, leaf)
            value = backward.bound(layer, seed, int(np.abs(combined).max()))
            reached = bool(steps.cut[rival])
        if check_margin.proved(graph, layer, label, rival, gap, value, *bounds):
            return
        if reached:  # or the case is empty, because the rival does not reach its cut
            seed = np.zeros(layer.channels, np.int64)
            seed[rival] = -1
            value = Backward(self.graph, case, leaf).bound(
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
