"""Proof that a model computes the same integers under every rounding profile that covers it.

Requantization is monotone, so two profiles agree on a channel if and only if they agree on both
ends of each step: for every level k, at the least accumulator that reaches k and at the one below
it. Those few hundred points, within the accumulators that the channel can reach, are evaluated
under every method that any profile uses for that operator. Where a channel reads one element, all
of its accumulators are evaluated instead. ADD is compared on all pairs, tables entry by entry, MEAN
by its integers. Pools and what moves elements have one arithmetic everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cactus_edge import profiles, semantics
from cactus_edge.constraints import accumulator_bounds, stored_range
from cactus_edge.errors import InvalidGraphError
from cactus_edge.graph import (
    Add,
    DepthwiseConv2D,
    DType,
    Graph,
    Int64Array,
    Linear,
    Requantization,
)
from cactus_edge.operators import Lookup, Mean, Pair
from cactus_edge.profiles import Method
from cactus_edge.semantics import AddRounding, Rounding

__all__ = ["LayerAgreement", "agreement", "is_universal"]


@dataclass(frozen=True)
class LayerAgreement:
    """Which output channels of a layer differ between profiles; an ADD counts as one channel."""

    name: str
    channels: int
    disagreeing: tuple[int, ...]


def agreement(graph: Graph) -> list[LayerAgreement]:
    """One entry for each operator that rescales; explicitly resolved operators always agree."""
    entries: list[LayerAgreement] = []
    for op in graph.core:
        if isinstance(op, (Lookup, Pair, Mean)):
            entries.append(LayerAgreement(op.name, 1, () if _alike(graph, op) else (0,)))
        elif isinstance(op, Linear):
            bad = () if op.requantization else disagreeing_channels(graph, op)
            entries.append(LayerAgreement(op.name, op.channels, bad))
        elif isinstance(op, Add):
            bad = () if op.requantization or sum_agrees(graph, op) else (0,)
            entries.append(LayerAgreement(op.name, 1, bad))
    return entries


def is_universal(graph: Graph) -> bool:
    """Whether every profile computes the same integers on every input."""
    return not any(entry.disagreeing for entry in agreement(graph))


def _all_methods(graph: Graph, op: Linear) -> list[tuple[Method, Int64Array]]:
    """Every method that some profile uses on ``op``, with the channels it applies to."""
    used: dict[Method, Int64Array] = {}
    for profile in profiles.PROFILES.values():
        start = 0
        for end, method in profiles.methods(graph, op, profile):
            mask = used.setdefault(method, np.zeros(op.channels, np.int64))
            mask[start:end] = 1
            start = end
    return list(used.items())


def disagreeing_channels(graph: Graph, op: Linear) -> tuple[int, ...]:
    """Output channels on which two profiles differ for some reachable accumulator."""
    lower, upper = accumulator_bounds(graph, op)
    limits = graph.output_range(op)
    zero_point = graph.tensors[op.output].zero_point
    points = _all_accumulators(graph, op)
    expected: Int64Array | None = None
    bad = np.zeros(op.channels, bool)
    used = _all_methods(graph, op)
    if graph.tensors[op.inputs[0]].dtype is DType.INT16:
        # One method for convolutions, several for FULLY_CONNECTED that are not compared.
        return tuple(range(op.channels)) if len(used) > 1 else ()
    used.insert(0, (Method(Rounding.DOUBLE_HALF_AWAY), np.ones(op.channels, np.int64)))
    for method, applies in used:
        pairs = np.array(profiles.factor(graph, op, method), np.int64)
        pairs = np.broadcast_to(pairs, (op.channels, 2))
        parameters = Requantization(
            np.full(op.channels, int(method.rounding)), pairs[:, 0], pairs[:, 1]
        )
        if points is None:
            points = step_points(parameters, lower, upper, zero_point, limits)
        values = stored(parameters, points, zero_point, limits)
        expected = values if expected is None else expected
        bad |= (values != expected).any(axis=0) & (applies == 1)
    return tuple(np.flatnonzero(bad).tolist())


def _all_accumulators(graph: Graph, op: Linear) -> Int64Array | None:
    """Int64 [values, channels] where a channel reads one element, or none, else None.

    Weights of 0 read nothing. Padding reads as the zero point, so that 0 is among the values.
    """
    values = op.weights.values
    values = np.moveaxis(values, 3, 0) if isinstance(op, DepthwiseConv2D) else values
    rows = values.reshape(op.channels, -1)
    if (np.count_nonzero(rows, axis=1) > 1).any():
        return None
    lower, upper = stored_range(graph, op.inputs[0])
    levels = np.arange(lower, upper + 1, dtype=np.int64) - graph.tensors[op.inputs[0]].zero_point
    return np.append(levels, 0)[:, None] * rows.sum(1, dtype=np.int64) + op.bias


def step_points(
    parameters: Requantization,
    lower: Int64Array,
    upper: Int64Array,
    zero_point: int,
    limits: tuple[int, int],
) -> Int64Array:
    """Int64 [points, channels]: both sides of every step within [lower, upper], and the ends."""
    levels = np.arange(limits[0] + 1, limits[1] + 1, dtype=np.int64)[:, None]

    def reaches(accumulator: Int64Array) -> npt.NDArray[np.bool_]:
        return stored(parameters, accumulator, zero_point, limits) >= levels

    low, high = _near(parameters, levels - zero_point, lower, upper)
    low = np.where(reaches(low - 1), lower, low)  # a guess that is wrong costs time alone
    high = np.where(reaches(high), high, upper + 1)
    while (low < high).any():
        middle = (low + high) >> 1
        reached = reaches(middle)
        high = np.where(reached, middle, high)
        low = np.where(reached, low, middle + 1)
        low = np.minimum(low, high)
    ends = np.stack([lower, upper])
    points = np.concatenate([ends, low, low - 1])
    return np.clip(points, lower, upper)


def _near(
    parameters: Requantization, steps: Int64Array, lower: Int64Array, upper: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Int64 [steps, channels], twice: a guess of the accumulators between which each step lies.

    The guess is made in floats and decides nothing: ``step_points`` asks the integers at both ends.
    """
    double = int(parameters.rounding[0]) in (Rounding.DOUBLE_HALF_AWAY, Rounding.DOUBLE_HALF_UP)
    factor = np.ldexp(np.maximum(parameters.multiplier, 1), -(parameters.shift + 31 * double))
    guess = np.clip((steps - 0.5) / factor, lower - 1.0, upper + 1.0).astype(np.int64)
    room = 4 + (np.abs(guess) >> 20)
    return np.maximum(guess - room, lower), np.minimum(guess + room, upper + 1)


def stored(
    parameters: Requantization, accumulator: Int64Array, zero_point: int, limits: tuple[int, int]
) -> Int64Array:
    """Stored integers of accumulators [..., channels]; all channels round alike."""
    code = Rounding(int(parameters.rounding[0]))
    rounded = semantics.REQUANTIZE[code](accumulator, parameters.multiplier, parameters.shift)
    return semantics.clamp(rounded + zero_point, *limits)  # pyright: ignore


def _alike(graph: Graph, op: Lookup | Pair | Mean) -> bool:
    """Whether all profiles that cover an operator give it the same table or integers."""
    found: set[bytes] = set()
    alone = replace(graph, operators=(op,), input=op.inputs[0], output=op.output)
    for name in profiles.PROFILES:
        try:
            resolved = profiles.resolve(alone, name).operators[0]
        except InvalidGraphError:
            continue
        if isinstance(resolved, Mean):
            assert resolved.requantization is not None
            r = resolved.requantization
            found.add(b"|".join(v.tobytes() for v in (r.rounding, r.multiplier, r.shift)))
        else:
            assert isinstance(resolved, (Lookup, Pair)) and resolved.table is not None
            found.add(resolved.table.tobytes())
    return len(found) < 2


def sum_agrees(graph: Graph, op: Add) -> bool:
    """Whether every profile adds all pairs of storable integers alike."""
    if graph.tensors[op.output].dtype is DType.INT16:
        return True  # one arithmetic in every profile that covers it
    (low_a, high_a), (low_b, high_b) = (stored_range(graph, i) for i in op.inputs)
    zero_a, zero_b = (graph.tensors[i].zero_point for i in op.inputs)
    least = [graph.tensors[i].dtype.range[0] - graph.tensors[i].zero_point for i in op.inputs]
    a = np.arange(low_a, high_a + 1, dtype=np.int64)[:, None] - zero_a
    b = np.arange(low_b, high_b + 1, dtype=np.int64)[None, :] - zero_b
    limits = graph.output_range(op)
    zero_point = graph.tensors[op.output].zero_point
    results: list[Int64Array] = []
    for rounding in AddRounding:
        if rounding is AddRounding.INT16:
            continue
        try:
            integers = profiles.add_requantization(graph, op, rounding).integers
        except InvalidGraphError:
            return False
        early = rounding is AddRounding.DOUBLE_HALF_AWAY
        if early and not profiles.early_shift_agrees(integers, *least):
            return False
        rounded = semantics.ADD[rounding](a, b, *integers)
        results.append(semantics.clamp(rounded + zero_point, *limits))  # pyright: ignore
    return all(np.array_equal(results[0], other) for other in results[1:])
