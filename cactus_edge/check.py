"""The independent checker: re-derives every line of a certificate from model and data alone.

The trusted base is this file and ``check_bounds`` with ``graph``, ``semantics`` and the tables they
read; it shares no code with the certifier, the executors or the kernels, and uses no float and no
compiled code. Its interval propagation differs from the certifier's on purpose: not a doubled
network, but sums and radii.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cactus_edge import certificate, decision, inputs, profiles, semantics, universal
from cactus_edge.certificate import Certificate, Sample
from cactus_edge.check_bounds import Box, last_layer, logits_box
from cactus_edge.constraints import validate
from cactus_edge.datasets import Dataset, Images
from cactus_edge.errors import UsageError
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import (
    Graph,
    Int64Array,
    Linear,
    Requantization,
)
from cactus_edge.semantics import Rounding

_CHUNK = 250


@dataclass(frozen=True)
class CheckResult:
    """``problems`` is empty when the certificate holds."""

    samples: int
    problems: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems


def check(
    claim: Certificate,
    model: bytes,
    data: Dataset,
    *,
    progress: Callable[[int, int], None] | None = None,
    most: int = 20,
) -> CheckResult:
    """Recompute a certificate.

    Args:
        claim: the certificate as loaded.
        model: the bytes of the ``.tflite`` file.
        data: the split that the certificate names.
        progress: called with (samples done, samples in all).
        most: stop after this many problems.

    Raises:
        UnsupportedModelError: the model cannot be read.
    """
    graph = read_tflite(model, claim.model.file)
    problems = list(_head(claim, model, graph, data))
    if problems:
        return CheckResult(0, tuple(problems))
    groups = _groups(graph, claim.arithmetic.profiles)
    first, count = claim.data.first, claim.data.count
    done = 0
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        images = data.images[first + part.start : first + part.stop]
        labels = data.labels[first + part.start : first + part.stop].astype(np.int64)
        problems += _samples(
            claim, graph, groups, claim.samples[part], images, labels, first + start
        )
        done = part.stop
        if progress:
            progress(done, count)
        if len(problems) >= most:
            break
    return CheckResult(done, tuple(problems[:most]))


def _head(claim: Certificate, model: bytes, graph: Graph, data: Dataset) -> Iterator[str]:
    """Everything but the samples."""
    if claim.digest != certificate.digest(claim):
        yield "digest: the certificate was changed after it was written"
    sha256 = hashlib.sha256(model).hexdigest()
    if (claim.model.sha256, claim.model.bytes) != (sha256, len(model)):
        yield f"model: the certificate is about sha256 {claim.model.sha256}, the file has {sha256}"
    if claim.model.fingerprint != graph.fingerprint():
        yield "model: the fingerprint of the arithmetic differs"
    rounding = "universal" if universal.is_universal(graph) else "conjunction"
    if claim.arithmetic.rounding != rounding:
        yield f"arithmetic: claimed '{claim.arithmetic.rounding}', the model is '{rounding}'"
    names = claim.arithmetic.profiles
    unknown = [name for name in names if name not in profiles.PROFILES]
    if not names or unknown or len(set(names)) != len(names):
        yield f"arithmetic: profiles {list(names)} are not distinct known profiles"
    covering = set(profiles.PROFILES) - set(profiles.uncovered(graph))
    if not set(names) <= covering:
        yield f"arithmetic: profiles {sorted(set(names) - covering)} do not cover the model"
    if rounding == "universal" and set(names) != covering:
        yield "arithmetic: a universal model is certified for every profile that covers it"
    if claim.input_map != inputs.input_map(graph).describe():
        yield "input map: differs from the model's"
    rule = decision.describe(graph)
    if claim.property.decision != rule:
        yield f"decision rule: claimed '{claim.property.decision}', the model's is '{rule}'"
    try:
        _perturbation(claim)
    except UsageError as error:
        yield f"property: {error}"
    stated = (claim.verifier, claim.side_conditions)
    if stated != (certificate.VERIFIER, certificate.SIDE_CONDITIONS):
        yield "verifier or side conditions: not those of this format"
    if claim.data.sha256 != data.sha256 or claim.data.split != data.split:
        yield f"data: the certificate is about {claim.data.name} {claim.data.split} of another hash"
    if claim.data.name != data.name:
        yield f"data: the certificate is about '{claim.data.name}', this is '{data.name}'"
    unread = profiles.uncovered(graph)
    if any(unread.get(name) != reason for name, reason in claim.arithmetic.uncovered.items()):
        yield "arithmetic: 'uncovered' names a profile that covers the model, or another reason"
    if claim.how_to_check != certificate.how_to_check(claim.model.file, claim.data.name):
        yield "how_to_check: not the text of this format"
    last = claim.data.first + claim.data.count
    fits = 0 <= claim.data.first < last <= len(data.labels)
    if not fits or len(claim.samples) != claim.data.count:
        yield f"data: {len(claim.samples)} samples for range {claim.data.first}..{last - 1}"
    attacked = claim.summary.attack_accuracy is not None
    if claim.summary != certificate.summarize(claim.samples, attacked):
        yield "summary: does not follow from the samples"


def _perturbation(claim: Certificate) -> inputs.Perturbation:
    """The claimed perturbation set; raises UsageError where there is no such set."""
    radius = claim.property.radius
    if claim.property.kind == "epsilon":
        return inputs.Perturbation.epsilon(radius)
    if not radius.isdecimal():
        raise UsageError(f"'{radius}' is not a number of levels")
    return inputs.Perturbation.levels(int(radius))


def _groups(graph: Graph, names: tuple[str, ...]) -> list[tuple[Graph, tuple[str, ...]]]:
    """Resolved graphs with the profiles they stand for, in the order of the claim."""
    if universal.is_universal(graph):
        return [(_resolved(graph, profiles.DEFAULT), names)]
    found: list[tuple[Graph, tuple[str, ...]]] = []
    seen: dict[str, int] = {}
    for name in names:
        resolved = _resolved(graph, name)
        key = resolved.fingerprint()
        if key in seen:
            known, together = found[seen[key]]
            found[seen[key]] = (known, (*together, name))
        else:
            seen[key] = len(found)
            found.append((resolved, (name,)))
    return found


def _resolved(graph: Graph, name: str) -> Graph:
    resolved = profiles.resolve(graph, name)
    validate(resolved)
    return resolved


def _samples(
    claim: Certificate,
    graph: Graph,
    groups: list[tuple[Graph, tuple[str, ...]]],
    samples: tuple[Sample, ...],
    images: Images,
    labels: Int64Array,
    first: int,
) -> list[str]:
    stored = inputs.stored(graph, images)
    box = inputs.box(graph, images, _perturbation(claim))
    points = [logits_box(resolved, (stored, stored))[0][0] for resolved, _ in groups]
    bounds = [logits_box(resolved, box) for resolved, _ in groups]
    classes = graph.tensors[graph.logits].size
    known = np.clip(labels, 0, classes - 1)
    misclassified = [decision.surely_wrong(graph, point, known) for point in points]
    problems: list[str] = []
    for i, sample in enumerate(samples):
        where = f"sample {first + i}"
        if (sample.index, sample.label) != (first + i, int(labels[i])):
            problems.append(f"{where}: index or label differs from the data")
            continue
        if not 0 <= sample.label < classes:
            problems.append(f"{where}: label {sample.label}, yet the model has {classes} logits")
            continue
        if sample.method not in certificate.METHODS.get(sample.verdict, (sample.method,)):
            problems.append(f"{where}: '{sample.verdict}' by unknown method '{sample.method}'")
        if sample.verdict == "error":
            problems.append(f"{where}: 'error', yet it can be treated; certify again")
            continue
        wrong = [bool(w[i]) for w in misclassified]
        if sample.prediction != int(points[0][i].argmax()):
            problems.append(f"{where}: predicted {points[0][i].argmax()}, not {sample.prediction}")
        if [(b.lower, b.upper) for b in sample.bounds] != [
            (tuple(low[i].tolist()), tuple(high[i].tolist())) for (low, high), _ in bounds
        ]:
            problems.append(f"{where}: bounds of the logits differ")
        own = [(hidden[0][i], hidden[1][i]) for _, hidden in bounds]
        resolved = [g for g, _ in groups]
        if sample.verdict == "certified":
            if any(wrong) or not all(
                _holds(g, (low[i], high[i]), h, sample.label)
                for g, ((low, high), _), h in zip(resolved, bounds, own, strict=True)
            ):
                problems.append(f"{where}: 'certified' cannot be re-derived")
        elif sample.verdict == "refuted":
            problem = _counterexample(graph, groups, sample, stored[i], (box[0][i], box[1][i]))
            problems += [f"{where}: {problem}"] if problem else []
        elif any(wrong):
            problems.append(f"{where}: '{sample.verdict}', yet the sample itself is misclassified")
        elif all(
            _holds(g, (low[i], high[i]), h, sample.label)
            for g, ((low, high), _), h in zip(resolved, bounds, own, strict=True)
        ):
            problems.append(f"{where}: '{sample.verdict}', yet it can be certified")
    return problems


def _counterexample(
    graph: Graph,
    groups: list[tuple[Graph, tuple[str, ...]]],
    sample: Sample,
    stored: Int64Array,
    box: Box,
) -> str:
    """What is wrong with a refutation, or an empty string."""
    try:
        difference = np.frombuffer(bytes.fromhex(sample.counterexample), "<i2").astype(np.int64)
    except ValueError:
        return "the counterexample is not hexadecimal int16"
    if difference.size not in (0, stored.size):
        return f"the counterexample has {difference.size} elements, not {stored.size}"
    point = stored + difference.reshape(stored.shape) if difference.size else stored
    if not ((box[0] <= point) & (point <= box[1])).all():
        return "the counterexample lies outside the perturbation set"
    chosen = [resolved for resolved, names in groups if sample.profile in names]
    if not chosen:
        return f"the counterexample's profile '{sample.profile}' is not among those certified"
    logits = logits_box(chosen[0], (point[None], point[None]))[0][0]
    wrong = decision.surely_wrong(graph, logits, np.array([sample.label]))
    return "" if wrong[0] else "the counterexample is classified as labelled"


def _holds(graph: Graph, logits: Box, hidden: Box, label: int) -> bool:
    """Whether the label wins everywhere: by its stored bounds, or through the last layer."""
    lower, upper = logits
    gaps = decision.gaps(graph, label, lower.size)
    rivals = np.flatnonzero(lower[label] < upper + gaps)
    rivals = rivals[rivals != label]
    if not rivals.size:
        return True
    layer = last_layer(graph)
    if layer is None:
        return False
    return all(_margin(graph, layer, hidden, label, int(j), int(gaps[j])) for j in rivals)


def _margin(graph: Graph, op: Linear, hidden: Box, label: int, rival: int, gap: int) -> bool:
    """``q_label >= q_rival + gap`` for all inputs, step by step of the rival's staircase.

    With positive integers p, ``p_label * a_label - p_rival * a_rival`` is at least its exact
    minimum over the box, which bounds ``a_label`` from below for each value of ``a_rival``.
    """
    zero_point = graph.tensors[op.inputs[0]].zero_point
    low, high = (end - zero_point for end in hidden)
    weights = op.weights.values.astype(np.int64).reshape(op.channels, -1)
    parameters = op.requantization
    assert parameters is not None
    own, other = _units(parameters, label, rival)

    def extremes(row: Int64Array, constant: int) -> tuple[int, int]:
        ends = np.stack([row * low, row * high])
        return int(ends.min(axis=0).sum()) + constant, int(ends.max(axis=0).sum()) + constant

    bias = [int(b) for b in op.bias]
    least_own, most_own = extremes(weights[label], bias[label])
    least, most = extremes(weights[rival], bias[rival])
    combined = own * weights[label] - other * weights[rival]
    margin, _ = extremes(combined, own * bias[label] - other * bias[rival])
    limits = graph.output_range(op)
    target = graph.tensors[op.output].zero_point

    def logit(channel: int, accumulator: int) -> int:
        rule = semantics.REQUANTIZE[Rounding(int(parameters.rounding[channel]))]
        multiplier, shift = int(parameters.multiplier[channel]), int(parameters.shift[channel])
        return semantics.clamp(rule(accumulator, multiplier, shift) + target, *limits)

    point = least
    while True:
        bound = -(-(margin + other * point) // own)
        bound = min(max(bound, least_own), most_own)
        level = logit(rival, point)
        if logit(label, bound) < level + gap:
            return False
        if logit(rival, most) == level:
            return True
        above = point
        step = most
        while above + 1 < step:
            middle = (above + step) >> 1
            above, step = (above, middle) if logit(rival, middle) > level else (middle, step)
        point = step


def _units(parameters: Requantization, label: int, rival: int) -> tuple[int, int]:
    """The two multipliers in common units, rounded to integers; 1 and 1 where they are equal."""
    factors: list[Fraction] = []
    for multiplier, shift, code in zip(
        parameters.multiplier.tolist(),
        parameters.shift.tolist(),
        parameters.rounding.tolist(),
        strict=True,
    ):
        double = code in (Rounding.DOUBLE_HALF_AWAY, Rounding.DOUBLE_HALF_UP)
        factors.append(Fraction(multiplier, 1 << (shift + 31 if double else shift)))
    largest = max(factors)
    if min(factors) == largest:
        return 1, 1
    shares = [factors[c] / largest for c in (label, rival)]  # exact: Fractions
    own, other = (max(1, round(share * 4096)) for share in shares)
    return own, other
