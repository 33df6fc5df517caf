"""Verdicts for many samples: intervals, elided margins, linear bounds, attacks, complete search.

One exact propagation runs for each group of profiles that compute the same integers on this model
(a single one for a universal model), for each of the models; ``certified`` is their conjunction. A
verdict is taken only from integers that the kernels and ``semantics`` computed; a counterexample
counts only after the reference executor has reproduced it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec
import numpy as np

from cactus_edge import decision, profiles, universal
from cactus_edge.certificate import Bounds, Sample
from cactus_edge.certify import margin
from cactus_edge.certify.attack import Settings, search
from cactus_edge.certify.boxes import Boxes, Counterexample, line_about
from cactus_edge.certify.decide import Decider, Effort, method_of
from cactus_edge.certify.intervals import Box, IntervalSession
from cactus_edge.certify.linear.search import Seconds
from cactus_edge.certify.top import check_top, search_top, several
from cactus_edge.constraints import validate
from cactus_edge.errors import CactusEdgeError, DataError, InvalidGraphError
from cactus_edge.execute import check_input, execute
from cactus_edge.graph import Add, BoolArray, Graph, Int64Array, Linear
from cactus_edge.operators import TABLED
from cactus_edge.proofs import Proof
from cactus_edge.runtime import Session

CHUNK = 500
_FLOAT32 = "litert-xnnpack-x86"
"""A profile that rounds in float32, which the kernels do fastest."""


@dataclass(frozen=True)
class Group:
    """Profiles that compute the same integers on a model, and the resolved graph of one of them."""

    names: tuple[str, ...]
    graph: Graph
    model: int = 0


@dataclass(frozen=True)
class Coverage:
    """The groups of a model; ``uncovered`` profiles, with the reason, take no part."""

    universal: bool
    groups: tuple[Group, ...]
    uncovered: dict[str, str]

    def propagated(self, graph: Graph, group: Group) -> Graph:
        """What the intervals of a model's group run on: in float32 where all profiles agree."""
        if self.universal and _FLOAT32 in group.names:
            return _resolved(graph, _FLOAT32)
        return group.graph


def cover(graph: Graph, names: Sequence[str] | None) -> Coverage:
    """Resolve a model under the named profiles, or under every one that covers it.

    Raises:
        InvalidGraphError: a named profile does not cover the model, or none does.
    """
    if universal.is_universal(graph):
        outside = profiles.uncovered(graph)
        every = tuple(name for name in profiles.PROFILES if name not in outside)
        return Coverage(True, (Group(every, _resolved(graph, profiles.DEFAULT)),), outside)
    found: dict[bytes, Group] = {}
    uncovered = profiles.uncovered(graph)
    for name in profiles.PROFILES if names is None else names:
        if name in uncovered:
            if names is not None:
                raise InvalidGraphError(uncovered[name])
            continue
        resolved = _resolved(graph, name)
        key = _integers(resolved)
        known = found.get(key)
        found[key] = Group((*known.names, name), known.graph) if known else Group((name,), resolved)
    if not found:
        raise InvalidGraphError(next(iter(uncovered.values())))
    return Coverage(False, tuple(found.values()), uncovered if names is None else {})


def _resolved(graph: Graph, name: str) -> Graph:
    resolved = profiles.resolve(graph, name)
    validate(resolved)
    return resolved


def _integers(graph: Graph) -> bytes:
    parts: list[bytes] = []
    for op in graph.core:
        if isinstance(op, Linear) and op.requantization is not None:
            r = op.requantization
            parts += [r.rounding.tobytes(), r.multiplier.tobytes(), r.shift.tobytes()]
        elif isinstance(op, Add):
            parts.append(repr(op.requantization).encode())
        elif isinstance(op, TABLED) and op.table is not None:
            parts.append(op.table.tobytes())
    return b"|".join(parts)


@dataclass(eq=False)
class _Work:
    """What is known so far: ``open`` bool [groups, boxes, classes], rivals that nothing excludes.

    ``closed`` bool [boxes]; ``proofs`` by box, ``broken`` by sample.
    """

    boxes: Boxes
    open: BoolArray
    closed: BoolArray
    broken: dict[int, Counterexample]
    proofs: dict[int, tuple[Proof, ...]] = field(default_factory=dict)


class Certifier:
    """Compiled once for some models; ``bounds`` and ``verdicts`` take any number of boxes."""

    def __init__(
        self,
        graphs: Graph | Sequence[Graph],
        names: Sequence[str] | None = None,
        effort: Effort | None = None,
        top: int = 1,
        *,
        threads: int | None = None,
    ) -> None:
        """Load the model under each group of the named profiles (None: all that cover it).

        Args:
            graphs: one model, or several that a verdict has to hold for at once.
            names: rounding profiles.
            effort: what may be done where intervals leave a sample open; nothing if None.
            top: the label has to be among that many largest logits.
            threads: as many as the process may use if None.

        Raises:
            InvalidGraphError: a model breaks a constraint under one of the profiles.
            UsageError: ``top`` is below 1, or holds all logits.
        """
        models = (graphs,) if isinstance(graphs, Graph) else tuple(graphs)
        self.graph = models[0]
        self.effort = effort or Effort()
        self.top = top
        self.threads = threads
        check_top(self.graph, top)
        self.coverages = tuple(cover(graph, names) for graph in models)
        self.coverage = self.coverages[0]
        self.groups = tuple(
            replace(group, model=number)
            for number, coverage in enumerate(self.coverages)
            for group in coverage.groups
        )
        self._engines = [
            _Engine(
                group.graph,
                threads,
                self.coverages[group.model].propagated(models[group.model], group),
            )
            for group in self.groups
        ]
        self._deciders = [Decider(group.graph) for group in self.groups]

    def bounds(self, lower: Int64Array, upper: Int64Array) -> list[tuple[Int64Array, Int64Array]]:
        """Stored logits' bounds over each box, for each group: int64 [samples, classes].

        Raises:
            DataError: boxes that do not fit the model, or are empty.
        """
        count = len(lower)
        self._check(Boxes(lower, lower, upper, np.zeros(count, np.int64), np.arange(count)))
        return [engine.bounds(lower, upper) for engine in self._engines]

    def predictions(self, stored: Int64Array) -> Int64Array:
        """Winning index under the first group, int64 [samples]."""
        return decision.predict(self._engines[0].logits(stored))

    def verdicts(
        self,
        first: int,
        stored: Int64Array,
        lower: Int64Array,
        upper: Int64Array,
        labels: Int64Array,
        settings: Settings | None = None,
        owner: Int64Array | None = None,
    ) -> list[Sample]:
        """A verdict for each sample; a sample that cannot be treated becomes an ``error``.

        Args:
            first: index of the first sample, for the certificate.
            stored: integers [boxes, ...], the samples themselves.
            lower: integers, like ``stored``: the boxes' lower ends; ``upper`` likewise.
            upper: see ``lower``.
            labels: integers [boxes], below the number of logits.
            settings: strength of the attack on what stays open; None for no attack.
            owner: int64 [boxes], ascending from 0: the sample that a box is about, where several
                boxes are about one; it is certified when all of them are.

        Raises:
            DataError: arrays that do not fit the model, a sample outside its box, a label without
                a logit.
        """
        numbers = np.arange(len(labels)) if owner is None else owner
        boxes = Boxes(stored, lower, upper, labels, numbers, self.top)
        self._check(boxes)
        try:
            return self._verdicts(first, boxes, settings)
        except CactusEdgeError as error:
            if len(boxes.firsts) == 1:
                label = int(labels[0])
                return [Sample(first, label, -1, "error", "none", message=str(error))]
        found: list[Sample] = []
        for part in boxes.parts():
            one = boxes.of(part)
            found += self.verdicts(first + len(found), *one[:4], settings, one.owner)
        return found

    def _check(self, boxes: Boxes) -> None:
        stored, lower, upper, labels, owner, _ = boxes
        for array in (stored, lower, upper):
            check_input(self.graph, array)
        if not stored.shape == lower.shape == upper.shape or labels.shape != (len(stored),):
            raise DataError("samples, boxes and labels differ in number")
        steps = np.diff(owner, prepend=-1)
        whole = np.isin(steps, (0, 1)).all() and (steps[:1] == 1).all()
        if owner.shape != labels.shape or not whole:
            raise DataError("the boxes of a sample have to stand together, in its order")
        if not ((lower <= stored) & (stored <= upper)).all():
            raise DataError("a sample lies outside its box, or a box is empty")
        classes = self.graph.tensors[self.graph.logits].size
        if labels.size and not (labels.min() >= 0 and labels.max() < classes):
            raise DataError(
                f"labels {labels.min()}..{labels.max()}, the model has {classes} logits"
            )

    def _verdicts(self, first: int, boxes: Boxes, settings: Settings | None) -> list[Sample]:
        work, plain, witness = self._bounded(boxes)
        if self.effort.method != "interval":
            self._decide(replace(self.effort, method="linear"), work)
        if settings is not None:
            attack_open(
                self.groups, settings, work.closed, work.broken, boxes, threads=self.threads
            )
        if self.effort.method == "complete":
            self._decide(self.effort, work)
        stored, labels = boxes.stored[boxes.firsts], boxes.labels[boxes.firsts]
        predictions = self.predictions(stored)
        found: list[Sample] = []
        for i, part in enumerate(boxes.parts()):
            proofs = tuple(
                p for box in range(part.start, part.stop) for p in work.proofs.get(box, ())
            )
            method = "interval" if plain[part].all() else "elided-margin"
            found.append(
                line_about(
                    (first + i, int(labels[i]), int(predictions[i])),
                    (bool(work.closed[part].all()), method_of(proofs) if proofs else method),
                    witness[i],
                    stored[i],
                    work.broken.get(i),
                    proofs,
                )
            )
        return found

    def _bounded(self, boxes: Boxes) -> tuple[_Work, BoolArray, list[tuple[Bounds, ...]]]:
        """What bounds and margins say, which boxes bounds alone close, and bounds by sample."""
        labels, firsts = boxes.labels, boxes.firsts
        classes = self.graph.tensors[self.graph.logits].size
        open_ = np.zeros((len(self.groups), len(labels), classes), bool)
        plain = np.ones(len(labels), bool)
        witness: list[tuple[Bounds, ...]] = [()] * len(firsts)
        broken: dict[int, Counterexample] = {}
        gaps_of = decision.gaps if self.top == 1 else partial(decision.gaps, top=self.top)
        for number, (engine, group) in enumerate(zip(self._engines, self.groups, strict=True)):
            gaps = np.zeros((len(labels), classes), np.int64)
            for label in np.unique(labels).tolist():
                gaps[labels == label] = gaps_of(group.graph, label, classes)
            low, high, by_bounds, by_margin = engine.prove(*boxes[1:4], gaps)
            plain &= (~by_bounds).sum(axis=1) < self.top
            open_[number] = ~by_margin
            for i, part in enumerate(boxes.parts()):
                least, most = low[part].min(axis=0).tolist(), high[part].max(axis=0).tolist()
                witness[i] = (*witness[i], Bounds(tuple(least), tuple(most)))
            logits = engine.logits(boxes.stored[firsts])
            wrong = decision.surely_wrong(group.graph, logits, labels[firsts], self.top)
            for i in np.flatnonzero(wrong).tolist():
                point = boxes.stored[firsts[i]]
                broken.setdefault(i, (point, "sample", group.names[0], group.model))
        closed = (open_.sum(axis=2) < self.top).all(axis=0)
        return _Work(boxes, open_, closed, broken), plain, witness

    def _decide(self, effort: Effort, work: _Work) -> None:
        """Treat the open samples one by one, and of each one box after another."""
        for i, part in enumerate(work.boxes.parts()):
            if i in work.broken or work.closed[part].all():
                continue
            until = time.monotonic() + effort.budget.seconds
            for box in range(part.start, part.stop):
                if not work.closed[box]:
                    work.closed[box] = self._close(effort, work, box, box - part.start, until)
                    if not work.closed[box]:
                        break

    def _close(self, effort: Effort, work: _Work, box: int, place: int, until: Seconds) -> bool:
        """Close a box under every group; keeps its proofs, or a counterexample."""
        boxes = work.boxes
        proofs: list[Proof] = []
        for number, (decider, group) in enumerate(zip(self._deciders, self.groups, strict=True)):
            rivals = np.flatnonzero(work.open[number, box]).tolist()
            if len(rivals) < self.top:
                continue
            ends, label = (boxes.lower[box], boxes.upper[box]), int(boxes.labels[box])
            if self.top == 1:
                found = decider.decide(number, ends, label, rivals, effort, until)
            else:
                found = several(decider, number, ends, label, rivals, self.top, effort, until)
            proofs += [msgspec.structs.replace(proof, box=place) for proof in found.proofs]
            point = found.counterexample
            if point is not None and _breaks(group, point, boxes, box):
                sample = int(boxes.owner[box])
                work.broken[sample] = (point, "complete", group.names[0], group.model)
            if not found.closed:
                return False
        work.proofs[box] = tuple(proofs)
        return True


def attack_open(
    groups: Sequence[Group],
    settings: Settings,
    closed: BoolArray,
    broken: dict[int, Counterexample],
    boxes: Boxes,
    *,
    threads: int | None = None,
) -> None:
    """Attack the boxes that are not ``closed``, of samples not ``broken``; add what is found.

    A counterexample counts only when it lies in the box and the reference executor misclassifies
    it. ``closed`` is bool [boxes]; ``broken`` has numbers of samples as keys.
    """
    stored, lower, upper, labels, owner, top = boxes
    for group in groups:
        open_ = [box for box in np.flatnonzero(~closed) if owner[box] not in broken]
        rest = np.array(open_, np.int64)
        if not rest.size:
            return
        rows = stored[rest], lower[rest], upper[rest], labels[rest]
        if top == 1:
            found = search(group.graph, *rows, settings, threads=threads)
        else:
            found = search_top(group.graph, *rows[1:], top, settings)
        for box, point in zip(rest.tolist(), found, strict=True):
            known = int(owner[box]) in broken
            if point is not None and not known and _breaks(group, point, boxes, box):
                broken[int(owner[box])] = (point, "attack", group.names[0], group.model)


def _breaks(group: Group, point: Int64Array, boxes: Boxes, box: int) -> bool:
    """Whether the reference executor misclassifies a point that lies in a box."""
    inside = bool(((boxes.lower[box] <= point) & (point <= boxes.upper[box])).all())
    logits, labels = execute(group.graph, point[None]), boxes.labels[box : box + 1]
    return inside and bool(decision.surely_wrong(group.graph, logits, labels, boxes.top)[0])


def attack_boxes(
    groups: Sequence[Group], first: int, boxes: Boxes, settings: Settings
) -> list[Sample]:
    """``refuted`` or ``unknown`` for each sample."""
    firsts = boxes.firsts
    stored, labels = boxes.stored[firsts], boxes.labels[firsts]
    broken: dict[int, Counterexample] = {}
    predictions = np.zeros(len(labels), np.int64)
    for group in reversed(groups):
        logits = Session(group.graph, whole=True).run(stored).astype(np.int64)
        predictions = decision.predict(logits)
        wrong = decision.surely_wrong(group.graph, logits, labels, boxes.top)
        for i in np.flatnonzero(wrong).tolist():
            broken[i] = (stored[i], "sample", group.names[0], group.model)
    attack_open(groups, settings, np.zeros(len(boxes.labels), bool), broken, boxes)
    return [
        line_about(
            (first + i, int(labels[i]), int(predictions[i])),
            (False, "elided-margin"),
            (),
            stored[i],
            broken.get(i),
        )
        for i in range(len(labels))
    ]


class _Engine:
    def __init__(self, graph: Graph, threads: int | None, propagated: Graph | None = None) -> None:
        """Load a graph, and one with the same integers whose intervals are faster."""
        self.graph = graph
        self.layer = margin.last_layer(graph)
        wanted = [graph.logits] if self.layer is None else [self.layer.source, graph.logits]
        self.intervals = IntervalSession(propagated or graph, tensors=wanted, threads=threads)
        self.plain = Session(graph, threads=threads, whole=True)

    def logits(self, stored: Int64Array) -> Int64Array:
        return self.plain.run(stored).astype(np.int64)

    def bounds(self, lower: Int64Array, upper: Int64Array) -> Box:
        """Of the logits, int64 [boxes, classes]."""
        return self.intervals.run(lower, upper)[self.graph.logits]

    def prove(
        self, lower: Int64Array, upper: Int64Array, labels: Int64Array, gaps: Int64Array
    ) -> tuple[Int64Array, Int64Array, BoolArray, BoolArray]:
        """Bounds of the logits, and the rivals that bounds exclude, and that bounds or margins do.

        Int64 and bool [boxes, classes].
        """
        bounds = self.intervals.run(lower, upper)
        low, high = bounds[self.graph.logits]
        rows = np.arange(len(labels))
        plain = low[rows, labels][:, None] >= high + gaps
        plain[rows, labels] = True
        if self.layer is None:
            return low, high, plain, plain
        _, proved = margin.wins(self.layer, *bounds[self.layer.source], labels, gaps)
        return low, high, plain, proved


def chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    """Consecutive slices that cover ``count`` samples."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
