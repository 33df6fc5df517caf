"""Linear bounds and case distinctions for any atom: an integer combination of logits stays small.

A disjunct of a ``Specification`` never holds where one of its atoms never does. An atom about the
lead of one logit over another is bounded through the last layer's accumulators, where there is one,
so that saturation and ties are seen; every other one on the stored logits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cactus_edge.certify.decide import Decider, Decision, Effort, method_of
from cactus_edge.certify.linear.goals import AtomGoal, Goal, pair_goal
from cactus_edge.certify.linear.network import undescribed
from cactus_edge.certify.linear.search import Budget, Seconds, Tree
from cactus_edge.execute import execute
from cactus_edge.graph import BoolArray, Graph, Int64Array
from cactus_edge.proofs import Leaf, Proof, Split
from cactus_edge.specification import Atom, Disjunct, Specification

_LARGEST_LEAD = 1 << 16
_LARGEST_COEFFICIENT = 1 << 26


@dataclass(frozen=True, eq=False)
class Attempt:
    """``nodes``: a proof, or None. ``point``: stored input at which an atom holds, if one was met.

    Where the disjunct has several atoms, the point need not break the property.
    """

    nodes: tuple[Split | Leaf, ...] | None
    point: Int64Array | None = None


@dataclass(frozen=True, eq=False)
class Prover:
    """Excludes disjuncts on one resolved graph."""

    decider: Decider

    @property
    def graph(self) -> Graph:
        """The resolved graph."""
        return self.decider.graph

    def exclude(
        self,
        box: tuple[Int64Array, Int64Array],
        disjunct: Disjunct,
        effort: Effort,
        until: Seconds,
    ) -> Attempt:
        """Try to show that a disjunct never holds.

        Args:
            box: stored integers in the input's shape: lower and upper ends.
            disjunct: a conjunction of atoms.
            effort: what may be done.
            until: of ``time.monotonic``.

        Raises:
            MissingExtraError: the method is ``complete`` and its solver is not installed.
        """
        point: Int64Array | None = None
        goals = list(self._goals(disjunct))
        for number, goal in enumerate(goals):
            now = time.monotonic()
            share = now + (until - now) / (len(goals) - number)  # float: a clock
            found = self._search(box, goal, effort, share)
            if found.nodes is not None:
                return found
            point = found.point if point is None else point
        return Attempt(None, point)

    def _goals(self, disjunct: Disjunct) -> Iterator[Goal]:
        """One for each atom that can be bounded."""
        classes = self.graph.tensors[self.graph.logits].size
        layer = self.decider.layer
        for atom in disjunct:
            pair = atom.pair()
            if pair is not None and layer is not None and 0 <= pair[2] < _LARGEST_LEAD:
                yield pair_goal(self.decider.network, layer, *pair)
            elif _is_small(atom):
                weights = np.zeros(classes, np.int64)
                for index, coefficient in atom.terms:
                    weights[index] = coefficient
                yield AtomGoal(self.decider.network, weights, atom.bound)

    def _search(
        self,
        box: tuple[Int64Array, Int64Array],
        goal: Goal,
        effort: Effort,
        until: Seconds,
    ) -> Attempt:
        network = self.decider.network
        entry = self.graph.core_input
        zero_point, shape = network.zero_points[entry], self.graph.tensors[entry].shape[1:]

        def evaluate(points: Int64Array) -> tuple[BoolArray, Int64Array]:
            stored = points.reshape(-1, *shape) + zero_point
            logits = execute(self.graph, stored).reshape(len(points), -1)
            return np.array([not goal.holds(row) for row in logits]), logits

        complete = effort.method == "complete"
        ends = box[0].reshape(-1) - zero_point, box[1].reshape(-1) - zero_point
        relaxation = self.decider.relaxation if complete else None
        budget = effort.budget
        if not complete:
            budget = Budget(budget.seconds, 1, budget.memory)
        outcome = Tree(network, ends, goal, evaluate, relaxation).run(budget, until)
        point = outcome.counterexample
        if point is not None:
            point = point.reshape(shape) + zero_point
        return Attempt(outcome.nodes, point)


def exclude_enough(
    decider: Decider,
    number: int,
    box: tuple[Int64Array, Int64Array],
    rule: Specification,
    left: Sequence[int],
    effort: Effort,
    until: Seconds,
) -> Decision:
    """Exclude disjuncts until at most ``rule.allowed`` are left, or meet a point that breaks it.

    Args:
        decider: of a resolved graph.
        number: of its group, for the proofs, which name disjuncts by their index.
        box: stored integers in the input's shape: lower and upper ends.
        rule: what must not happen.
        left: indices of the disjuncts that nothing has excluded yet.
        effort: what may be done.
        until: of ``time.monotonic``.

    Raises:
        MissingExtraError: the method is ``complete`` and its solver is not installed.
    """
    if undescribed(decider.graph) is not None:
        return Decision((), False, effort.method)
    prover = Prover(decider)
    proofs: list[Proof] = []
    missing = len(left) - rule.allowed
    for tried, index in enumerate(left):
        if not 0 < missing <= len(left) - tried:
            break
        now = time.monotonic()
        share = now + (until - now) / (len(left) - tried)  # float: a clock
        found = prover.exclude(box, rule.unsafe[index], effort, share)
        if found.nodes is not None:
            proofs.append(Proof(number, index, found.nodes))
            missing -= 1
        elif found.point is not None:
            logits = execute(decider.graph, found.point[None]).reshape(-1)
            if rule.violated(logits.astype(np.int64)):
                return Decision(tuple(proofs), False, "complete", found.point)
    return Decision(tuple(proofs), missing <= 0, method_of(proofs))


def _is_small(atom: Atom) -> bool:
    """Whether no sum of the search leaves int64."""
    most = max((abs(coefficient) for _, coefficient in atom.terms), default=0)
    return 0 < most <= _LARGEST_COEFFICIENT and abs(atom.bound) < 1 << 62
