"""The part of the fault checker that looks at everything but the samples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np

from cactus_edge import decision, fault_report, inputs, profiles, semantics, universal
from cactus_edge.check_flips import Box, flips, largest_input, offset, width
from cactus_edge.constraints import ACCUMULATOR_LIMIT, accumulator_bounds
from cactus_edge.datasets import Dataset
from cactus_edge.errors import UsageError
from cactus_edge.fault_report import Report
from cactus_edge.graph import Graph, Int64Array, Linear, Pad, Requantization
from cactus_edge.inputs import Perturbation
from cactus_edge.operators import Lookup, Mean, Move, Pair
from cactus_edge.semantics import Rounding

_TOOL = re.compile(r"cactus-edge [0-9A-Za-z.+-]{1,40}")


def perturbation(report: Report) -> Perturbation:
    """The box around each sample.

    Raises:
        UsageError: the report states none.
    """
    if report.kind == "epsilon":
        return Perturbation.epsilon(report.radius)
    if not re.fullmatch("[0-9]{1,4}", report.radius):
        raise UsageError(f"'{report.radius}' is not a number of levels")
    return Perturbation.levels(int(report.radius))


def head(report: Report, model: bytes, graph: Graph, data: Dataset) -> Iterator[str]:
    """Everything but layers and samples."""
    if (report.format, report.version) != (fault_report.FORMAT, fault_report.VERSION):
        yield f"format: {report.format!r} version {report.version} is none that this tool reads"
    if not _TOOL.fullmatch(report.tool):
        yield "tool: no name and version of a tool"
    if report.digest != fault_report.digest(report):
        yield "digest: the report was changed after it was written"
    if (report.model.sha256, report.model.bytes) != (hashlib.sha256(model).hexdigest(), len(model)):
        yield "model: the report is about another file"
    if report.model.fingerprint != graph.fingerprint():
        yield "model: the fingerprint of the arithmetic differs"
    if report.claim != fault_report.claim(report.faults):
        yield "claim: not the text of this format"
    if report.input_map != inputs.input_map(graph).describe():
        yield "input map: differs from the model's"
    if report.decision != decision.describe(graph):
        yield "decision rule: differs from the model's"
    try:
        perturbation(report)
    except UsageError as error:
        yield f"box: {error}"
    if (report.data.name, report.data.split) != (data.name, data.split):
        yield f"data: the report is about '{report.data.name}' {report.data.split}"
    if report.data.sha256 != data.sha256:
        yield "data: the report is about data of another hash"
    first, last = report.data.first, report.data.first + report.data.count
    if not 0 <= first < last <= len(data.labels) or len(report.samples) != report.data.count:
        yield f"data: {len(report.samples)} samples for range {first}..{last - 1}"
    outside = profiles.uncovered(graph)
    names = report.profiles
    if not names or len(set(names)) != len(names) or not set(names) <= set(profiles.PROFILES):
        yield f"profiles: {list(names)} are not distinct known profiles"
    elif set(names) & set(outside):
        yield f"profiles: {sorted(set(names) & set(outside))} do not cover the model"
    if any(outside.get(name) != reason for name, reason in report.uncovered_profiles.items()):
        yield "profiles: one is called uncovered that covers the model, or for another reason"
    if report.verdicts != fault_report.counts([s.verdict for s in report.samples]):
        yield "verdicts: the numbers do not follow from the samples"


def layers(report: Report, graph: Graph) -> Iterator[str]:
    """Fault model, sites, coverage and groups of each layer."""
    faults = report.faults
    bits = list(faults.bits)
    if bits != sorted(set(bits)) or not set(bits) <= set(range(8)):
        yield f"faults: bits {bits} are not ascending positions from 0 to 7"
        return
    if not 0 <= faults.bias_bits <= 32 or not (bits or faults.bias_bits):
        yield f"faults: {faults.bias_bits} bias bits and {len(bits)} weight bits"
        return
    for op in graph.core:
        if isinstance(op, (Lookup, Pair, Mean, Move)):
            yield f"model: faults are not certified beside {op.kind} '{op.name}'"
            return
    known = {i for i, op in enumerate(graph.operators) if isinstance(op, Linear)}
    indices = list(faults.layers)
    if not indices or len(set(indices)) != len(indices) or not set(indices) <= known:
        yield f"faults: {indices} are not distinct operators with weights"
        return
    if [layer.operator for layer in report.layers] != indices:
        yield "layers: not those of the fault model"
        return
    for sample in report.samples:
        if len(sample.findings) not in (0, len(indices)):
            yield f"sample {sample.index}: its findings do not fit the layers"
            return
    resolved = {name: profiles.resolve(graph, name) for name in report.profiles}
    same_everywhere = universal.is_universal(graph)
    for position, layer in enumerate(report.layers):
        op = graph.operators[layer.operator]
        assert isinstance(op, Linear)
        where = f"layer {layer.operator}"
        if (layer.name, layer.kind) != (op.name, op.kind):
            yield f"{where}: it is {op.kind} '{op.name}'"
        sites = [flips(graph, op, faults, c) for c in range(op.channels)]
        uncovered = sum(int((~s.covered).sum()) for s in sites)
        total = sum(s.covered.size for s in sites)
        if equal_constants(graph, op, bool(bits), faults.bias_bits > 0):
            uncovered = total
        if (layer.sites, layer.uncovered) != (total, uncovered):
            yield f"{where}: {total} sites, {uncovered} of them not covered; stated otherwise"
        if bool(layer.reason) != bool(uncovered):
            yield f"{where}: a reason is stated if and only if sites are not covered"
        if layer.verdicts != fault_report.layer_counts(report.samples, position):
            yield f"{where}: the numbers of verdicts do not follow from the samples"
        if sorted(name for group in layer.groups for name in group) != sorted(report.profiles):
            yield f"{where}: the groups are no partition of the profiles"
            continue
        for group in layer.groups:
            graphs = [resolved[name] for name in group]
            if not _agree(graph, layer.operator, graphs, same_everywhere, report):
                yield f"{where}: profiles {list(group)} differ on a faulty layer"


def equal_constants(graph: Graph, op: Linear, with_weights: bool, with_bias: bool) -> bool:
    """Whether another constant has the same bytes as one that flips; a file may store it once."""
    found: list[bytes] = []
    for other in graph.core:
        if isinstance(other, Pad):
            pairs = [extent for pair in other.paddings for extent in pair]
            found += [b"".join(n.to_bytes(size, "little") for n in pairs) for size in (4, 8)]
        if isinstance(other, Linear):
            found += [_stored_weights(other), _stored_bias(other)]
    mine = [_stored_weights(op)] if with_weights else []
    mine += [_stored_bias(op)] if with_bias else []
    return any(found.count(constant) > 1 for constant in mine)


def _stored_weights(op: Linear) -> bytes:
    values = op.weights.values.reshape(-1).tolist()
    if width(op.weights) == 8:
        return bytes(v % 256 for v in values)
    values += [0] * (len(values) % 2)
    return bytes(a % 16 + 16 * (b % 16) for a, b in zip(values[::2], values[1::2], strict=True))


def _stored_bias(op: Linear) -> bytes:
    return b"".join(v.to_bytes(4, "little", signed=True) for v in op.bias.tolist())


def _agree(
    graph: Graph, index: int, resolved: list[Graph], same_everywhere: bool, report: Report
) -> bool:
    """Whether resolved graphs compute the same integers with any covered flip in one layer."""
    if len({g.fingerprint() for g in resolved}) < 2:
        return True
    if not same_everywhere:
        return False
    op = graph.operators[index]
    assert isinstance(op, Linear)
    lower, upper = accumulator_bounds(graph, op)
    largest = largest_input(graph, op) + abs(offset(graph, op, report.faults))
    for channel in range(op.channels):
        sites = flips(graph, op, report.faults, channel)
        change = (sites.after - sites.before)[sites.covered]
        weight = sites.column[sites.covered] >= 0
        reach = np.where(weight, np.abs(change) * largest, 0).max(initial=0)
        bias = np.where(weight, 0, change)
        least = int(lower[channel]) + min(-int(reach), int(bias.min(initial=0)))
        most = int(upper[channel]) + max(int(reach), int(bias.max(initial=0)))
        limit = ACCUMULATOR_LIMIT - 1
        ends = np.array([max(least, -limit)]), np.array([min(most, limit)])
        if not _one_staircase(graph, index, resolved, channel, ends):
            return False
    return True


def _one_staircase(
    graph: Graph, index: int, resolved: list[Graph], channel: int, ends: Box
) -> bool:
    """Whether one channel is rounded alike between two accumulators."""
    target = graph.operators[index]
    zero_point, limits = graph.tensors[target.output].zero_point, graph.output_range(target)
    steps: Int64Array | None = None
    expected: Int64Array | None = None
    for candidate in resolved:
        op = candidate.operators[index]
        assert isinstance(op, Linear) and op.requantization is not None
        r, part = op.requantization, slice(channel, channel + 1)
        one = Requantization(r.rounding[part], r.multiplier[part], r.shift[part])
        if steps is None:
            steps = universal.step_points(one, *ends, zero_point, limits)
        rule = semantics.REQUANTIZE[Rounding(int(one.rounding[0]))]
        rounded = rule(steps, int(one.multiplier[0]), int(one.shift[0])) + zero_point
        found: Int64Array = semantics.clamp(rounded, *limits)  # pyright: ignore
        if expected is None:
            expected = found
        elif not np.array_equal(expected, found):
            return False
    return True
