"""What intervals leave open: linear bounds, and a complete search within a budget.

``linear`` tries one linear bound for each rival that is still in the race: multipliers by the rule,
then by ascent. ``complete`` divides into cases, with a linear program in each, until every rival is
excluded, an input is found that breaks the claim, or the budget is spent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from cactus_edge import decision
from cactus_edge.certificate import Method
from cactus_edge.certify import margin
from cactus_edge.certify.linear import finder, lp
from cactus_edge.certify.linear.goals import Goal, PairGoal, pair_goal
from cactus_edge.certify.linear.lp import Relaxation
from cactus_edge.certify.linear.network import Network, network, undescribed
from cactus_edge.certify.linear.search import Budget, Evaluate, Outcome, Seconds, Tree
from cactus_edge.execute import execute
from cactus_edge.graph import BoolArray, Graph, Int64Array
from cactus_edge.proofs import Leaf, Proof

_SHARE = 0.75  # float: of the time that is left, for branch and bound; the rest is for CP-SAT


@dataclass(frozen=True)
class Effort:
    """The strongest method that may be used, and the budget of ``complete`` for one sample."""

    method: Method = "interval"
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        """Say at once what is missing.

        Raises:
            MissingExtraError: a solver that ``complete`` needs is not installed.
        """
        if self.method == "complete":
            lp.highs()
            finder.solver_module()


@dataclass(frozen=True)
class Decision:
    """``proofs`` of the rivals that were excluded; ``complete`` when that was all of them.

    ``method`` is the weakest that suffices. ``counterexample``: a stored input, in the input's
    shape. ``bound``: where the decision stays open, the best bound of the worst case.
    """

    proofs: tuple[Proof, ...]
    closed: bool
    method: Method
    counterexample: Int64Array | None = None
    bound: int | None = None


@dataclass(eq=False)
class Decider:
    """Linear bounds and search on one resolved graph; built when it is first needed."""

    graph: Graph

    @cached_property
    def network(self) -> Network:
        """The graph's linear maps and staircases."""
        return network(self.graph)

    @cached_property
    def layer(self) -> margin.LastLayer | None:
        """The last layer; None where there is no margin to bound."""
        return margin.last_layer(self.graph)

    @cached_property
    def relaxation(self) -> Relaxation | None:
        """The linear program's builder, where the network fits.

        Raises:
            MissingExtraError: the solver is not installed.
        """
        lp.highs()
        found = Relaxation(self.network)
        return found if found.fits else None

    def decide(
        self,
        group: int,
        box: tuple[Int64Array, Int64Array],
        label: int,
        rivals: Sequence[int],
        effort: Effort,
        deadline: Seconds | None = None,
    ) -> Decision:
        """Try to exclude ``rivals`` for one sample.

        Args:
            group: number of the graph's group, for the proofs.
            box: stored integers in the input's shape: lower and upper ends.
            label: index of a logit.
            rivals: the logits that nothing has excluded yet.
            effort: what may be done.
            deadline: of ``time.monotonic``; from the budget if None.

        Raises:
            MissingExtraError: the method is ``complete`` and its solver is not installed.
        """
        if self.layer is None or undescribed(self.graph) is not None:
            return Decision((), False, effort.method)
        until = time.monotonic() + effort.budget.seconds if deadline is None else deadline
        gaps = decision.gaps(self.graph, label, len(self.layer.bias))
        proofs: list[Proof] = []
        for rival in rivals:
            goal = pair_goal(self.network, self.layer, label, rival, int(gaps[rival]))
            now = time.monotonic()
            share = until if effort.method != "complete" else now + _SHARE * (until - now)
            outcome = self.search(box, goal, label, effort, share)
            if outcome.counterexample is not None:
                [point] = self._stored(outcome.counterexample)
                return Decision(tuple(proofs), False, "complete", point)
            if outcome.nodes is None and effort.method == "complete":
                point = self._find(box, goal, label, until)
                if point is not None:
                    return Decision(tuple(proofs), False, "complete", point)
            if outcome.nodes is None:
                return Decision(tuple(proofs), False, effort.method, None, outcome.bound)
            proofs.append(Proof(group, rival, outcome.nodes))
        return Decision(tuple(proofs), True, method_of(proofs))

    def search(
        self,
        box: tuple[Int64Array, Int64Array],
        goal: Goal,
        label: int,
        effort: Effort,
        until: Seconds,
    ) -> Outcome:
        """Prove or break one goal over one box."""
        zero_point = self.network.zero_points[self.graph.core_input]
        ends = box[0].reshape(-1) - zero_point, box[1].reshape(-1) - zero_point
        complete = effort.method == "complete"
        relaxation = self.relaxation if complete else None
        tree = Tree(self.network, ends, goal, self._evaluated(label), relaxation)
        budget = effort.budget
        if not complete:
            budget = Budget(budget.seconds, 1, budget.memory)
        return tree.run(budget, until)

    def _find(
        self, box: tuple[Int64Array, Int64Array], goal: PairGoal, label: int, until: Seconds
    ) -> Int64Array | None:
        """An input that CP-SAT found and the reference executor misclassifies."""
        relaxation = self.relaxation
        if relaxation is None or (relaxation.weights or 0) > finder.LARGEST:
            return None
        zero_point = self.network.zero_points[self.graph.core_input]
        ends = box[0].reshape(-1) - zero_point, box[1].reshape(-1) - zero_point
        left = until - time.monotonic()
        _, point = finder.find(self.network, relaxation, ends, goal, left)
        if point is None or not self._evaluated(label)(point[None])[0][0]:
            return None
        return self._stored(point)[0]

    def _stored(self, points: Int64Array) -> Int64Array:
        shape = self.graph.tensors[self.graph.core_input].shape[1:]
        return points.reshape(-1, *shape) + self.network.zero_points[self.graph.core_input]

    def _evaluated(self, label: int) -> Evaluate:
        def evaluate(points: Int64Array) -> tuple[BoolArray, Int64Array]:
            logits = execute(self.graph, self._stored(points)).reshape(len(points), -1)
            labels = np.full(len(points), label)
            return decision.surely_wrong(self.graph, logits, labels), logits

        return evaluate


def method_of(proofs: Sequence[Proof]) -> Method:
    """``linear`` where every proof is a single bound, ``complete`` where cases were divided."""
    single = all(
        len(proof.nodes) == 1
        and isinstance(proof.nodes[0], Leaf)
        and proof.nodes[0].method != "points"
        for proof in proofs
    )
    return "linear" if single else "complete"
