"""Certified robustness against weight faults: single bit flips in a layer's stored tensors.

Profiles that compute the same integers on a model need not do so on a faulty one: a flip widens the
accumulators that its layer can reach. So agreement is proved again over the widened range of each
layer; where it does not hold, every distinct arithmetic of that layer is decided by itself, and a
layer is ``certified`` only if it is under all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

import cactus_edge
from cactus_edge import decision, fault_report, inputs, profiles, universal
from cactus_edge.certify.faults_layer import Layer
from cactus_edge.certify.faults_search import Batch, Effort, Outcome, decide
from cactus_edge.certify.faults_sites import BIAS, Sites, linear_layers, shared
from cactus_edge.certify.faults_suffix import Whole
from cactus_edge.certify.shards import selected
from cactus_edge.constraints import ACCUMULATOR_LIMIT, accumulator_bounds, validate
from cactus_edge.datasets import Dataset
from cactus_edge.errors import DataError, InvalidGraphError, UnsupportedModelError, UsageError
from cactus_edge.execute import check_input, requantize
from cactus_edge.fault_report import Fault, FaultModel, Finding, Report, Sample, Verdict
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Add, Graph, Int64Array, Linear, Requantization
from cactus_edge.inputs import Perturbation
from cactus_edge.operators import Lookup, Mean, Move, Pair

CHUNK = 32
_NO_RADIUS = Perturbation.levels(0)


@dataclass(frozen=True)
class FaultRequest:
    """What to certify: samples ``first`` to ``first + count - 1`` (None: to the end) of ``data``.

    ``layers``: names (None: all that have weights). ``bits``: positions of a weight that may flip.
    ``bias_bits``: how many of the lowest bits of each bias may flip as well. ``profiles`` restricts
    the claim to some runtimes (None: all that cover the model). ``folded``: see
    ``fault_report.FaultModel``.
    """

    data: Dataset
    perturbation: Perturbation = _NO_RADIUS
    layers: tuple[str, ...] | None = None
    bits: tuple[int, ...] = tuple(range(8))
    bias_bits: int = 0
    first: int = 0
    count: int | None = None
    profiles: tuple[str, ...] | None = None
    effort: Effort = Effort()
    folded: bool = False

    def __post_init__(self) -> None:
        """Check the fault model.

        Raises:
            UsageError: no bit, positions that no stored integer has, or a set that is no box of one
                radius.
        """
        if self.perturbation.radii or self.perturbation.patch:
            raise UsageError("weight faults are certified for one radius, without a patch or radii")
        if not self.bits and not self.bias_bits:
            raise UsageError("no bit may flip; name at least one position or bias bit")
        if any(not 0 <= bit < 8 for bit in self.bits) or len(set(self.bits)) != len(self.bits):
            raise UsageError(f"bits {list(self.bits)}: distinct positions from 0 to 7 are needed")
        if not 0 <= self.bias_bits <= 32:
            raise UsageError(f"{self.bias_bits} bias bits; a bias has 32")


@dataclass(frozen=True)
class Group:
    """Profiles that compute the same integers with any fault in ``layers`` (operator indices)."""

    names: tuple[str, ...]
    graph: Graph
    layers: tuple[int, ...]


def covering(
    graph: Graph, faults: FaultModel, names: Sequence[str] | None
) -> tuple[list[Group], tuple[str, ...], dict[str, str]]:
    """The groups of the named profiles (None: all that cover the model) under a fault model.

    Returns:
        (groups, profiles in all, profiles that are not covered with the reason).

    Raises:
        InvalidGraphError: a named profile does not cover the model, or none does.
        UnsupportedModelError: an operator of ``operators``, whose constants may be stored together
            with weights.
        UsageError: no such profile.
    """
    for op in graph.core:
        if isinstance(op, (Lookup, Pair, Mean, Move)) or graph.computes_int16:
            raise UnsupportedModelError(
                f"{op.kind} '{op.name}': faults are not certified for models with this operator"
            )
    uncovered = profiles.uncovered(graph)
    if names is None:
        chosen = tuple(name for name in profiles.PROFILES if name not in uncovered)
    else:
        chosen = tuple(dict.fromkeys(profiles.profile_of(name).name for name in names))
        for name in chosen:
            if name in uncovered:
                raise InvalidGraphError(uncovered[name])
    if not chosen:
        raise InvalidGraphError(next(iter(uncovered.values())))
    resolved = {name: profiles.resolve(graph, name) for name in chosen}
    for candidate in resolved.values():
        validate(candidate)
    skipped = uncovered if names is None else {}
    if not universal.is_universal(graph):
        return _by_integers(resolved, faults.layers), chosen, skipped
    first = resolved[chosen[0]]
    groups: list[Group] = []
    together: list[int] = []
    for index in faults.layers:
        op = graph.operators[index]
        assert isinstance(op, Linear)
        if op.requantization is not None or _agree(
            graph, index, list(resolved.values()), Sites(graph, op, faults)
        ):
            together.append(index)
        else:
            groups += _by_layer(resolved, index)
    if together:
        groups.insert(0, Group(chosen, first, tuple(together)))
    return groups, chosen, skipped


def _by_integers(resolved: dict[str, Graph], layers: tuple[int, ...]) -> list[Group]:
    found: dict[bytes, Group] = {}
    for name, graph in resolved.items():
        parts: list[bytes] = []
        for op in graph.core:
            if isinstance(op, Linear):
                parts.append(_integers(op))
            elif isinstance(op, Add):
                parts.append(repr(op.requantization).encode())
        key = b"|".join(parts)
        names = (*found[key].names, name) if key in found else (name,)
        found[key] = Group(names, found[key].graph if key in found else graph, layers)
    return list(found.values())


def _by_layer(resolved: dict[str, Graph], index: int) -> list[Group]:
    """Groups that differ in one layer; in all others a universal model's profiles agree anyway."""
    found: dict[bytes, Group] = {}
    for name, graph in resolved.items():
        op = graph.operators[index]
        assert isinstance(op, Linear)
        key = _integers(op)
        names = (*found[key].names, name) if key in found else (name,)
        found[key] = Group(names, found[key].graph if key in found else graph, (index,))
    return list(found.values())


def _integers(op: Linear) -> bytes:
    r = op.requantization
    assert r is not None, "graph is not resolved"
    return r.rounding.tobytes() + r.multiplier.tobytes() + r.shift.tobytes()


def _agree(graph: Graph, index: int, resolved: list[Graph], sites: Sites) -> bool:
    """Whether all resolved graphs compute the same in one layer, whatever single site flips.

    Monotone staircases are equal where they are equal on both sides of each step of one of them.
    """
    ops = [candidate.operators[index] for candidate in resolved]
    op = ops[0]
    assert isinstance(op, Linear) and op.requantization is not None
    lower, upper = sites.widened(*accumulator_bounds(graph, op))
    limit = ACCUMULATOR_LIMIT - 1
    lower, upper = np.maximum(lower, -limit), np.minimum(upper, limit)
    zero_point, limits = graph.tensors[op.output].zero_point, graph.output_range(op)
    parameters = op.requantization
    points: list[Int64Array] = []
    for c in range(op.channels):
        parts = (parameters.rounding, parameters.multiplier, parameters.shift)
        one = Requantization(*(part[c : c + 1] for part in parts))
        ends = lower[c : c + 1], upper[c : c + 1]
        points.append(universal.step_points(one, *ends, zero_point, limits))
    steps = np.concatenate(points, axis=1)
    expected = requantize(steps, parameters, zero_point, limits)
    for other in ops[1:]:
        assert isinstance(other, Linear) and other.requantization is not None
        if not np.array_equal(
            requantize(steps, other.requantization, zero_point, limits), expected
        ):
            return False
    return True


class FaultCertifier:
    """Compiled once for a model and a fault model; ``samples`` takes any number of boxes."""

    def __init__(
        self,
        graph: Graph,
        faults: FaultModel,
        names: Sequence[str] | None = None,
        effort: Effort | None = None,
    ) -> None:
        """Resolve, group and compile.

        Raises:
            UnsupportedModelError: the model breaks a constraint or has no twin.
            UsageError: no such profile, or an operator without weights.
        """
        for index in faults.layers:
            inside = 0 <= index < len(graph.operators)
            if not inside or not isinstance(graph.operators[index], Linear):
                raise UsageError(f"operator {index} has no weights")
        self.graph, self.faults, self.effort = graph, faults, effort or Effort()
        self.groups, self.profiles, self.uncovered_profiles = covering(graph, faults, names)
        self._wholes: list[tuple[Whole, list[tuple[int, Layer]]]] = []
        for group in self.groups:
            whole = Whole.of(group.graph)
            layers: list[tuple[int, Layer]] = []
            for index in group.layers:
                op = group.graph.operators[index]
                assert isinstance(op, Linear)
                layers.append((index, Layer(whole, op, Sites(group.graph, op, faults))))
            self._wholes.append((whole, layers))
        self._uncovered = {index: self._reason(index) for index in faults.layers}

    def _reason(self, index: int) -> tuple[int, int, str]:
        """Sites of a layer, how many are not covered, and why."""
        op = self.graph.operators[index]
        assert isinstance(op, Linear)
        sites = Sites(self.graph, op, self.faults)
        if reason := shared(self.graph, op, self.faults):
            return sites.count, sites.count, reason
        reason = "an accumulator may reach 2^27, or a second weight of a channel becomes -128"
        reason = reason if sites.uncovered else ""
        return sites.count, sites.uncovered, reason

    def samples(
        self,
        first: int,
        stored: Int64Array,
        lower: Int64Array,
        upper: Int64Array,
        labels: Int64Array,
    ) -> list[Sample]:
        """A verdict for each sample and layer.

        Args:
            first: index of the first sample, for the report.
            stored: integers [samples, ...], the samples themselves.
            lower: integers, like ``stored``: the boxes' lower ends; ``upper`` likewise.
            upper: see ``lower``.
            labels: integers [samples].

        Raises:
            DataError: arrays that do not fit the model, a sample outside its box, a label without
                a logit.
        """
        for array in (stored, lower, upper):
            check_input(self.graph, array)
        classes = self.graph.tensors[self.graph.logits].size
        fits = stored.shape == lower.shape == upper.shape and labels.shape == (len(stored),)
        if not fits or not ((lower <= stored) & (stored <= upper)).all():
            raise DataError("samples, boxes and labels do not fit each other")
        if labels.size and not (labels.min() >= 0 and labels.max() < classes):
            raise DataError(f"a label is outside 0..{classes - 1}")
        found: dict[int, list[tuple[str, list[Outcome]]]] = {i: [] for i in self.faults.layers}
        wrong = np.zeros(len(labels), bool)
        predictions: Int64Array | None = None
        for group, (whole, layers) in zip(self.groups, self._wholes, strict=True):
            base = whole.bounds(lower, upper)
            points = whole.bounds(stored, stored)
            _, proved = whole.prove(base, labels)
            logits = whole.box(points, self.graph.logits)[0]
            wrong |= decision.surely_wrong(self.graph, logits, labels)
            predictions = decision.predict(logits) if predictions is None else predictions
            batch = Batch(stored, lower, upper, labels, base, points, proved & ~wrong)
            for index, layer in layers:
                if self._uncovered[index][1] == self._uncovered[index][0]:
                    continue
                found[index].append((group.names[0], decide(layer, batch, self.effort)))
        assert predictions is not None
        return [
            self._sample((first + i, int(labels[i]), int(predictions[i])), stored[i], found, i)
            if not wrong[i]
            else Sample(first + i, int(labels[i]), int(predictions[i]), "refuted")
            for i in range(len(labels))
        ]

    def _sample(
        self,
        head: tuple[int, int, int],
        stored: Int64Array,
        found: dict[int, list[tuple[str, list[Outcome]]]],
        position: int,
    ) -> Sample:
        findings: list[Finding] = []
        for index in self.faults.layers:
            sites, uncovered, _ = self._uncovered[index]
            if uncovered == sites:
                findings.append(Finding("unknown"))
                continue
            outcomes = [(name, each[position]) for name, each in found[index]]
            fault = next((_fault(name, o, stored) for name, o in outcomes if o.refutation), None)
            complete = all(o.complete for _, o in outcomes) and not uncovered
            if fault is not None:
                verdict: Verdict = "refuted"
            else:
                verdict = "certified" if complete else "unknown"
            counted = self.faults.counted
            safe = min(o.safe for _, o in outcomes) if counted else 0
            critical = max(o.critical for _, o in outcomes) if counted else 0
            findings.append(Finding(verdict, safe, critical, fault))
        verdict = fault_report.conjunction([f.verdict for f in findings])
        return Sample(*head, verdict, tuple(findings))

    def layers(self, samples: Sequence[Sample]) -> tuple[fault_report.Layer, ...]:
        """The summary of each layer."""
        entries: list[fault_report.Layer] = []
        for position, index in enumerate(self.faults.layers):
            op = self.graph.operators[index]
            groups = tuple(group.names for group in self.groups if index in group.layers)
            verdicts = fault_report.layer_counts(samples, position)
            entries.append(
                fault_report.Layer(
                    index, op.name, op.kind, *self._uncovered[index], groups, verdicts
                )
            )
        return tuple(entries)


def _fault(name: str, outcome: Outcome, stored: Int64Array) -> Fault:
    found = outcome.refutation
    assert found is not None
    difference = found.point - stored
    return Fault(
        tensor="bias" if found.site.tensor == BIAS else "weights",
        index=found.site.index,
        bit=found.site.bit,
        value=found.value,
        flipped=found.flipped,
        profile=name,
        counterexample=difference.astype("<i2").tobytes().hex() if difference.any() else "",
    )


def certify_faults(
    model: bytes,
    request: FaultRequest,
    *,
    file: str = "model.tflite",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Certify a ``.tflite`` file's bytes against single bit flips in its weights.

    Args:
        model: the file as it ships; its SHA-256 is what the report names.
        request: samples, boxes, layers, bits, profiles, effort.
        file: name for messages and for the report.
        progress: called with (samples done, samples in all).

    Returns:
        The report, with its digest; ``fault_report.encode`` makes the file of it.

    Raises:
        UnsupportedModelError: the model cannot be read or certified.
        DataError: the samples do not fit the model.
        UsageError: a range, a layer or a profile that does not exist.
    """
    graph = read_tflite(model, file)
    effort = request.effort
    layers = linear_layers(graph, request.layers)
    bits = tuple(sorted(request.bits))
    faults = FaultModel(layers, bits, request.bias_bits, effort.counted, request.folded)
    certifier = FaultCertifier(graph, faults, request.profiles, effort)
    data = request.data
    about = f"'{data.name}' {data.split}"
    count = selected(request.first, request.count, len(data.labels), about)
    samples: list[Sample] = []
    for start in range(request.first, request.first + count, CHUNK):
        part = slice(start, min(start + CHUNK, request.first + count))
        images, labels = data.images[part], data.labels[part].astype(np.int64)
        stored = inputs.stored(graph, images)
        box = inputs.box(graph, images, request.perturbation)
        samples += certifier.samples(start, stored, *box, labels)
        if progress:
            progress(part.stop - request.first, count)
    report = Report(
        format=fault_report.FORMAT,
        version=fault_report.VERSION,
        tool=f"cactus-edge {cactus_edge.__version__}",
        claim=fault_report.claim(faults),
        model=fault_report.Model(
            file, hashlib.sha256(model).hexdigest(), graph.fingerprint(), len(model)
        ),
        input_map=inputs.input_map(graph).describe(),
        kind="epsilon" if request.perturbation.kind == "epsilon" else "levels",
        radius=str(request.perturbation.radius),
        decision=decision.describe(graph),
        data=fault_report.Data(data.name, data.split, data.sha256, request.first, count),
        faults=faults,
        profiles=certifier.profiles,
        uncovered_profiles=certifier.uncovered_profiles,
        layers=certifier.layers(samples),
        verdicts=fault_report.counts([s.verdict for s in samples]),
        samples=tuple(samples),
    )
    return fault_report.sealed(report)
