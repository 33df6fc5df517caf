"""The checker's second half: a line of a certificate, re-derived on its own.

Whatever the kind of the property, a line is about some boxes of stored integers and, for each group
of profiles, about disjuncts that must not hold there (``specification``): of a label its rivals, of
a query its unsafe sets. What bounds and margins do not exclude needs a proof in the line; all but
``allowed`` of them have to be excluded, on every box and under every group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cactus_edge import certificate, check_bounds, check_head, check_margin, decision, inputs
from cactus_edge import specification as specifications
from cactus_edge.certificate import Head, Sample
from cactus_edge.check_bounds import Box, logits_box
from cactus_edge.check_head import Group
from cactus_edge.check_linear import LinearChecker
from cactus_edge.datasets import Images
from cactus_edge.decision import NEVER
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.inputs import Perturbation
from cactus_edge.proofs import Leaf, Proof
from cactus_edge.specification import Specification
from cactus_edge.vnnlib import BoundCase

_SLOW = ("linear", "complete")
_TOGETHER = 16
"""Boxes of one sample that are propagated together."""


@dataclass(frozen=True, eq=False)
class Context:
    """What all lines of a certificate share; ``cases`` are those of a query."""

    head: Head
    groups: list[Group]
    linear: list[LinearChecker]
    cases: tuple[BoundCase, ...] = ()


def problems(
    context: Context,
    first: int,
    samples: Sequence[Sample],
    images: Images,
    labels: Int64Array,
) -> list[str]:
    """What is wrong with consecutive samples.

    Args:
        context: of the certificate.
        first: index of the first one.
        samples: as claimed.
        images: the samples themselves; of no matter for a query.
        labels: int64 [samples], as the data have them; -1 for a query.
    """
    found: list[str] = []
    if context.cases:
        facts = _queried(context, first, samples)
    else:
        facts = _labelled(context, samples, images, labels)
    for i, (sample, own) in enumerate(zip(samples, facts, strict=True)):
        found += [f"sample {first + i}: {text}" for text in own.problems(sample, first + i)]
    return found


def _queried(context: Context, first: int, samples: Sequence[Sample]) -> Iterator[Facts]:
    """Of each box of a query."""
    for case in context.cases[first : first + len(samples)]:
        box = case.lower, case.upper
        bounds = [logits_box(group.graph, box) for group in context.groups]
        rules = [case.specification] * len(context.groups)
        yield Facts(context, -1, case.lower[0], box, box, bounds, [], rules)


def _labelled(
    context: Context, samples: Sequence[Sample], images: Images, labels: Int64Array
) -> Iterator[Facts]:
    """Of each sample of a data set."""
    graph = context.groups[0].graph
    stored = inputs.stored(graph, images)
    perturbation = check_head.perturbation(context.head.property)
    points = [logits_box(group.graph, (stored, stored))[0][0] for group in context.groups]
    if perturbation.patch:
        boxes = _placements(context, graph, images, perturbation)
    else:
        boxes = _single(context, graph, (images, stored), perturbation, samples)
    for i, (box, reach, bounds) in enumerate(boxes):
        label = int(labels[i])
        rules = _rules(context, label)
        own = [point[i] for point in points]
        yield Facts(context, label, stored[i], box, reach, bounds, own, rules)


def _rules(context: Context, label: int) -> list[Specification]:
    """What must not happen, for each group; nothing for a label that does not exist."""
    found: list[Specification] = []
    for group in context.groups:
        if 0 <= label < group.graph.tensors[group.graph.logits].size:
            found.append(specifications.top(group.graph, label, context.head.property.top))
    return found


Derived = tuple[Box, Box, list[tuple[Box, Box]]]
"""Boxes that a proof is about, boxes that a counterexample may lie in, and bounds over the former:
for each group the logits' and those of the last layer's input."""


def _single(
    context: Context,
    graph: Graph,
    sources: tuple[Images, Int64Array],
    perturbation: Perturbation,
    samples: Sequence[Sample],
) -> Iterator[Derived]:
    """One box for each sample, all propagated together."""
    images, stored = sources
    reach = low, high = inputs.box(graph, images, perturbation)
    if context.head.property.kind == "radius":
        largest = int(perturbation.radius)
        claimed = [min(max(sample.radius or 0, 0), largest) for sample in samples]
        levels = np.array(claimed, np.int64).reshape(-1, *(1,) * (stored.ndim - 1))
        low, high = inputs.around(graph, stored, levels)
    bounds = [logits_box(group.graph, (low, high)) for group in context.groups]
    for i in range(len(stored)):
        part = slice(i, i + 1)
        yield (
            (low[part], high[part]),
            (reach[0][part], reach[1][part]),
            [tuple((a[part], b[part]) for a, b in pair) for pair in bounds],  # pyright: ignore
        )


def _placements(
    context: Context, graph: Graph, images: Images, perturbation: Perturbation
) -> Iterator[Derived]:
    """A box for each placement of a patch, a few propagated together."""
    for low, high in inputs.boxes(graph, images, perturbation):
        bounds: list[tuple[Box, Box]] = []
        for group in context.groups:
            parts = [
                logits_box(group.graph, (low[i : i + _TOGETHER], high[i : i + _TOGETHER]))
                for i in range(0, len(low), _TOGETHER)
            ]
            ends = [np.concatenate([p[a][b] for p in parts]) for a in (0, 1) for b in (0, 1)]
            bounds.append(((ends[0], ends[1]), (ends[2], ends[3])))
        yield (low, high), (low, high), bounds


@dataclass(frozen=True, eq=False)
class Facts:
    """What was derived about one line; the lists have an entry for each group.

    ``label`` and ``points``, the logits of the sample: -1 and empty for a query. ``stored`` is what
    a counterexample is the difference to. ``boxes`` int64 [boxes, *input shape], lower and upper
    ends, ``reach`` likewise: see ``Derived``. ``rules``: what must not happen.
    """

    context: Context
    label: int
    stored: Int64Array
    boxes: Box
    reach: Box
    bounds: list[tuple[Box, Box]]
    points: list[Int64Array]
    rules: list[Specification]

    def problems(self, sample: Sample, index: int) -> Iterator[str]:
        """What is wrong with a line."""
        head, classes = self.context.head, self.bounds[0][0][0].shape[1]
        if (sample.index, sample.label) != (index, self.label):
            yield "index or label differs from the data"
            return
        if not self.rules:
            yield f"label {self.label}, yet the model has {classes} logits"
            return
        if sample.method not in _methods(head, sample.verdict):
            yield f"'{sample.verdict}' by method '{sample.method}', which is not among those used"
        if sample.verdict == "error":
            yield "'error', yet it can be treated; certify again"
            return
        yield from _stray(head, sample)
        predicted = int(self.points[0].argmax()) if self.points else -1
        if sample.prediction != predicted:
            yield f"predicted {predicted}, not {sample.prediction}"
        if [(own.lower, own.upper) for own in sample.bounds] != self._witness(sample):
            yield "bounds of the logits differ"
        if sample.verdict == "refuted":
            problem = self._counterexample(sample)
            yield from [problem] if problem else []
        wrong = any(self._wrong(group, None) for group in range(len(self.points)))
        if sample.verdict != "refuted" and wrong:
            yield (
                "'certified' cannot be re-derived: the sample itself is misclassified"
                if sample.verdict == "certified"
                else "'unknown', yet the sample itself is misclassified"
            )
            return
        if head.property.kind == "radius":
            yield from self._radius(sample)
        elif sample.verdict == "certified":
            yield from self._proved(sample)
        elif sample.verdict == "unknown" and not self._open:
            yield "'unknown', yet it can be certified"

    def _witness(self, sample: Sample) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The bounds that a line has to state: over all boxes together."""
        if self.context.head.property.kind == "radius" and sample.radius is None:
            return []
        return [
            (tuple(low.min(axis=0).tolist()), tuple(high.max(axis=0).tolist()))
            for (low, high), _ in self.bounds
        ]

    def _radius(self, sample: Sample) -> Iterator[str]:
        """The radius is certified, and the verdict is what it says about the largest one."""
        largest = int(inputs.rational(self.context.head.property.radius))
        if sample.radius is None:
            if sample.verdict == "certified":
                yield "'certified', yet without a radius"
            return
        if not 0 <= sample.radius <= largest:
            yield f"a radius of {sample.radius}, yet 0..{largest} were searched"
            return
        if (sample.verdict == "certified") != (sample.radius == largest):
            yield f"'{sample.verdict}' at a radius of {sample.radius}, of {largest} searched"
        yield from self._proved(sample)

    # ------------------------------------------------------------------ what is excluded
    @cached_property
    def names(self) -> list[int]:
        """How proofs call the disjuncts: by the rival's logit, or of a query by their number."""
        count = len(self.rules[0].unsafe)
        if self.label < 0:
            return list(range(count))
        return [rival for rival in range(count + 1) if rival != self.label]

    @cached_property
    def _open(self) -> dict[tuple[int, int], set[int]]:
        """By group and box what bounds and margins do not exclude, where that is too much."""
        found: dict[tuple[int, int], set[int]] = {}
        for number, rule in enumerate(self.rules):
            for box in range(len(self.boxes[0])):
                left = {n for i, n in enumerate(self.names) if not self._excluded(number, box, i)}
                if len(left) > rule.allowed:
                    found[number, box] = left
        return found

    def _excluded(self, number: int, box: int, disjunct: int) -> bool:
        """Whether bounds or a margin exclude a disjunct."""
        logits, hidden = ((low[box], high[box]) for low, high in self.bounds[number])
        atoms = self.rules[number].unsafe[disjunct]
        low, high = (end.tolist() for end in logits)
        if any(atom.most(low, high) < atom.bound for atom in atoms):
            return True
        graph = self.context.groups[number].graph
        layer = check_bounds.last_layer(graph)
        pairs = [atom.pair() for atom in atoms] if layer is not None else []
        for pair in pairs:
            if layer is None or pair is None or pair[2] > NEVER:
                continue
            label, rival, gap = pair  # to lead by 0 implies every negative lead
            if check_margin._on_box(graph, layer, hidden, label, rival, max(gap, 0)):  # pyright: ignore[reportPrivateUsage]
                return True
        return False

    def _plain(self) -> bool:
        """Whether stored bounds alone suffice."""
        for rule, ((lows, highs), _) in zip(self.rules, self.bounds, strict=True):
            for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
                if sum(rule.holds_on_bounds(low, high)) < rule.excluded_needed:
                    return False
        return True

    def _proved(self, sample: Sample) -> Iterator[str]:
        """Whether enough is excluded, and by the method that is named."""
        certified = sample.verdict == "certified"
        slow = sample.method in _SLOW if certified else bool(sample.proofs)
        if not slow:
            if self._open:
                yield "'certified' cannot be re-derived"
            elif certified and (sample.method == "interval") != self._plain():
                yield f"certified, but not by method '{sample.method}'"
            return
        proofs = {(proof.group, proof.box, proof.rival): proof for proof in sample.proofs}
        asked = {(*place, name) for place, names in self._open.items() for name in names}
        left = {place: len(names) for place, names in self._open.items()}
        for number, box, _ in proofs.keys() & asked:
            left[number, box] -= 1
        enough = all(count <= self.rules[number].allowed for (number, _), count in left.items())
        if len(proofs) != len(sample.proofs) or not asked or proofs.keys() - asked or not enough:
            yield (
                "'certified' cannot be re-derived: the proofs are not about the "
                f"{len(asked)} rivals that bounds and margins leave open"
            )
            return
        if certified and (sample.method == "linear") != all(map(_is_bound, sample.proofs)):
            yield f"certified, but not by method '{sample.method}'"
        for (number, box, name), proof in proofs.items():
            ends = self.boxes[0][box], self.boxes[1][box]
            disjunct = self.rules[number].unsafe[self.names.index(name)]
            problem = self.context.linear[number].never(ends, disjunct, proof.nodes)
            if problem:
                where = f"rival {name} in group {number}" + (f" on box {box}" if box else "")
                yield f"'certified' cannot be re-derived: {where}: {problem}"

    # ------------------------------------------------------------------ counterexamples
    def _wrong(self, number: int, point: Int64Array | None) -> bool:
        """Whether a point (None: the sample) breaks the claim for sure, under one group."""
        graph = self.context.groups[number].graph
        if point is None:
            logits = self.points[number]
        else:
            logits = logits_box(graph, (point[None], point[None]))[0][0][0]
        if self.label < 0:
            return self.rules[number].violated(logits)
        label, top = np.array([self.label]), self.context.head.property.top
        return bool(decision.surely_wrong(graph, logits[None], label, top)[0])

    def _counterexample(self, sample: Sample) -> str:
        """What is wrong with a refutation, or an empty string."""
        try:
            content = bytes.fromhex(sample.counterexample)
            difference = np.frombuffer(content, "<i2").astype(np.int64)
        except ValueError:
            return "the counterexample is not hexadecimal int16"
        if (sample.method == "sample") != (difference.size == 0):
            return f"a counterexample of {difference.size} elements by method '{sample.method}'"
        if difference.size not in (0, self.stored.size):
            return f"the counterexample has {difference.size} elements, not {self.stored.size}"
        point = self.stored
        if difference.size:
            point = self.stored + difference.reshape(self.stored.shape)
        inside = ((self.reach[0] <= point) & (point <= self.reach[1])).reshape(
            len(self.reach[0]), -1
        )
        if not inside.all(axis=1).any():
            return "the counterexample lies outside the perturbation set"
        for number, group in enumerate(self.context.groups):
            if group.model == sample.model and sample.profile in group.names:
                wrong = self._wrong(number, point)
                return "" if wrong else "the counterexample is classified as labelled"
        return (
            f"the counterexample's profile '{sample.profile}' of model {sample.model} is not among "
            "those certified"
        )


def _methods(head: Head, verdict: str) -> list[str]:
    """The methods that may have led to a verdict, given what the head says was tried."""
    allowed = ["interval", "elided-margin", "none"]
    if head.query is None:
        allowed.append("sample")
    if head.search.attack:
        allowed.append("attack")
    # The search behind linear bounds runs points too, and all of a box that has only a few.
    if head.method != "interval":
        allowed += _SLOW
    return [method for method in certificate.METHODS[verdict] if method in allowed]


def _stray(head: Head, sample: Sample) -> Iterator[str]:
    """Fields that do not belong to the verdict, and proofs of a kind that was not allowed."""
    refuted, is_radius = sample.verdict == "refuted", head.property.kind == "radius"
    if not refuted and (sample.counterexample or sample.profile or sample.model):
        yield f"a counterexample, yet the verdict is '{sample.verdict}'"
    fits = sample.radius is not None if is_radius else sample.verdict == "certified"
    if sample.verdict == "certified":
        fits &= sample.method in _SLOW
    if sample.proofs and not (fits and head.method != "interval"):
        yield f"proofs, yet '{sample.verdict}' by '{sample.method}'"
    if head.method == "linear" and any(len(proof.nodes) != 1 for proof in sample.proofs):
        yield "a tree of cases, yet the strongest method was 'linear'"
    if sample.message and sample.verdict != "unknown":
        yield f"a message, yet the verdict is '{sample.verdict}'"
    if sample.radius is not None and not is_radius:
        yield "a radius, which is not what was claimed"


def _is_bound(proof: Proof) -> bool:
    """Whether it is one linear bound, without cases."""
    node = proof.nodes[0] if len(proof.nodes) == 1 else None
    return isinstance(node, Leaf) and node.method != "points"
