"""Layers that may be requantized by one float32 multiplication, which vector units do best.

A rounding profile that is not FLOAT32 may still compute what a FLOAT32 one does, on every
accumulator that a layer can reach: universal models are made so. This is proved for each channel at
both sides of each step, as ``universal`` proves it between profiles, and only then is the layer's
arithmetic replaced; so the kernels still compute the integers of the profile.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from cactus_edge import scales
from cactus_edge.constraints import accumulator_bounds, parameters_fit
from cactus_edge.graph import Graph, Linear, Requantization
from cactus_edge.semantics import Rounding
from cactus_edge.universal import step_points, stored

_ULPS = (0, 1, -1, 2, -2, 4, -4, 8, -8)
"""Float32 numbers near a channel's factor, in units of the last place, that are tried in turn."""
_DOUBLE = (int(Rounding.DOUBLE_HALF_AWAY), int(Rounding.DOUBLE_HALF_UP))


def fuse(graph: Graph) -> Graph:
    """A resolved graph, with FLOAT32 in every layer for which it was proved to be the same."""
    operators = tuple(
        replace(op, requantization=_float32(graph, op)) if isinstance(op, Linear) else op
        for op in graph.operators
    )
    return replace(graph, operators=operators)


def _float32(graph: Graph, op: Linear) -> Requantization:
    """FLOAT32 parameters that equal the layer's own on every accumulator, or its own."""
    given = op.requantization
    assert given is not None, "graph is not resolved"
    codes = set(given.rounding.tolist())
    if graph.tensors[op.output].dtype.is_wide:  # the kernels store bytes alone
        return given
    if codes == {int(Rounding.FLOAT32)} or len(codes) > 1 or (given.multiplier <= 0).any():
        return given
    zero_point, limits = graph.tensors[op.output].zero_point, graph.output_range(op)
    ends = accumulator_bounds(graph, op)
    numbers = (given.rounding, given.multiplier, given.shift, *ends)
    found = _proved(tuple(n.astype(np.int64).tobytes() for n in numbers), zero_point, limits)
    return given if found is None else found


@lru_cache(maxsize=256)
def _proved(
    numbers: tuple[bytes, ...], zero_point: int, limits: tuple[int, int]
) -> Requantization | None:
    """FLOAT32 parameters, by the bytes of a layer's own and its accumulators' ends.

    Remembered, because a process often loads one model several times.
    """
    rounding, multiplier, shifts, lower, upper = (np.frombuffer(n, np.int64) for n in numbers)
    given = Requantization(rounding, multiplier, shifts)
    extra = 31 if set(rounding.tolist()) <= set(_DOUBLE) else 0
    pairs = [
        scales.nearest(multiplier, 1 << (shift + extra), 32)
        for multiplier, shift in zip(multiplier.tolist(), shifts.tolist(), strict=True)
    ]
    significand = np.array([pair.significand for pair in pairs], np.int64)
    shift = np.array([-pair.exponent for pair in pairs], np.int64)
    if not all(parameters_fit(Rounding.FLOAT32, 1 << 23, s, False) for s in shift.tolist()):
        return None
    points = step_points(given, lower, upper, zero_point, limits)
    wanted = stored(given, points, zero_point, limits)
    codes = np.full(len(shift), int(Rounding.FLOAT32))
    chosen = np.zeros(len(shift), np.int64)
    for ulp in _ULPS:
        near = np.clip(significand + ulp, 1 << 23, (1 << 24) - 1)
        found = stored(Requantization(codes, near, shift), points, zero_point, limits)
        same = (found == wanted).all(axis=0) & (chosen == 0)
        chosen[same] = near[same]
        if (chosen != 0).all():
            return Requantization(codes, chosen, shift)
    return None
