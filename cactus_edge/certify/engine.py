"""Verdicts for many samples: bounds of the twin, elided margins, then an optional attack.

One exact propagation runs for each group of profiles that compute the same integers on this model
(a single one for a universal model); ``certified`` is their conjunction. A verdict is taken only
from integers that the kernels and ``semantics`` computed; a counterexample counts only after the
reference executor has reproduced it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cactus_edge import decision, profiles, universal
from cactus_edge.certificate import Bounds, Sample
from cactus_edge.certify import margin
from cactus_edge.certify.attack import Settings, search
from cactus_edge.certify.twin import Twin, twin
from cactus_edge.constraints import validate
from cactus_edge.errors import CactusEdgeError, DataError, InvalidGraphError
from cactus_edge.execute import check_input, execute
from cactus_edge.graph import Add, BoolArray, Graph, Int64Array, Linear, Stored
from cactus_edge.runtime import Session

CHUNK = 500
Counterexample = tuple[Int64Array, str, str]
"""Stored input, how it was found ("sample" or "attack"), the profile that misclassifies it."""


@dataclass(frozen=True)
class Group:
    """Profiles that compute the same integers on a model, and the resolved graph of one of them."""

    names: tuple[str, ...]
    graph: Graph


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
    """Compiled once for a model; ``bounds`` and ``verdicts`` take any number of boxes."""

    def __init__(self, graph: Graph, names: Sequence[str] | None = None) -> None:
        """Build the twin of each group of the named profiles (None: all that cover the model).

        Raises:
            InvalidGraphError: the model breaks a constraint under one of the profiles.
            UnsupportedModelError: the model has no twin.
        """
        self.graph = graph
        self.coverage = cover(graph, names)
        self._engines = [_Engine(group.graph) for group in self.coverage.groups]

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
        certified = np.ones(count, bool)
        plain = np.ones(count, bool)
        witness: list[tuple[Bounds, ...]] = [()] * count
        broken: dict[int, Counterexample] = {}
        for engine, group in zip(self._engines, self.coverage.groups, strict=True):
            low, high, by_bounds, by_margin = engine.prove(lower, upper, labels, gaps)
            plain &= by_bounds
            certified &= by_margin
            for i in range(count):
                pair = Bounds(tuple(low[i].tolist()), tuple(high[i].tolist()))
                witness[i] = (*witness[i], pair)
            wrong = decision.surely_wrong(self.graph, engine.logits(stored), labels)
            for i in np.flatnonzero(wrong).tolist():
                broken.setdefault(i, (stored[i], "sample", group.names[0]))
        if settings is not None:
            attack_open(
                self.coverage.groups, settings, certified, broken, (stored, lower, upper, labels)
            )
        predictions = self.predictions(stored)
        return [
            _sample(
                (first + i, int(labels[i]), int(predictions[i])),
                (bool(certified[i]), bool(plain[i])),
                witness[i],
                stored[i],
                broken.get(i),
            )
            for i in range(count)
        ]


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
            if point is None:
                continue
            logits = execute(group.graph, point[None])
            inside = bool(((lower[i] <= point) & (point <= upper[i])).all())
            if inside and decision.surely_wrong(group.graph, logits, labels[i : i + 1])[0]:
                broken[i] = (point, "attack", group.names[0])


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
        broken.update({i: (stored[i], "sample", group.names[0]) for i in np.flatnonzero(wrong)})
    closed = np.zeros(len(labels), bool)
    attack_open(groups, settings, closed, broken, box)
    return [
        _sample(
            (first + i, int(labels[i]), int(predictions[i])),
            (False, False),
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
        """Bounds of the logits; bool [samples]: proved by bounds, proved by bounds or margins."""
        low, high, values = self.propagate(lower, upper)
        rows = np.arange(len(labels))
        plain = low[rows, labels][:, None] >= high + gaps
        plain[rows, labels] = True
        if self.layer is None:
            return low, high, plain.all(axis=1), plain.all(axis=1)
        hidden = self.twin.split(self.layer.source, values[self.layer.source])
        _, proved = margin.wins(self.layer, *hidden, labels, gaps)
        return low, high, plain.all(axis=1), proved.all(axis=1)


def _sample(
    head: tuple[int, int, int],
    proof: tuple[bool, bool],
    witness: tuple[Bounds, ...],
    stored: Int64Array,
    broken: Counterexample | None,
) -> Sample:
    certified, plain = proof
    if certified and broken is not None:
        raise AssertionError(f"sample {head[0]} is both certified and refuted: a defect")
    if certified:
        return Sample(*head, "certified", "interval" if plain else "elided-margin", witness)
    if broken is not None:
        point, method, profile = broken
        difference = (point - stored).astype("<i2").tobytes().hex() if method == "attack" else ""
        return Sample(*head, "refuted", method, witness, counterexample=difference, profile=profile)
    return Sample(*head, "unknown", "elided-margin", witness)


def chunks(count: int, size: int = CHUNK) -> Iterator[slice]:
    """Consecutive slices that cover ``count`` samples."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
