"""Universal scales: weight scales at which every rounding profile steps at the same integers.

For an output with zero point -128, level ``k`` begins at the accumulator ``(k + 1/2) / m``, where
``m`` is the effective multiplier. With ``1 / m = 2 j - delta`` and a small ``delta > 0`` that is
just below the integer ``(2 k + 1) j``, for every level: single and double roundings, halves up,
away or to even, and the last bits of four ways to form ``m`` all begin level ``k`` at that integer.
So a channel's scale is moved to such a point, and ``universal`` proves that it did the job.

A multiplier of a half or more is rounded once in every arithmetic. Any such multiplier will do that
has no boundary near an integer, so that some scales right beside the wanted one are tried.

The search is in floats; the proof is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cactus_edge import universal
from cactus_edge.graph import Graph, Linear

# In the order of trial. Double rounding wants a small delta, float errors a large one.
_DELTAS = (4e-4, 2e-4, 8e-4, 1e-4, 1.2e-3, 5e-5, 2.5e-5, 1.6e-3, 1.2e-5, 6e-6)
_HALVES = 12
_LEAST_CHANNELS = 16
# Scales that are tried together: those of all open channels, or several of few channels.
_TRIALS = 64
# Far from the wanted scale the search goes on in these steps, upwards only: nothing is clipped.
_STRIDE = 1.1
_ONCE = 0.5  # multipliers from here on are rounded once
LARGEST_MULTIPLIER = 0.9  # at 1 and above rounding is not monotone
_BESIDE = tuple(sign * 1e-4 * step for step in range(8) for sign in (1, -1))
LARGEST_CHANGE = 4.0
# Below this multiplier a weight level is so far below an output step that levels may be given up.
_FINE_MULTIPLIER = 1 / 1000

FloatArray = npt.NDArray[np.float64]
Make = Callable[[npt.NDArray[np.uint32], "list[int] | None"], tuple[Graph, Linear]]
"""From scale patterns to the layer in its graph; with a list, of those output channels alone."""


@dataclass(frozen=True, eq=False)
class Snapped:
    """``scale_bits`` uint32 [n], ``solved`` bool [n] and ``change`` float64 [n], relative."""

    scale_bits: npt.NDArray[np.uint32]
    solved: npt.NDArray[np.bool_]
    change: FloatArray


def snap(
    make: Make,
    wanted: FloatArray,
    smallest: FloatArray,
    ratio: float,
    others: Sequence[tuple[FloatArray, FloatArray]] = (),
) -> Snapped:
    """The nearest universal scales.

    Args:
        make: see ``Make``; the weights are quantized anew for the scales.
        wanted: float64 [n], the scales without this constraint; n is 1 for a per-tensor scale.
        smallest: float64 [n], below which weights would be clipped.
        ratio: input scale over output scale.
        others: more pairs like ``wanted`` and ``smallest``: scales that serve as well, because
            ``make`` stores the weights in another way for them.

    Returns:
        For each scale a universal one, or ``wanted`` in float32 where none was found. ``change`` is
        that from the nearest of those that serve.
    """
    ways = ((wanted, smallest), *others)
    unchanged = wanted.astype(np.float32)
    chosen = unchanged.copy()
    queues = [
        _nearest([(float(want[i]), float(least[i])) for want, least in ways], ratio)
        for i in range(wanted.size)
    ]
    solved = np.zeros(wanted.size, bool)
    turn = 0
    while open_ := [i for i in np.flatnonzero(~solved).tolist() if turn < len(queues[i])]:
        ahead = max(1, _TRIALS // len(open_)) if chosen.size > 1 else 1
        turns = range(turn, turn + ahead)
        trials = [(i, queues[i][k]) for k in turns for i in open_ if k < len(queues[i])]
        agreeing = _agreeing(make, trials, whole=chosen.size == 1)
        for (i, scale), agrees in zip(trials, agreeing, strict=True):
            if agrees and not solved[i]:
                chosen[i], solved[i] = scale, True
        turn += ahead
    chosen[~solved] = unchanged[~solved]
    if chosen.size > 1 and solved.any():
        # The trials saw other neighbours; what counts is the layer as it ships.
        bad = list(universal.disagreeing_channels(*make(chosen.view(np.uint32), None)))
        solved[bad] = False
        chosen[~solved] = unchanged[~solved]
    changes = np.stack([chosen.astype(np.float64) / want - 1 for want, _ in ways])
    change = np.take_along_axis(changes, np.abs(changes).argmin(0)[None], 0)[0]
    return Snapped(chosen.view(np.uint32), solved, change)


def _agreeing(make: Make, trials: list[tuple[int, np.float32]], *, whole: bool) -> list[bool]:
    """Whether profiles agree on each (channel, scale); ``whole``: on the layer under one scale."""
    if whole:
        ((_, scale),) = trials
        return [not universal.disagreeing_channels(*make(np.array([scale]).view(np.uint32), None))]
    # Some profiles treat narrow layers, and what is left over from whole vectors of channels, in
    # another way (always TFLite Micro's): the trial has neither.
    count = _LEAST_CHANNELS * -(-len(trials) // _LEAST_CHANNELS)
    padded = (trials * _LEAST_CHANNELS)[:count]
    bits = np.array([scale for _, scale in padded]).view(np.uint32)
    bad = universal.disagreeing_channels(*make(bits, [i for i, _ in padded]))
    wrong = {position % len(trials) for position in bad}
    return [position not in wrong for position in range(len(trials))]


def _nearest(ways: Sequence[tuple[float, float]], ratio: float) -> list[np.float32]:
    """The candidates of all ways to store a channel's weights, nearest first."""
    if len(ways) == 1:
        return candidates(*ways[0], ratio)
    found = [
        (abs(float(scale) / wanted - 1), order, scale)
        for wanted, smallest in ways
        for order, scale in enumerate(candidates(wanted, smallest, ratio))
    ]
    return [scale for *_, scale in sorted(found)]


def candidates(wanted: float, smallest: float, ratio: float) -> list[np.float32]:
    """Scales that may be universal, nearest first.

    Those just above the ones at which the reciprocal multiplier is even, and, where multipliers are
    rounded once, some beside ``wanted``.
    """
    half = 1 / (wanted * ratio) / 2
    largest = max(wanted * LARGEST_CHANGE, _FINE_MULTIPLIER / ratio)
    halves = set(range(max(1, round(half) - _HALVES), round(half) + _HALVES + 1))
    rungs = math.ceil(math.log(largest / wanted, _STRIDE)) + 1
    halves |= {max(1, round(half / _STRIDE**rung)) for rung in range(1, rungs)}
    points: list[tuple[float, np.float32]] = []
    for j in halves:
        for order, delta in enumerate(_DELTAS):
            scale = np.float32(1 / ((2 * j - delta) * ratio))
            if smallest <= scale <= largest:
                # All deltas of one j are tried before the next j.
                distance = abs(1 / (2 * j * ratio) / wanted - 1)
                points.append((distance + order * 1e-12, scale))
    for change in _BESIDE:
        scale = np.float32(wanted * (1 + change))
        if scale >= smallest and _ONCE <= float(scale) * ratio <= LARGEST_MULTIPLIER:
            points.append((abs(change), scale))
    return [scale for _, scale in sorted(points)]
