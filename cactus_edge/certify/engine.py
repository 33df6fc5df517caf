"""Verdicts for many samples: intervals, elided margins, linear bounds, attacks, complete search.

One exact propagation runs for each group of profiles that compute the same integers on this model
(a single one for a universal model), for each of the models; ``certified`` is their conjunction. A
verdict is taken only from integers that the kernels and ``semantics`` computed; a counterexample
counts only after the reference executor has reproduced it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cactus_edge import decision, profiles, universal
from cactus_edge.certificate import Bounds, Sample
from cactus_edge.certify import margin
from cactus_edge.certify.attack import Settings, search
from cactus_edge.certify.decide import Decider, Effort, method_of
from cactus_edge.certify.twin import Twin, twin
from cactus_edge.constraints import validate
from cactus_edge.errors import CactusEdgeError, DataError, InvalidGraphError
from cactus_edge.execute import check_input, execute
from cactus_edge.graph import Add, BoolArray, Graph, Int64Array, Linear, Stored
from cactus_edge.proofs import Proof
from cactus_edge.runtime import Session

CHUNK = 500
Counterexample = tuple[Int64Array, str, str, int]
"""Stored input, how it was found, profile and number of the model that misclassify it."""


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
    return b"|".join(parts)


class Certifier:
    """Compiled once for some models; ``bounds`` and ``verdicts`` take any number of boxes."""

    def __init__(
        self,
        graphs: Graph | Sequence[Graph],
        names: Sequence[str] | None = None,
        effort: Effort | None = None,
    ) -> None:
        """Build the twin of each group of the named profiles (None: all that cover the model).

        Args:
            graphs: one model, or several that a verdict has to hold for at once.
            names: rounding profiles.
            effort: what may be done where intervals leave a sample open; nothing if None.

        Raises:
            InvalidGraphError: a model breaks a constraint under one of the profiles.
            UnsupportedModelError: a model has no twin.
        """
        models = (graphs,) if isinstance(graphs, Graph) else tuple(graphs)
        self.graph = models[0]
        self.effort = effort or Effort()
        self.coverages = tuple(cover(graph, names) for graph in models)
        self.coverage = self.coverages[0]
        self.groups = tuple(
            replace(group, model=number)
            for number, coverage in enumerate(self.coverages)
            for group in coverage.groups
        )
        self._engines = [_Engine(group.graph) for group in self.groups]
        self._deciders = [Decider(group.graph) for group in self.groups]

    def bounds(self, lower: Int64Array, upper: Int64Array) -> list[tuple[Int64Array, Int64Array]]:
        """Stored logits' bounds over each box, for each group: int64 [samples, classes].

        Raises:
            DataError: boxes that do not fit the model, or are empty.
        """
        self._check(lower, lower, upper, np.zeros(len(lower), np.int64))
        return [engine.propagate(lower, upper)[:2] for engine in self._engines]

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
    ) -> list[Sample]:
        """A verdict for each sample; a sample that cannot be treated becomes an ``error``.

        Args:
            first: index of the first sample, for the certificate.
            stored: integers [samples, ...], the samples themselves.
            lower: integers, like ``stored``: the boxes' lower ends; ``upper`` likewise.
            upper: see ``lower``.
            labels: integers [samples], below the number of logits.
            settings: strength of the attack on what stays open; None for no attack.

        Raises:
            DataError: arrays that do not fit the model, a sample outside its box, a label without
                a logit.
        """
        self._check(stored, lower, upper, labels)
        try:
            return self._verdicts(first, stored, lower, upper, labels, settings)
        except CactusEdgeError as error:
            if len(labels) == 1:
                label = int(labels[0])
                return [Sample(first, label, -1, "error", "none", message=str(error))]
        found: list[Sample] = []
        for i in range(len(labels)):
            one = slice(i, i + 1)
            found += self.verdicts(
                first + i, stored[one], lower[one], upper[one], labels[one], settings
            )
        return found

    def _check(
        self, stored: Int64Array, lower: Int64Array, upper: Int64Array, labels: Int64Array
    ) -> None:
        for array in (stored, lower, upper):
            check_input(self.graph, array)
        if not stored.shape == lower.shape == upper.shape or labels.shape != (len(stored),):
            raise DataError("samples, boxes and labels differ in number")
        if not ((lower <= stored) & (stored <= upper)).all():
            raise DataError("a sample lies outside its box, or a box is empty")
        classes = self.graph.tensors[self.graph.logits].size
        if labels.size and not (labels.min() >= 0 and labels.max() < classes):
            raise DataError(
                f"labels {labels.min()}..{labels.max()}, the model has {classes} logits"
            )

    def _verdicts(
        self,
        first: int,
        stored: Int64Array,
        lower: Int64Array,
        upper: Int64Array,
        labels: Int64Array,
        settings: Settings | None,
    ) -> list[Sample]:
        count = len(labels)
        classes = self.graph.tensors[self.graph.logits].size
        gaps = np.stack([decision.gaps(self.graph, int(label), classes) for label in labels])
        excluded = np.ones((len(self.groups), count, classes), bool)
        plain = np.ones(count, bool)
        witness: list[tuple[Bounds, ...]] = [()] * count
        broken: dict[int, Counterexample] = {}
        for number, (engine, group) in enumerate(zip(self._engines, self.groups, strict=True)):
            low, high, by_bounds, by_margin = engine.prove(lower, upper, labels, gaps)
            plain &= by_bounds
            excluded[number] = by_margin
            for i in range(count):
                pair = Bounds(tuple(low[i].tolist()), tuple(high[i].tolist()))
                witness[i] = (*witness[i], pair)
            wrong = decision.surely_wrong(self.graph, engine.logits(stored), labels)
            for i in np.flatnonzero(wrong).tolist():
                broken.setdefault(i, (stored[i], "sample", group.names[0], group.model))
        certified = excluded.all(axis=(0, 2))
        boxes = stored, lower, upper, labels
        decided: dict[int, tuple[str, tuple[Proof, ...]]] = {}
        if self.effort.method != "interval":
            linear = replace(self.effort, method="linear")
            self._decide(linear, excluded, certified, broken, boxes, decided)
        if settings is not None:
            attack_open(self.groups, settings, certified, broken, boxes)
        if self.effort.method == "complete":
            self._decide(self.effort, excluded, certified, broken, boxes, decided)
        predictions = self.predictions(stored)
        return [
            _sample(
                (first + i, int(labels[i]), int(predictions[i])),
                (bool(certified[i]), "interval" if plain[i] else "elided-margin"),
                witness[i],
                stored[i],
                broken.get(i),
                decided.get(i),
            )
            for i in range(count)
        ]

    def _decide(
        self,
        effort: Effort,
        excluded: BoolArray,
        certified: BoolArray,
        broken: dict[int, Counterexample],
        boxes: tuple[Int64Array, Int64Array, Int64Array, Int64Array],
        decided: dict[int, tuple[str, tuple[Proof, ...]]],
    ) -> None:
        """Treat the open samples one by one; updates ``certified``, ``broken``, ``decided``."""
        _, lower, upper, labels = boxes
        for i in np.flatnonzero(~certified).tolist():
            if i in broken:
                continue
            until = time.monotonic() + effort.budget.seconds
            proofs: list[Proof] = []
            for number, (decider, group) in enumerate(
                zip(self._deciders, self.groups, strict=True)
            ):
                rivals = np.flatnonzero(~excluded[number, i]).tolist()
                box, label = (lower[i], upper[i]), int(labels[i])
                found = decider.decide(number, box, label, rivals, effort, until)
                proofs += found.proofs
                if found.counterexample is not None:
                    point = found.counterexample
                    if _breaks(group, point, boxes, i):
                        broken[i] = (point, "complete", group.names[0], group.model)
                if not found.closed:
                    break
            else:
                certified[i] = True
                decided[i] = method_of(proofs), tuple(proofs)


def attack_open(
    groups: Sequence[Group],
    settings: Settings,
    closed: BoolArray,
    broken: dict[int, Counterexample],
    box: tuple[Int64Array, Int64Array, Int64Array, Int64Array],
) -> None:
    """Attack the samples that are neither ``closed`` nor ``broken``; add what is found.

    A counterexample counts only when it lies in the box and the reference executor misclassifies
    it. ``box`` is (stored, lower, upper, labels).
    """
    stored, lower, upper, labels = box
    for group in groups:
        rest = np.array([i for i in np.flatnonzero(~closed) if i not in broken], np.int64)
        if not rest.size:
            return
        found = search(group.graph, stored[rest], lower[rest], upper[rest], labels[rest], settings)
        for i, point in zip(rest.tolist(), found, strict=True):
            if point is not None and _breaks(group, point, box, i):
                broken[i] = (point, "attack", group.names[0], group.model)


def _breaks(
    group: Group,
    point: Int64Array,
    box: tuple[Int64Array, Int64Array, Int64Array, Int64Array],
    i: int,
) -> bool:
    """Whether the reference executor misclassifies a point that lies in the box of sample i."""
    _, lower, upper, labels = box
    inside = bool(((lower[i] <= point) & (point <= upper[i])).all())
    logits = execute(group.graph, point[None])
    return inside and bool(decision.surely_wrong(group.graph, logits, labels[i : i + 1])[0])


def attack_boxes(
    groups: Sequence[Group],
    first: int,
    box: tuple[Int64Array, Int64Array, Int64Array, Int64Array],
    settings: Settings,
) -> list[Sample]:
    """``refuted`` or ``unknown`` for each box (stored, lower, upper, labels)."""
    stored, _, _, labels = box
    broken: dict[int, Counterexample] = {}
    predictions = np.zeros(len(labels), np.int64)
    for group in reversed(groups):
        logits = Session(group.graph).run(stored).astype(np.int64)
        predictions = decision.predict(logits)
        wrong = decision.surely_wrong(group.graph, logits, labels)
        for i in np.flatnonzero(wrong).tolist():
            broken[i] = (stored[i], "sample", group.names[0], group.model)
    closed = np.zeros(len(labels), bool)
    attack_open(groups, settings, closed, broken, box)
    return [
        _sample(
            (first + i, int(labels[i]), int(predictions[i])),
            (False, "elided-margin"),
            (),
            stored[i],
            broken.get(i),
        )
        for i in range(len(labels))
    ]


class _Engine:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.twin: Twin = twin(graph)
        self.layer = margin.last_layer(graph)
        wanted = [graph.logits] if self.layer is None else [self.layer.source, graph.logits]
        self.session = Session(self.twin.graph, tensors=wanted)
        self.plain = Session(graph)

    def logits(self, stored: Int64Array) -> Int64Array:
        return self.plain.run(stored).astype(np.int64)

    def propagate(
        self, lower: Int64Array, upper: Int64Array
    ) -> tuple[Int64Array, Int64Array, Mapping[int, Stored]]:
        values = self.session.run_tensors(self.twin.stack(lower, upper))
        low, high = self.twin.split(self.graph.logits, values[self.graph.logits])
        return low, high, values

    def prove(
        self, lower: Int64Array, upper: Int64Array, labels: Int64Array, gaps: Int64Array
    ) -> tuple[Int64Array, Int64Array, BoolArray, BoolArray]:
        """Bounds of the logits, which samples they prove, and which rivals are excluded.

        Bool [samples] for bounds alone, bool [samples, classes] for bounds or margins.
        """
        low, high, values = self.propagate(lower, upper)
        rows = np.arange(len(labels))
        plain = low[rows, labels][:, None] >= high + gaps
        plain[rows, labels] = True
        if self.layer is None:
            return low, high, plain.all(axis=1), plain
        hidden = self.twin.split(self.layer.source, values[self.layer.source])
        _, proved = margin.wins(self.layer, *hidden, labels, gaps)
        return low, high, plain.all(axis=1), proved


def _sample(
    head: tuple[int, int, int],
    proof: tuple[bool, str],
    witness: tuple[Bounds, ...],
    stored: Int64Array,
    broken: Counterexample | None,
    decided: tuple[str, tuple[Proof, ...]] | None = None,
) -> Sample:
    certified, method = proof
    if certified and broken is not None:
        raise AssertionError(f"sample {head[0]} is both certified and refuted: a defect")
    if certified:
        method, proofs = decided or (method, ())
        return Sample(*head, "certified", method, witness, proofs=proofs)
    if broken is not None:
        point, method, profile, model = broken
        moved = method != "sample"
        difference = (point - stored).astype("<i2").tobytes().hex() if moved else ""
        return Sample(
            *head,
            "refuted",
            method,
            witness,
            counterexample=difference,
            profile=profile,
            model=model,
        )
    return Sample(*head, "unknown", method, witness)


def chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    """Consecutive slices that cover ``count`` samples."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
