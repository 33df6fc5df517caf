"""Samples to look at: image, bounds of the logits at a grid of radii, verdicts, counterexamples.

Each radius of the grid is certified on its own, in integers. A box of a smaller radius lies inside
that of a larger one, so what is certified at a radius is certified at every smaller one; nothing is
said about radii between two of the grid. A counterexample refutes a radius when it lies in the box
of that radius.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import msgspec
import numpy as np

from cactus_edge import inputs
from cactus_edge.certificate import Property, Sample
from cactus_edge.certify import Certifier
from cactus_edge.certify.engine import Group
from cactus_edge.certify.tasks import placed
from cactus_edge.datasets import Dataset, Images
from cactus_edge.errors import DataError, UsageError
from cactus_edge.graph import BoolArray, Graph, Int64Array
from cactus_edge.inputs import InputMap, Perturbation
from cactus_edge.report.sources import Claim, Model

_STEPS = 8
"""Up to the claim's radius; half as many again beyond it."""
_MOST_ROWS = 2000
"""Boxes that are bounded together."""
_MOST_BYTES = 16 << 20
"""Of the page's data about samples."""

Progress = Callable[[int, int], None]


class Step(msgspec.Struct, frozen=True):
    """A radius of the grid: exact, and as a decimal to read."""

    exact: str
    value: float


class Shown(msgspec.Struct, frozen=True):
    """A sample.

    Attributes:
        index: in the data set's split.
        label: right class.
        prediction: of the deployed integers.
        verdict: the certificate's, at the certificate's radius.
        method: that found it.
        message: why it could not be treated.
        certified: largest certified radius of the grid, -1 for none; in levels in a certificate of
            radii, which knows it exactly.
        verdicts: by radius of the grid: c, r or u, for certified, refuted and unknown.
        lower: by radius of the grid, by class: stored logits, over all groups of profiles.
        upper: likewise.
        logits: of the sample, under the first group of profiles.
        image: bytes above the least stored integer, base64.
        counterexample: likewise; empty for none.
        distance: of the counterexample, in stored levels.
        profile: under which it is misclassified.
        wrong: logits of the counterexample under that profile.
    """

    index: int
    label: int
    prediction: int
    verdict: str
    method: str
    message: str
    certified: float
    verdicts: str
    lower: tuple[tuple[int, ...], ...]
    upper: tuple[tuple[int, ...], ...]
    logits: tuple[int, ...]
    image: str
    counterexample: str = ""
    distance: int = 0
    profile: str = ""
    wrong: tuple[int, ...] = ()


class Explorer(msgspec.Struct, frozen=True):
    """All that the page's explorer needs; ``own`` is the place of the claim's radius in ``radii``.

    ``unit``: what radii are counted in. ``shape`` is that of an input without the leading 1,
    ``levels`` the number of stored integers between least and greatest.
    """

    unit: str
    radii: tuple[Step, ...]
    own: int
    shape: tuple[int, ...]
    levels: int
    groups: int
    samples: tuple[Shown, ...]


@dataclass(frozen=True, eq=False)
class Explored:
    """A certifier of the claim's models, with the samples that are shown.

    Attributes:
        certifier: under the claim's profiles.
        images: of the samples, as the data set has them.
        labels: int64 [samples].
        lines: the certificate's, one for each sample.
        perturbation: the claim's own.
    """

    certifier: Certifier
    images: Images
    labels: Int64Array
    lines: tuple[Sample, ...]
    perturbation: Perturbation


def opened(claim: Claim, models: Sequence[Model], data: Dataset, limit: int) -> Explored:
    """The claim's models compiled, and at most ``limit`` of its samples.

    Raises:
        DataError: the data set is another one than the claim's, or does not fit.
        UnsupportedModelError: a model cannot be certified.
    """
    about = claim.head.data
    assert about is not None, "a claim about a query has no samples"
    if data.sha256 != about.sha256:
        raise DataError(
            f"{claim.path}: is about '{about.name}' {about.split} with SHA-256 "
            f"{about.sha256[:12]}..., '{data.name}' {data.split} has {data.sha256[:12]}...; give "
            "the data set that was certified with --data"
        )
    # A universal model has one group, whatever the profiles.
    apart = [a.profiles for a in claim.head.arithmetic if a.rounding == "conjunction"]
    names = apart[0] if apart else None
    certifier = Certifier([m.graph for m in models], names, top=claim.head.property.top)
    lines = claim.samples[:limit]
    chosen = np.array([line.index for line in lines], np.int64)
    images, labels = data.images[chosen], data.labels[chosen].astype(np.int64)
    if [line.label for line in lines] != labels.tolist():
        raise DataError(f"{claim.path}: its labels are not those of '{data.name}' {data.split}")
    return Explored(certifier, images, labels, lines, _at(claim.head.property, Fraction(1)))


def explore(claim: Claim, explored: Explored, *, progress: Progress | None = None) -> Explorer:
    """Bound and judge the samples at each radius of the grid.

    Args:
        claim: the certificate.
        explored: see ``opened``.
        progress: called with (boxes of radii done, in all).

    Raises:
        DataError: the bounds are not the certificate's.
        UsageError: the page would become too large.
    """
    graph = explored.certifier.graph
    mapping = inputs.input_map(graph)
    what = claim.head.property
    factors = _factors(what, mapping)
    size = graph.tensors[graph.core_input].size + 8 * len(factors) * _classes(graph)
    if len(explored.lines) * size > _MOST_BYTES:
        most = max(1, _MOST_BYTES // size)
        raise UsageError(f"{len(explored.lines)} samples make too large a page; --samples {most}")
    grids = [
        _Grid(explored, part, [_at(what, factor) for factor in factors], claim)
        for part in _parts(what, graph, len(explored.lines))
    ]
    shown: list[Shown] = []
    own = factors.index(Fraction(1))
    values = _values(what, factors)
    for number, grid in enumerate(grids):
        shown += grid.shown(values, own)
        if progress:
            progress(number + 1, len(grids))
    return Explorer(
        unit=_unit(what),
        radii=tuple(Step(str(value), float(value)) for value in values),
        own=own,
        shape=graph.tensors[graph.core_input].shape[1:],
        levels=mapping.limits[1] - mapping.limits[0],
        groups=len(explored.certifier.groups),
        samples=tuple(shown),
    )


def _classes(graph: Graph) -> int:
    return graph.tensors[graph.logits].size


def _unit(what: Property) -> str:
    if what.radii:
        return "of the claim's radii"
    return "in units of the input" if what.kind == "epsilon" else "stored levels"


def _values(what: Property, factors: Sequence[Fraction]) -> list[Fraction]:
    """The radii in the claim's unit; factors where each element has a radius of its own."""
    whole = Fraction(1) if what.radii else inputs.rational(what.radius)
    return [factor * whole for factor in factors]


def _factors(what: Property, mapping: InputMap) -> list[Fraction]:
    """Multiples of the claim's radius, ascending from 0, 1 among them."""
    if what.patch:
        return [Fraction(0), Fraction(1)]
    if what.radii:
        return [Fraction(k, 4) for k in range(5)]
    radius = inputs.rational(what.radius)
    if radius == 0:
        return [Fraction(1)]
    greatest = Fraction(1) if what.kind == "epsilon" else Fraction(255)
    if what.kind == "epsilon":
        step = max(mapping.scale, radius / _STEPS)
    else:
        step = Fraction(-(-radius // _STEPS))
    last = radius if what.kind == "radius" else min(radius * 3 / 2, greatest)
    steps = {step * k for k in range(int(last / step) + 1)} | {radius}
    return [value / radius for value in sorted(steps)]


def _at(what: Property, factor: Fraction) -> Perturbation:
    """The claim's set with radii times ``factor``, rounded down where they are levels."""
    epsilon = what.kind == "epsilon"

    def scaled(text: str) -> Fraction:
        value = inputs.rational(text) * factor
        return value if epsilon else Fraction(int(value))

    kind = "epsilon" if epsilon else "levels"
    if what.radii:
        found = Perturbation.each(kind, [scaled(radius) for radius in what.radii])
    else:
        found = Perturbation(kind, scaled(what.radius))
    return found.patched(*what.patch) if what.patch else found


def _parts(what: Property, graph: Graph, count: int) -> Iterator[slice]:
    """Samples that are bounded together."""
    rows = len(inputs.placements(graph, what.patch)) if what.patch else 1
    size = max(1, _MOST_ROWS // rows)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class _Grid:
    """Some samples at each radius."""

    def __init__(
        self, explored: Explored, part: slice, sets: Sequence[Perturbation], claim: Claim
    ) -> None:
        self._certifier = explored.certifier
        self._images, self._labels = explored.images[part], explored.labels[part]
        self._lines, self._sets, self._claim = explored.lines[part], sets, claim
        self._stored = inputs.stored(self._certifier.graph, self._images)
        self._points = self._counterexamples()

    def shown(self, values: Sequence[Fraction], own: int) -> list[Shown]:
        """The samples; ``own`` is the place of the claim's radius."""
        found: list[list[Sample]] = []
        inside: list[BoolArray] = []
        for number, perturbation in enumerate(self._sets):
            boxes = placed(
                self._certifier.graph, self._images, perturbation, self._stored, self._labels
            )
            samples = self._certifier.verdicts(0, *boxes[:4], owner=boxes.owner)
            if number == own:
                self._compare(samples)
            found.append(samples)
            point = self._points[boxes.owner]
            within = ((boxes.lower <= point) & (point <= boxes.upper)).reshape(len(point), -1)
            inside.append(np.logical_or.reduceat(within.all(axis=1), boxes.firsts))
        ends = self._stored
        logits = self._certifier.bounds(ends, ends)[0][0]
        wrong = self._certifier.bounds(self._points, self._points)
        result: list[Shown] = []
        for i, line in enumerate(self._lines):
            column = [samples[i] for samples in found]
            verdicts = self._judged(line, column, [bool(part[i]) for part in inside], own, values)
            certified = verdicts.rfind("c")
            exact = self._claim.head.property.kind == "radius"
            largest = -1.0 if certified < 0 else float(values[certified])
            if exact:
                largest = -1.0 if line.radius is None else float(line.radius)
            made = Shown(
                index=line.index,
                label=line.label,
                prediction=line.prediction,
                verdict=line.verdict,
                method=line.method,
                message=line.message,
                certified=largest,
                verdicts=verdicts,
                lower=tuple(_hull(sample, 0) for sample in column),
                upper=tuple(_hull(sample, 1) for sample in column),
                logits=tuple(logits[i].tolist()),
                image=self._encoded(self._stored[i]),
            )
            if line.verdict == "refuted":
                group = _group(self._certifier.groups, line)
                made = msgspec.structs.replace(
                    made,
                    counterexample=self._encoded(self._points[i]) if line.counterexample else "",
                    distance=int(np.abs(self._points[i] - self._stored[i]).max()),
                    profile=line.profile,
                    wrong=tuple(wrong[group][0][i].tolist()),
                )
            result.append(made)
        return result

    def _counterexamples(self) -> Int64Array:
        """Int64 [samples, ...]: the sample itself where it has none."""
        points = self._stored.copy()
        for i, line in enumerate(self._lines):
            if line.counterexample:
                difference = np.frombuffer(bytes.fromhex(line.counterexample), "<i2")
                points[i] += difference.reshape(points[i].shape)
        return points

    def _encoded(self, stored: Int64Array) -> str:
        least = inputs.input_map(self._certifier.graph).limits[0]
        return base64.b64encode((stored - least).astype(np.uint8).tobytes()).decode()

    def _compare(self, samples: Sequence[Sample]) -> None:
        """What a certificate of one radius says, with what its models say."""
        if self._claim.head.property.kind == "radius":
            return
        for line, sample in zip(self._lines, samples, strict=True):
            if line.verdict == "error":
                continue
            proved = sample.verdict == "certified" and line.verdict != "certified"
            if (line.prediction, line.bounds) != (sample.prediction, sample.bounds) or proved:
                raise DataError(
                    f"{self._claim.path}: sample {line.index}: bounds or verdict are not those of "
                    "the models; see what cactus-edge check says"
                )

    def _judged(
        self,
        line: Sample,
        column: Sequence[Sample],
        inside: Sequence[bool],
        own: int,
        values: Sequence[Fraction],
    ) -> str:
        """A letter for each radius."""
        proved = [sample.verdict == "certified" for sample in column]
        if self._claim.head.property.kind == "radius":
            known = -1 if line.radius is None else line.radius
            proved = [p or value <= known for p, value in zip(proved, values, strict=True)]
        else:
            proved[own] |= line.verdict == "certified"
        broken = [line.verdict == "refuted" and there for there in inside]
        certified = [any(proved[k:]) for k in range(len(proved))]
        if any(c and r for c, r in zip(certified, broken, strict=True)):
            raise AssertionError(f"sample {line.index} is both certified and refuted: a defect")
        return "".join(
            "c" if c else "r" if r else "u" for c, r in zip(certified, broken, strict=True)
        )


def _hull(sample: Sample, end: int) -> tuple[int, ...]:
    """Lower (0) or upper (1) bounds over all groups of profiles."""
    ends = [(bounds.lower, bounds.upper)[end] for bounds in sample.bounds]
    choose = max if end else min
    return tuple(choose(column) for column in zip(*ends, strict=True))


def _group(groups: Sequence[Group], line: Sample) -> int:
    """Number of the group under which a sample was refuted."""
    for number, group in enumerate(groups):
        if group.model == line.model and line.profile in group.names:
            return number
    raise DataError(f"sample {line.index}: no model rounds as '{line.profile}'")
