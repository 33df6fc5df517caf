"""From changed bounds of one tensor to the verdict: the rest of the twin, many rows at a time.

Only operators that depend on the changed tensor run again. From the first point on at which all of
them depend on a single tensor they run in a ``Session``; before it (inside a residual block) in the
reference executor, with the fault-free bounds of what the block reads besides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge import decision
from cactus_edge.certify import margin
from cactus_edge.certify.margin import LastLayer
from cactus_edge.certify.twin import Twin, twin
from cactus_edge.errors import InvalidGraphError
from cactus_edge.execute import run_operator
from cactus_edge.graph import BoolArray, Graph, Int64Array, Linear, Operator, Stored
from cactus_edge.runtime import Session

_ROW_BYTES = 1 << 25

Box = tuple[Int64Array, Int64Array]


@dataclass(frozen=True, eq=False)
class Whole:
    """The twin of a resolved graph, its last layer, and a session that gives every activation."""

    graph: Graph
    twin: Twin
    layer: LastLayer | None
    session: Session

    @staticmethod
    def of(graph: Graph) -> Whole:
        """Build and compile.

        Raises:
            InvalidGraphError: the graph breaks a constraint.
            UnsupportedModelError: the graph has no twin.
        """
        doubled = twin(graph)
        wanted = [graph.core_input, *(op.output for op in doubled.graph.core)]
        session = Session(doubled.graph, tensors=wanted, whole=True)
        return Whole(graph, doubled, margin.last_layer(graph), session)

    def bounds(self, lower: Int64Array, upper: Int64Array) -> dict[int, Stored]:
        """Activations of the twin on boxes [samples, ...], by tensor."""
        stacked = self.twin.stack(lower, upper)
        return {**self.session.run_tensors(stacked), self.graph.core_input: stacked}

    def box(self, values: dict[int, Stored], tensor: int) -> Box:
        """(lower, upper) int64 [samples, elements] of a tensor of the original graph."""
        return self.twin.split(tensor, values[tensor])

    def prove(self, values: dict[int, Stored], labels: Int64Array) -> tuple[Int64Array, BoolArray]:
        """The label's least lead over any rival, beyond the gap, and whether it surely wins.

        A lead of at least 0 is a proof by stored bounds; margins of the last layer may prove more.
        ``values`` need the logits, and the last layer's input where margins shall be used.
        """
        low, high = self.box(values, self.graph.logits)
        gaps = np.zeros_like(low)
        for label in np.unique(labels).tolist():
            gaps[labels == label] = decision.gaps(self.graph, label, low.shape[1])
        rows = np.arange(len(labels))
        leads = low[rows, labels][:, None] - high - gaps
        leads[rows, labels] = np.iinfo(np.int64).max
        lead = leads.min(axis=1)
        proved = lead >= 0
        if self.layer is not None and self.layer.source in values and not proved.all():
            rest = np.flatnonzero(~proved)
            hidden = tuple(end[rest] for end in self.box(values, self.layer.source))
            _, wins = margin.wins(self.layer, hidden[0], hidden[1], labels[rest], gaps[rest])
            proved[rest] = wins.all(axis=1)
        return lead, proved


class Suffix:
    """The operators behind ``op`` in the twin of a whole graph."""

    def __init__(self, whole: Whole, op: Linear) -> None:
        """Find what depends on ``op`` and compile the part that depends on one tensor."""
        self.whole = whole
        self.start = op.output
        doubled = whole.twin.graph
        affected = {self.start}
        behind: list[Operator] = []
        for other in doubled.core:
            if affected & set(other.inputs):
                behind.append(other)
                affected.add(other.output)
        logits = whole.graph.logits
        self.affected = affected
        self.reaches = logits in affected
        wanted = {logits} & affected
        if whole.layer is not None:
            wanted |= {whole.layer.source} & affected
        self._head, tail, cut = _split(behind)
        self._kept = {i for o in self._head for i in o.inputs} - {o.output for o in self._head}
        self._kept -= {self.start}
        self._wanted = wanted
        self._session: Session | None = None
        if tail and self.reaches:
            inside = {cut, *(o.output for o in tail)}
            graph = Graph(doubled.tensors, tuple(tail), cut, logits)
            try:
                self._session = Session(graph, tensors=sorted(wanted & inside), whole=True)
            except InvalidGraphError:
                # The cut forgets its producer's clamp; a layer may then seem to overflow.
                self._head = behind
        self._cut = cut
        largest = max([doubled.tensors[i].size for i in affected])
        self.rows = max(8, _ROW_BYTES // (8 * largest))

    def run(
        self, base: dict[int, Stored], samples: Int64Array, rows: Int64Array, elements: Box
    ) -> dict[int, Stored]:
        """Twin activations with some elements of the start tensor changed.

        Args:
            base: fault-free activations of the twin.
            samples: int64 [rows], which sample of ``base`` each row continues.
            rows: int64 [rows, elements]: flat positions in the original start tensor.
            elements: their lower and upper ends, each like ``rows``.

        Returns:
            The last layer's input and the logits where they depend on the start tensor, for
            ``Whole.prove``.
        """
        begin = base[self.start][samples].astype(np.int64)
        flat = begin.reshape(len(samples), -1)
        low, high = self.whole.twin.halves[self.start]
        index = np.arange(len(samples))[:, None]
        flat[index, low[rows]], flat[index, high[rows]] = elements
        values: dict[int, Stored] = {i: base[i][samples].astype(np.int64) for i in self._kept}
        values[self.start] = begin
        graph = self.whole.twin.graph
        for op in self._head:
            inputs = [values[i].astype(np.int64) for i in op.inputs]
            values[op.output] = run_operator(graph, op, inputs)
        if self._session is not None:
            values |= self._session.run_tensors(values[self._cut])
        return {tensor: values[tensor] for tensor in self._wanted}


def _split(behind: list[Operator]) -> tuple[list[Operator], list[Operator], int]:
    """Head and tail, where the tail reads one tensor only, and that tensor."""
    for position in range(len(behind)):
        tail = behind[position:]
        inside = {op.output for op in tail}
        outside = {i for op in tail for i in op.inputs} - inside
        if len(outside) == 1:
            return behind[:position], tail, outside.pop()
    return behind, [], -1
