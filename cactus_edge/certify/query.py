"""Any integer property on any boxes: bounds, margins, enumeration, a prover, a search.

The cascade for a box and a ``Specification``, under each group of profiles:

1. intervals: a disjunct is excluded when bounds of the logits leave no room for one of its atoms;
2. elided margins: an atom about two logits is compared through the last layer (``margin``);
3. every point, where the box holds at most ``POINTS``;
4. linear bounds (``prover``), or ``prove`` where one is given, for the disjuncts that are left;
5. a search for a counterexample, which counts only after the reference executor reproduced it;
6. case distinctions, within a budget.

An ``Effort`` says how far it may go; without one, 4 is ``prove`` alone and 6 is left out.

A property is certified on a box when enough disjuncts are excluded under every group, or when every
point of it satisfies the property.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np

from cactus_edge.certify import margin
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.boxes import every_point
from cactus_edge.certify.decide import Decider, Effort, method_of
from cactus_edge.certify.engine import Coverage, Group, cover
from cactus_edge.certify.intervals import IntervalSession
from cactus_edge.certify.prover import exclude_enough
from cactus_edge.certify.query_search import Searcher
from cactus_edge.decision import NEVER
from cactus_edge.errors import DataError
from cactus_edge.execute import check_input, execute
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.proofs import Leaf, Proof
from cactus_edge.runtime import Session
from cactus_edge.specification import Specification

POINTS = 4096
"""Boxes of up to this many stored inputs are run, point by point."""
_BATCH = 256

Box = tuple[Int64Array, Int64Array]
Prove = Callable[[Graph, Int64Array, Int64Array, Specification], tuple[set[int], tuple[Proof, ...]]]
"""``prove(resolved graph, lower, upper, specification)``, ends int64 [1, *input shape]: the indices
of ``unsafe`` that are excluded on the box, and a proof for each (``group`` is filled in here)."""
Progress = Callable[[int, int], None]
Verdict = Literal["certified", "refuted", "unknown"]


@dataclass(frozen=True, eq=False)
class Answer:
    """What is known about one box, or about many together.

    ``method``: interval, elided-margin, linear or complete for ``certified``; points, attack or
    complete for ``refuted``; the strongest one tried for ``unknown``. ``bounds`` are those of the
    logits, int64 [classes], for each group. ``proofs`` name disjuncts by their index. A
    ``counterexample`` is stored input [*input shape] in the box ``box``, which breaks the property
    under ``profile`` with these ``logits``.
    """

    verdict: Verdict
    method: str
    bounds: tuple[Box, ...] = ()
    proofs: tuple[Proof, ...] = ()
    counterexample: Int64Array | None = None
    profile: str = ""
    logits: tuple[int, ...] = ()
    box: int = 0


_STRENGTH = ("interval", "elided-margin", "linear", "complete")


class Verifier:
    """Compiled once for a model; answers any number of queries."""

    def __init__(
        self,
        graph: Graph,
        names: Sequence[str] | None = None,
        effort: Effort | None = None,
    ) -> None:
        """Load the model under each group of the named profiles (None: all that cover it).

        Args:
            graph: the model.
            names: rounding profiles.
            effort: how far to go, see the module's docstring; the budget is for each box.

        Raises:
            InvalidGraphError: the model breaks a constraint under one of the profiles.
        """
        self.graph = graph
        self.effort = effort
        self.coverage: Coverage = cover(graph, names)
        self._engines = [
            _Engine(group, self.coverage.propagated(graph, group)) for group in self.coverage.groups
        ]

    def answer(
        self,
        lower: Int64Array,
        upper: Int64Array,
        specification: Specification,
        *,
        settings: Settings | None = None,
        prove: Prove | None = None,
    ) -> list[Answer]:
        """An answer for each of many boxes and one property.

        Args:
            lower: stored integers [boxes, *input shape], the lower ends; ``upper`` likewise.
            upper: see ``lower``.
            specification: what must not happen.
            settings: strength of the search for counterexamples; None for no search.
            prove: a stronger method for what intervals and margins leave open.

        Raises:
            DataError: boxes that do not fit the model or are empty, or a property of logits that
                the model does not have.
        """
        low, high = check_input(self.graph, lower), check_input(self.graph, upper)
        if low.shape != high.shape or (low > high).any():
            raise DataError("a box is empty, or the ends differ in number")
        specification.check(self.graph.tensors[self.graph.logits].size)
        found: list[Answer] = []
        for start in range(0, len(low), _BATCH):
            part = slice(start, start + _BATCH)
            states = [e.excluded(low[part], high[part], specification) for e in self._engines]
            for i in range(len(low[part])):
                one = low[start + i], high[start + i]
                case = _Case(self._engines, one, specification, [state[i] for state in states])
                found.append(case.answer(settings, prove, self.effort))
        return found

    def decide(
        self,
        boxes: Iterable[tuple[Int64Array, Int64Array, Specification]],
        *,
        settings: Settings | None = None,
        prove: Prove | None = None,
        total: int = 0,
        progress: Progress | None = None,
    ) -> Answer:
        """One answer about a union of boxes, each with its own property; stops at a refutation.

        Args:
            boxes: (lower, upper, specification) as for ``answer``.
            settings: see ``answer``.
            prove: see ``answer``.
            total: how many entries ``boxes`` has, for ``progress``.
            progress: called with (entries done, entries in all).

        Returns:
            ``certified`` if every box is, by the strongest method that was needed; ``refuted`` with
            the first counterexample; else ``unknown``, about the first box that is. ``box`` counts
            boxes over all entries.

        Raises:
            DataError: as ``answer``; or there is no box at all.
        """
        found: list[Answer] = []
        for done, (lower, upper, specification) in enumerate(boxes):
            found += self.answer(lower, upper, specification, settings=settings, prove=prove)
            if any(answer.verdict == "refuted" for answer in found):
                break
            if progress:
                progress(done + 1, max(total, done + 1))
        return joined(found)


def joined(answers: Sequence[Answer]) -> Answer:
    """What is known about many boxes together, see ``Verifier.decide``.

    Raises:
        DataError: there is none.
    """
    if not answers:
        raise DataError("a query about no input at all")
    for verdict in ("refuted", "unknown"):
        for box, answer in enumerate(answers):
            if answer.verdict == verdict:
                return replace(answer, box=box)
    return Answer("certified", max((a.method for a in answers), key=_STRENGTH.index))


@dataclass(frozen=True, eq=False)
class _State:
    """One box under one group: bounds of the logits, and the disjuncts that are excluded."""

    bounds: Box
    by_bounds: frozenset[int]
    by_margin: frozenset[int]


class _Engine:
    """The sessions of one group's graph."""

    def __init__(self, group: Group, propagated: Graph) -> None:
        self.group = group
        self.graph = group.graph
        self._layer = margin.last_layer(group.graph)
        wanted = [self.graph.logits] if self._layer is None else [self._layer.source]
        self._intervals = IntervalSession(propagated, tensors=[*wanted, self.graph.logits])
        self._plain = Session(group.graph, whole=True)

    @cached_property
    def searcher(self) -> Searcher:
        """Made when it is first needed."""
        return Searcher(self.graph)

    @cached_property
    def decider(self) -> Decider:
        """Made when it is first needed."""
        return Decider(self.graph)

    def logits(self, points: Int64Array) -> Int64Array:
        """Int64 [points, classes]."""
        return self._plain.run(points).reshape(len(points), -1).astype(np.int64)

    def excluded(
        self, lower: Int64Array, upper: Int64Array, specification: Specification
    ) -> list[_State]:
        """What intervals and margins exclude on each box."""
        bounds = self._intervals.run(lower, upper)
        low, high = bounds[self.graph.logits]
        plain = [specification.holds_on_bounds(a, b) for a, b in zip(low, high, strict=True)]
        sets = [{i for i, is_out in enumerate(row) if is_out} for row in plain]
        closer = [set(known) for known in sets]
        open_ = [len(known) < specification.excluded_needed for known in sets]
        if self._layer is not None and any(open_):
            chosen = np.flatnonzero(open_)
            hidden_low, hidden_high = bounds[self._layer.source]
            hidden = hidden_low[chosen], hidden_high[chosen]
            for label, rivals in _rounds(specification):
                labels = np.full(len(chosen), label)
                gaps = np.zeros((len(chosen), low.shape[1]), np.int64)
                for rival, (gap, _) in rivals.items():
                    gaps[:, rival] = gap
                _, proved = margin.wins(self._layer, *hidden, labels, gaps)
                for rival, (_, disjuncts) in rivals.items():
                    for box in chosen[proved[:, rival]].tolist():
                        closer[box] |= disjuncts
        return [
            _State((low[i], high[i]), frozenset(sets[i]), frozenset(closer[i]))
            for i in range(len(low))
        ]


def _rounds(
    specification: Specification,
) -> list[tuple[int, dict[int, tuple[int, set[int]]]]]:
    """The atoms that deny a lead of one logit over another, for ``margin.wins``.

    Each entry is a label and, by rival, the lead and the disjuncts that fall with it; several
    entries where a pair of logits has several leads. A lead of 0 implies every negative one.
    """
    found: dict[tuple[int, int, int], set[int]] = {}
    for index, disjunct in enumerate(specification.unsafe):
        for atom in disjunct:
            pair = atom.pair()
            if pair is not None and pair[2] <= NEVER:
                label, rival, gap = pair
                found.setdefault((label, rival, max(gap, 0)), set()).add(index)
    rounds: list[tuple[int, dict[int, tuple[int, set[int]]]]] = []
    for (label, rival, gap), disjuncts in found.items():
        free = (rivals for known, rivals in rounds if known == label and rival not in rivals)
        rivals = next(free, None)
        if rivals is None:
            rivals = {}
            rounds.append((label, rivals))
        rivals[rival] = gap, disjuncts
    return rounds


class _Case:
    """One box and one property under all groups."""

    def __init__(
        self,
        engines: Sequence[_Engine],
        box: Box,
        specification: Specification,
        states: Sequence[_State],
    ) -> None:
        self.engines, self.box, self.specification = engines, box, specification
        self.states = states
        self.bounds = tuple(state.bounds for state in states)
        self.proofs: tuple[Proof, ...] = ()

    def answer(
        self, settings: Settings | None, prove: Prove | None, effort: Effort | None
    ) -> Answer:
        """The cascade of the module's docstring."""
        needed = self.specification.excluded_needed
        if all(len(state.by_bounds) >= needed for state in self.states):
            return Answer("certified", "interval", self.bounds)
        if all(len(state.by_margin) >= needed for state in self.states):
            return Answer("certified", "elided-margin", self.bounds)
        slow = effort is not None and effort.method != "interval"
        if (slow or effort is None) and self._few():
            return self._enumerated()
        tried = "elided-margin"
        if prove is not None:
            tried = "linear"
            if self._proved(prove):
                return Answer("certified", "linear", self.bounds, self.proofs)
        found = None
        if effort is not None and slow:
            tried = "linear"
            found = self._decided(replace(effort, method="linear"))
        if found is None and settings is not None:
            found = self._searched(settings)
        if found is None and effort is not None and effort.method == "complete":
            tried = "complete"
            found = self._decided(effort)
        return found or Answer("unknown", tried, self.bounds, self.proofs)

    def _few(self) -> bool:
        """Whether every point can be run."""
        # Python integers: the product of many extents leaves int64.
        count = 1
        for extent in (self.box[1] - self.box[0] + 1).reshape(-1).tolist():
            count *= extent
            if count > POINTS:
                return False
        return True

    def _decided(self, effort: Effort) -> Answer | None:
        """Linear bounds, or case distinctions, for what is open; None where it stays open."""
        until = time.monotonic() + effort.budget.seconds
        rule = self.specification
        proofs: list[Proof] = []
        for number, (engine, state) in enumerate(zip(self.engines, self.states, strict=True)):
            left = self._left(state)
            if len(left) <= rule.allowed:
                continue
            found = exclude_enough(engine.decider, number, self.box, rule, left, effort, until)
            if found.counterexample is not None:
                return self._refuted(engine, found.counterexample, "complete")
            if not found.closed:
                return None
            proofs += found.proofs
        return Answer("certified", method_of(proofs), self.bounds, tuple(proofs))

    def _left(self, state: _State) -> list[int]:
        return [i for i in range(len(self.specification.unsafe)) if i not in state.by_margin]

    def _enumerated(self) -> Answer:
        lower, upper = self.box
        points = every_point(lower.reshape(-1), upper.reshape(-1)).reshape(-1, *lower.shape)
        unsure = False
        for engine in self.engines:
            for point, logits in zip(points, engine.logits(points), strict=True):
                if self.specification.violated(logits):
                    return self._refuted(engine, point, "points")
                unsure |= not self.specification.satisfied(logits)
        # Behind SOFTMAX a point can be neither, see ``specification``.
        if unsure:
            return Answer("unknown", "complete", self.bounds)
        proofs: list[Proof] = []
        if not self.specification.allowed:  # or no disjunct need be excluded by itself
            for number, state in enumerate(self.states):
                proofs += [Proof(number, i, (Leaf("points"),)) for i in self._left(state)]
        return Answer("certified", "complete", self.bounds, tuple(proofs))

    def _proved(self, prove: Prove) -> bool:
        enough = True
        lower, upper = self.box[0][None], self.box[1][None]
        for index, (engine, state) in enumerate(zip(self.engines, self.states, strict=True)):
            excluded = set(state.by_margin)
            if len(excluded) < self.specification.excluded_needed:
                more, proofs = prove(engine.graph, lower, upper, self.specification)
                excluded |= more & set(range(len(self.specification.unsafe)))
                self.proofs += tuple(msgspec.structs.replace(p, group=index) for p in proofs)
            enough &= len(excluded) >= self.specification.excluded_needed
        return enough

    def _searched(self, settings: Settings) -> Answer | None:
        for engine in self.engines:
            point = engine.searcher.search(*self.box, self.specification, settings)
            if point is not None:
                return self._refuted(engine, point, "attack")
        return None

    def _refuted(self, engine: _Engine, point: Int64Array, method: str) -> Answer:
        """A counterexample, verified by the reference executor."""
        logits = execute(engine.graph, point[None]).reshape(-1)
        inside = bool(((self.box[0] <= point) & (point <= self.box[1])).all())
        if not inside or not self.specification.violated(logits):
            raise AssertionError("a counterexample that the reference does not reproduce: a defect")
        return Answer(
            "refuted",
            method,
            self.bounds,
            counterexample=point,
            profile=engine.group.names[0],
            logits=tuple(logits.tolist()),
        )
