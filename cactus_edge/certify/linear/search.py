"""Branch and bound: a tree of cases in which a goal is proved, or an input that breaks it.

A case restricts stored activations or inputs to ranges; the two children of a case divide the range
of one element, so that together they are the case. A case is closed by intervals, by the rule, by
multipliers that ascent or a linear program found, or by running every input where there are few.
Everything that closes a case was computed in integers; searching may be as inexact as it likes.

The worst case is taken first, so that the bound over all open cases rises steadily (anytime) and
counterexamples are met early.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cactus_edge.certify.boxes import every_point
from cactus_edge.certify.linear import codec
from cactus_edge.certify.linear.ascent import Ascent, FloatArray
from cactus_edge.certify.linear.bounds import (
    WIDE,
    CoefficientOverflowError,
    Interval,
    Restrictions,
    State,
    Target,
    codes_of,
    lower_bound,
    propagate,
)
from cactus_edge.certify.linear.branching import Branching, Division
from cactus_edge.certify.linear.goals import Aim, Goal
from cactus_edge.certify.linear.lp import Program, Relaxation
from cactus_edge.certify.linear.network import Network, Stairs
from cactus_edge.graph import BoolArray, Int64Array
from cactus_edge.proofs import Leaf, Split

Seconds = float  # float: a clock
Evaluate = Callable[[Int64Array], tuple[BoolArray, Int64Array]]
POINTS = 4096
"""Boxes of up to this many inputs are closed by running them all."""
_BATCH = 64  # of them at once
_ROOT_STEPS = 40
_STEPS = 12
_RATE = 0.12  # float: steers the search
_FEW_INPUTS = 12


@dataclass(frozen=True)
class Budget:
    """For one sample: ``seconds`` by the clock, ``cases`` in the tree, ``memory`` in bytes.

    Only ``cases`` and ``memory`` stop at the same place on every machine.
    """

    seconds: float = 60.0  # float: a clock, decides nothing but when to give up
    cases: int = 20_000
    memory: int = 2 << 30


@dataclass(frozen=True)
class Outcome:
    """``nodes`` is the proof, in preorder, or None; ``bound`` the best bound that was proved."""

    nodes: tuple[Split | Leaf, ...] | None
    counterexample: Int64Array | None
    bound: int
    cases: int


@dataclass(eq=False)
class _Case:
    """One node of the tree; ``cuts`` are (tensor, element, lower, upper) in offset values."""

    cuts: tuple[tuple[int, int, int, int], ...]
    slopes: dict[int, FloatArray]
    leaf: Leaf | None = None
    split: Split | None = None
    children: tuple[int, int] | None = None
    value: int = 0
    division: Division | None = None


@dataclass(eq=False)
class Tree:
    """All cases of one goal over one box.

    ``evaluate`` runs inputs (offset values, [points, elements]): whether each decision is surely
    wrong, bool [points], and the stored logits, int64 [points, classes]. Behind SOFTMAX an input
    may be neither surely wrong nor prove the goal: then the goal is ``hopeless``, and there is no
    counterexample either.
    """

    network: Network
    box: Interval
    goal: Goal
    evaluate: Evaluate
    relaxation: Relaxation | None = None
    deadline: float = 0.0  # float: a clock
    cases: list[_Case] = field(default_factory=list)
    programs: dict[int, Program] = field(default_factory=dict)
    heap: list[tuple[int, int]] = field(default_factory=list)
    counterexample: Int64Array | None = None
    hopeless: bool = False
    wanted: int = 0
    held: int = 0

    def __post_init__(self) -> None:
        """Nothing has been divided yet."""
        self.branching = Branching(self.network)

    def run(self, budget: Budget, deadline: Seconds) -> Outcome:
        """Search until the goal is proved or broken, or the budget is spent."""
        self.deadline = deadline
        self.cases.append(_Case((), {}))
        bound = self._treat(0, _ROOT_STEPS)
        while self.heap and self.counterexample is None and not self.hopeless:
            bound = self.heap[0][0]
            spent = time.monotonic() > deadline or len(self.cases) >= budget.cases
            if spent or self.held > budget.memory:
                break
            _, index = heapq.heappop(self.heap)
            self._branch(index)
        proved = not self.heap and self.counterexample is None and not self.hopeless
        nodes = tuple(self._preorder()) if proved else None
        return Outcome(nodes, self.counterexample, bound, len(self.cases))

    def _preorder(self) -> list[Split | Leaf]:
        nodes: list[Split | Leaf] = []
        stack = [0]
        while stack:
            case = self.cases[stack.pop()]
            if case.children is None:
                assert case.leaf is not None, "every case of a proof is closed"
                nodes.append(case.leaf)
            else:
                assert case.split is not None
                nodes.append(case.split)
                stack += [case.children[1], case.children[0]]
        return nodes

    def _restrictions(self, case: _Case) -> Restrictions:
        found: dict[int, Interval] = {}
        for tensor, element, lower, upper in case.cuts:
            if tensor not in found:
                size = self.network.sizes[tensor]
                wide = np.full(size, WIDE, np.int64)
                found[tensor] = (-wide, wide.copy())
            low, high = found[tensor]
            low[element] = max(low[element], lower)
            high[element] = min(high[element], upper)
        return found

    def _treat(self, index: int, steps: int) -> int:
        """Close a case or put it on the heap; its bound."""
        value = self._bounded(index, steps)
        self.cases[index].value = value
        return value

    def _bounded(self, index: int, steps: int) -> int:
        case = self.cases[index]
        state = propagate(self.network, self.box, self._restrictions(case))
        if state is None:
            case.leaf = Leaf("bounds")
            return self.wanted
        plain = self.goal.interval(state)
        if self.goal.settled(state):
            case.leaf = Leaf("bounds")
            return plain
        if self._few_points(state, case):
            return plain
        aim, value, ascent = self.goal.aim(state), plain, None
        if aim is not None:
            self.wanted = aim.needed if aim.kind == 0 else self.wanted
        if aim is not None and index == 0 and self._by_rule(case, state, aim):
            return aim.needed
        if aim is not None:
            ascent = Ascent(self.network, state, aim.target, case.slopes)
            if self.relaxation is None or not self._by_program(case, state, ascent, aim):
                ascent.run(steps, _RATE, aim.needed + 1)
                self._try_point(ascent.point)
                if ascent.best > aim.needed - 1:
                    self._close(case, state, ascent.codes)
            if case.leaf is not None:
                return aim.needed
            value = max(plain, int(ascent.best)) if aim.kind == 0 else plain
        if self.counterexample is not None:
            return value
        self._plan(index, state, ascent)
        heapq.heappush(self.heap, (value, index))
        return value

    def _by_rule(self, case: _Case, state: State, aim: Aim) -> bool:
        """Whether the rule's multipliers suffice."""
        try:
            bound = lower_bound(self.network, state, aim.target)
        except CoefficientOverflowError:
            return False
        if bound.value >= aim.needed:
            self._close(case, state, lambda target: codes_of(self.network, target, bound))
        return case.leaf is not None

    def _by_program(self, case: _Case, state: State, ascent: Ascent, aim: Aim) -> bool:
        """Let the linear program find the multipliers; False where it could not."""
        assert self.relaxation is not None
        if aim.kind not in self.programs:
            root = propagate(self.network, self.box)
            assert root is not None, "a box without restrictions is not empty"
            self.programs[aim.kind] = self.relaxation.program(root, aim.target)
        left = self.deadline - time.monotonic()
        solved = self.programs[aim.kind].solve(state, left)
        if solved is None:
            return False
        prices = solved.prices
        if np.isinf(solved.optimum):
            size = float(np.abs(ascent.seed).max()) + 1.0  # float: steers the search
            for factor in (64.0, 1024.0, 16384.0, 65536.0):  # float: steers the search
                scaled = {index: part * (factor * size) for index, part in prices.items()}
                if prices and ascent.adopt(scaled) > aim.needed - 1:
                    self._close(case, state, ascent.codes)
                if case.leaf is not None:
                    return True
            return False
        ascent.adopt(prices)
        ascent.best = min(ascent.best, solved.optimum)  # the corners that ascent leaves out count
        self._try_point(solved.point)
        if ascent.best > aim.needed - 1:
            self._close(case, state, ascent.codes)
        ascent.look(solved.reached)
        return True

    def _close(
        self, case: _Case, state: State, found: Callable[[Target], dict[int, Int64Array]]
    ) -> None:
        """Close a case where the exact bound of the multipliers that were found suffices."""
        for bits in (26, 18, 10):
            aim = self.goal.aim(state, bits)
            assert aim is not None, "an ascent has an aim"
            codes = found(aim.target)
            try:
                bound = lower_bound(self.network, state, aim.target, codes)
            except CoefficientOverflowError:
                continue
            if bound.value >= aim.needed:
                case.leaf = Leaf("multipliers", codec.pack(self.network, state, codes), bits)
                return

    def _few_points(self, state: State, case: _Case) -> bool:
        """Run every input of a small box; True when that decided the case."""
        low, high = state.values[self.network.graph.core_input]
        extents = high - low + 1
        count = 1
        for extent in extents[extents > 1].tolist():
            count *= extent
            if count > POINTS:
                return False
        points = every_point(low, high)
        for start in range(0, len(points), _BATCH):
            batch = points[start : start + _BATCH]
            for point, wrong, logits in zip(batch, *self.evaluate(batch), strict=True):
                if wrong:
                    self.counterexample = point
                    return True
                if not self.goal.holds(logits):
                    self.hopeless = True
                    return True
        case.leaf = Leaf("points")
        return True

    def _try_point(self, point: FloatArray) -> None:
        rounded = np.rint(point).astype(np.int64)
        if self.evaluate(rounded[None])[0][0]:
            self.counterexample = rounded

    def _plan(self, index: int, state: State, ascent: Ascent | None) -> None:
        """Choose what to divide: the element where the lines are farthest from the staircase."""
        case = self.cases[index]
        chosen = self.goal.divide(state)
        if chosen is None and ascent is not None:
            case.division = self.branching.choose(state, ascent)
            if case.division is not None:
                chosen = case.division.tensor, case.division.element, case.division.level
        entry = self.network.graph.core_input
        low, high = state.values[entry]
        loose = np.flatnonzero(high > low)
        if chosen is None or (ascent is not None and loose.size <= _FEW_INPUTS):
            if loose.size == 0:
                raise AssertionError("a single input is decided by running it")
            element = int(loose[(high - low)[loose].argmax()])
            chosen = entry, element, int(low[element] + high[element]) >> 1
            case.division = None
        tensor, element, level = chosen
        zero_point = self.network.zero_points[tensor]
        case.split = Split(tensor, element, level + zero_point)
        if ascent is not None:
            case.slopes = {}
            for node, part in ascent.corners.items():
                stairs = self.network.nodes[node]
                assert isinstance(stairs, Stairs)
                whole = np.zeros(stairs.bias.size)
                whole[part.index] = ascent.best_slopes[node]
                case.slopes[node] = whole
                self.held += whole.nbytes
                if stairs.output == tensor and not state.ranges[node][5, element]:
                    # In the children the element is cut: a price, no longer a slope.
                    whole[element] *= ascent.weight(node, element)

    def _learn(self, index: int) -> None:
        """Remember what the division of a case gained."""
        case = self.cases[index]
        if case.division is not None and case.children is not None:
            first, second = (self.cases[child].value - case.value for child in case.children)
            self.branching.learn(case.division, (first, second))

    def _branch(self, index: int) -> None:
        case = self.cases[index]
        assert case.split is not None
        tensor, element = case.split.tensor, case.split.element
        level = case.split.level - self.network.zero_points[tensor]
        first = len(self.cases)
        case.children = (first, first + 1)
        for lower, upper in ((-WIDE, level), (level + 1, WIDE)):
            cut = (tensor, element, lower, upper)
            self.cases.append(_Case((*case.cuts, cut), case.slopes))
        self.held -= sum(part.nbytes for part in case.slopes.values())
        for child in case.children:
            if self.counterexample is None and not self.hopeless:
                self._treat(child, _STEPS)
        self._learn(index)
        case.slopes = {}
        for child in case.children:
            if self.cases[child].leaf is not None:
                self.cases[child].slopes = {}
