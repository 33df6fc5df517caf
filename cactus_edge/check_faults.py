"""The independent checker of reports on weight faults: from model, data and report alone.

Re-derives every ``certified`` and every ``refuted``, and in a counted report the numbers of safe
and critical sites as well. ``unknown`` claims nothing. Shares no code with the certifier; bounds
are those of ``check_flips``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cactus_edge import check_faults_claim as claim
from cactus_edge import decision, fault_report, inputs, profiles
from cactus_edge.check_bounds import logits_box
from cactus_edge.check_flips import (
    Box,
    FlippedLayer,
    Values,
    all_values,
    by_channel,
    flipped,
    holds,
    width,
)
from cactus_edge.constraints import validate
from cactus_edge.datasets import Dataset
from cactus_edge.errors import InvalidGraphError
from cactus_edge.fault_report import Fault, Finding, Report, Sample
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import BoolArray, Graph, Int64Array

_CHUNK = 16


@dataclass(frozen=True)
class FaultCheck:
    """``problems`` is empty when the report holds."""

    samples: int
    problems: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems


def check_faults(
    report: Report,
    model: bytes,
    data: Dataset,
    *,
    progress: Callable[[int, int], None] | None = None,
    most: int = 20,
) -> FaultCheck:
    """Recompute a report.

    Args:
        report: as loaded.
        model: the bytes of the ``.tflite`` file.
        data: the split that the report names.
        progress: called with (samples done, samples in all).
        most: stop after this many problems.

    Raises:
        UnsupportedModelError: the model cannot be read.
    """
    graph = read_tflite(model, report.model.file)
    problems = [*claim.head(report, model, graph, data)]
    problems = problems or [*claim.layers(report, graph)]
    if problems:
        return FaultCheck(0, tuple(problems[:most]))
    first, count = report.data.first, report.data.count
    around = claim.perturbation(report)
    deciders = [_Decider(report, graph, position) for position in range(len(report.layers))]
    done = 0
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        images = data.images[first + part.start : first + part.stop]
        labels = data.labels[first + part.start : first + part.stop].astype(np.int64)
        stored = inputs.stored(graph, images)
        box = inputs.box(graph, images, around)
        chosen = report.samples[part]
        problems += _samples(graph, deciders, first + start, chosen, stored, box, labels)
        done = part.stop
        if progress:
            progress(done, count)
        if len(problems) >= most:
            break
    return FaultCheck(done, tuple(problems[:most]))


class _Decider:
    """One layer under each of its groups."""

    def __init__(self, report: Report, graph: Graph, position: int) -> None:
        self.entry = report.layers[position]
        self.counted = report.faults.counted
        self.resolved = [profiles.resolve(graph, group[0]) for group in self.entry.groups]
        for candidate in self.resolved:
            validate(candidate)
        index = self.entry.operator
        self.layers = [FlippedLayer(g, index, report.faults) for g in self.resolved]
        first = self.layers[0]
        self.covered = sum(int(s.covered.sum()) for s in first.flips)

    def counts(
        self, sample: int, values: list[Values], points: list[Values], label: int
    ) -> tuple[bool, int, int]:
        """Every covered site is safe under every group; safe and critical sites."""
        complete, safe, critical = True, self.covered, 0
        for layer, box, point in zip(self.layers, values, points, strict=True):
            found = _decide(layer, box, point, sample, label, self.covered)
            complete = complete and found[0] == self.covered
            safe, critical = min(safe, found[0]), max(critical, found[1])
            if not complete and not self.counted:
                break
        return complete, safe, critical


def _decide(
    layer: FlippedLayer, box: Values, points: Values, sample: int, label: int, covered: int
) -> tuple[int, int]:
    """Safe sites, and those that change the decision on the sample itself."""
    graph = layer.graph
    logits = tuple(end[sample].reshape(-1) for end in box[graph.logits])
    hidden_of = layer.source if layer.source is not None else graph.logits
    hidden = tuple(end[sample].reshape(-1) for end in box[hidden_of])
    if not holds(graph, (logits[0], logits[1]), (hidden[0], hidden[1]), label):
        return 0, 0
    if not layer.reaches:
        return covered, 0
    hull = layer.hulls(box, sample)
    every = np.arange(layer.op.channels)
    good = layer.proved(box, sample, every, hull, label)
    safe, critical = 0, 0
    for channel in every.tolist():
        count = int(layer.flips[channel].covered.sum())
        if good[channel] or not count:
            safe += count
            continue
        ends = (layer.stored(end, channel) for end in layer.faulty(box, sample, channel))
        proved = _divide(layer, box, sample, channel, (*ends,), label)  # pyright: ignore
        safe += int(proved.sum())
        low, _ = layer.faulty(points, sample, channel)
        rest = layer.stored(low[~proved], channel)
        rows, inverse = np.unique(rest, axis=0, return_inverse=True)
        wrong = layer.wrong(points, sample, np.full(len(rows), channel), rows, label)
        critical += int(wrong[inverse.reshape(-1)].sum()) if len(rows) else 0
    return safe, critical


def _divide(
    layer: FlippedLayer, box: Values, sample: int, channel: int, ends: Box, label: int
) -> BoolArray:
    """Bool [covered sites]: proved, in ever smaller sets of distinct outputs."""
    rows, inverse = np.unique(np.concatenate(ends, axis=1), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    rows = rows[order := np.argsort(rows.sum(axis=1), kind="stable")]
    low, high = rows[:, : layer.positions], rows[:, layer.positions :]
    proved = np.zeros(len(rows), bool)
    open_ = [(0, len(rows))]
    while open_:
        least = np.stack([low[a:b].min(axis=0) for a, b in open_])
        most = np.stack([high[a:b].max(axis=0) for a, b in open_])
        good = layer.proved(box, sample, np.full(len(open_), channel), (least, most), label)
        left: list[tuple[int, int]] = []
        for (a, b), holds_here in zip(open_, good.tolist(), strict=True):
            if holds_here:
                proved[a:b] = True
            elif b - a > 1:
                left += [(a, (a + b) // 2), ((a + b) // 2, b)]
        open_ = left
    back = np.empty_like(order)
    back[order] = np.arange(order.size)
    by_site = proved[back[inverse]]
    covered = np.flatnonzero(layer.flips[channel].covered)
    if layer.is_last:
        for i in np.flatnonzero(~by_site).tolist():
            row = ends[0][i], ends[1][i]
            by_site[i] = layer.margin(box, sample, channel, int(covered[i]), row, label)
    return by_site


def _samples(
    graph: Graph,
    deciders: list[_Decider],
    first: int,
    samples: tuple[Sample, ...],
    stored: Int64Array,
    box: Box,
    labels: Int64Array,
) -> list[str]:
    """Problems of a chunk of samples."""
    known: dict[str, tuple[Values, Values]] = {}
    values: list[tuple[list[Values], list[Values]]] = []
    for decider in deciders:
        both: tuple[list[Values], list[Values]] = [], []
        for resolved, group in zip(decider.resolved, decider.entry.groups, strict=True):
            if group[0] not in known:
                pair = all_values(resolved, box), all_values(resolved, (stored, stored))
                known[group[0]] = pair
            both[0].append(known[group[0]][0])
            both[1].append(known[group[0]][1])
        values.append(both)
    logits = {n: p[graph.logits][0].reshape(len(labels), -1) for n, (_, p) in known.items()}
    classes = graph.tensors[graph.logits].size
    fits = (labels >= 0) & (labels < classes)
    safe_labels = np.where(fits, labels, 0)
    wrong = np.any([decision.surely_wrong(graph, q, safe_labels) for q in logits.values()], axis=0)
    predictions = decision.predict(logits[deciders[0].entry.groups[0][0]])
    problems: list[str] = []
    for i, sample in enumerate(samples):
        where = f"sample {first + i}"
        if (sample.index, sample.label) != (first + i, int(labels[i])) or not fits[i]:
            problems.append(f"{where}: index or label differs from the data")
            continue
        if sample.prediction != int(predictions[i]):
            problems.append(f"{where}: predicted {predictions[i]}, not {sample.prediction}")
        if not sample.findings:
            if sample.verdict != "refuted" or not wrong[i]:
                problems.append(f"{where}: no findings, yet it is not misclassified by itself")
            continue
        if wrong[i]:
            problems.append(f"{where}: it has findings, yet it is misclassified by itself")
            continue
        if sample.verdict != fault_report.conjunction([f.verdict for f in sample.findings]):
            problems.append(f"{where}: the verdict does not follow from its findings")
        for decider, both, finding in zip(deciders, values, sample.findings, strict=True):
            problem = _finding(decider, finding, i, both, stored[i], (box[0][i], box[1][i]), sample)
            problems += [f"{where}, layer '{decider.entry.name}': {problem}"] if problem else []
    return problems


def _finding(
    decider: _Decider,
    finding: Finding,
    position: int,
    values: tuple[list[Values], list[Values]],
    stored: Int64Array,
    box: Box,
    sample: Sample,
) -> str:
    """What is wrong with a finding, or an empty string."""
    if (finding.fault is not None) != (finding.verdict == "refuted"):
        return "a fault is named if and only if the layer is refuted"
    if finding.fault is not None and (
        problem := _fault(decider, finding.fault, stored, box, sample.label)
    ):
        return problem
    if finding.verdict == "refuted" and decider.entry.uncovered == decider.entry.sites:
        return "'refuted', yet no site is covered"
    if finding.verdict == "certified" and decider.entry.uncovered:
        return "'certified', yet sites are not covered"
    if not decider.counted and (finding.safe or finding.critical):
        return "sites are counted, yet the report is not a counted one"
    if finding.safe < 0 or finding.critical < 0:
        return "a number of sites is negative"
    if finding.verdict != "certified" and not decider.counted:
        return ""
    complete, safe, critical = decider.counts(position, *values, sample.label)
    if finding.verdict == "certified" and not complete:
        return "'certified' cannot be re-derived"
    if finding.safe > safe or finding.critical > critical:
        return f"{safe} sites are safe and {critical} critical, fewer than stated"
    return ""


def _fault(decider: _Decider, fault: Fault, stored: Int64Array, box: Box, label: int) -> str:
    """What is wrong with a refutation, or an empty string."""
    chosen = [i for i, group in enumerate(decider.entry.groups) if fault.profile in group]
    if not chosen:
        return f"profile '{fault.profile}' is not among those of the report"
    layer = decider.layers[chosen[0]]
    channel, column = _place(layer, fault)
    if channel < 0:
        return f"{fault.tensor} have no element {fault.index}"
    sites = layer.flips[channel]
    match = (sites.column == column) & (sites.bit == fault.bit) & sites.covered
    if not match.any():
        return f"bit {fault.bit} of {fault.tensor}[{fault.index}] is not a covered site"
    size = 32 if fault.tensor == "bias" else width(layer.op.weights)
    value = int(layer.op.bias[channel]) if column < 0 else int(layer.weights[channel, column])
    if (fault.value, fault.flipped) != (value, flipped(value, fault.bit, size)):
        return f"{fault.tensor}[{fault.index}] is {value}, or the flip makes another integer of it"
    try:
        difference = np.frombuffer(bytes.fromhex(fault.counterexample), "<i2").astype(np.int64)
    except ValueError:
        return "the counterexample is not hexadecimal int16"
    if difference.size not in (0, stored.size):
        return f"the counterexample has {difference.size} elements, not {stored.size}"
    point = stored + difference.reshape(stored.shape) if difference.size else stored
    if not ((box[0] <= point) & (point <= box[1])).all():
        return "the counterexample lies outside the box"
    element = "bias" if column < 0 else "weights", fault.index
    graph = layer.faulty_graph(channel, element, fault.flipped)
    try:
        validate(graph)
    except InvalidGraphError as error:
        return f"the faulty model breaks a side condition: {error}"
    logits = logits_box(graph, (point[None], point[None]))[0][0]
    wrong = decision.surely_wrong(graph, logits, np.array([label]))[0]
    return "" if wrong else "the fault does not change the decision"


def _place(layer: FlippedLayer, fault: Fault) -> tuple[int, int]:
    """Channel and column of a fault's element, column -1 for a bias; (-1, -1) for none."""
    channels, columns = by_channel(layer.op).shape
    if fault.tensor == "bias":
        return (fault.index, -1) if 0 <= fault.index < channels else (-1, -1)
    if not 0 <= fault.index < channels * columns:
        return -1, -1
    places = np.arange(channels * columns)
    if layer.op.kind == "DEPTHWISE_CONV_2D":
        index = places.reshape(columns, channels).T
    else:
        index = places.reshape(channels, columns)
    channel, column = np.argwhere(index == fault.index)[0].tolist()
    return channel, column
