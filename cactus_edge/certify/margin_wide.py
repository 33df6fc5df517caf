"""The needed margin of logits with many levels, without visiting each of them.

See ``margin`` for the argument. The needed margin is the greatest value, over the levels ``k`` that
the rival can reach, of ``p_y * (t(k) - 1) - p_j * a(k) + 1``. Three levels are evaluated exactly:
the first that matters, the last, and the first that the label cannot follow. Between them neither
staircase is clamped, and each stays within an error of the line through its real factor ``f``, half
a step for the most part:

    r(b) <= n  implies  f_y * b <= n + error_y      r(a) >= n  implies  f_j * a >= n - error_j

so the value is below a linear function of ``k``, whose greatest value lies at an end. That loses at
most a step of the logits, for binary32 beyond 2**23 levels what its significand cannot hold; where
few levels lie between, they are evaluated exactly as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge.certify.margin_steps import Staircases
from cactus_edge.graph import Int64Array

FEW = 64


@dataclass(frozen=True, eq=False)
class Pairs:
    """A label against some rivals: all int64 [pairs] but the label.

    ``own`` and ``other`` are the parts p of label and rival; bounds are (least, greatest)
    accumulators.
    """

    staircases: Staircases
    label: int
    rivals: Int64Array
    own: Int64Array
    other: Int64Array
    own_bounds: tuple[Int64Array, Int64Array]
    rival_bounds: tuple[Int64Array, Int64Array]
    gap: Int64Array

    def take(self, chosen: Int64Array) -> Pairs:
        """Some of the pairs."""
        return Pairs(
            self.staircases,
            self.label,
            self.rivals[chosen],
            self.own[chosen],
            self.other[chosen],
            (self.own_bounds[0][chosen], self.own_bounds[1][chosen]),
            (self.rival_bounds[0][chosen], self.rival_bounds[1][chosen]),
            self.gap[chosen],
        )


def needed(pairs: Pairs, otherwise: int) -> Int64Array:
    """Int64 [pairs]: the needed margin; ``otherwise`` where the bounds alone are proof."""
    label = np.array(pairs.label)
    stored = pairs.staircases.stored
    own_first, own_last = (stored(end, label) for end in pairs.own_bounds)
    first, last = (stored(end, pairs.rivals) for end in pairs.rival_bounds)
    first = np.maximum(first, own_first - pairs.gap + 1)
    beyond = own_last - pairs.gap + 1
    found = np.full(pairs.rivals.size, otherwise, np.int64)
    open_ = np.flatnonzero(first <= last)
    if not open_.size:
        return found
    pairs, first, last, beyond = pairs.take(open_), first[open_], last[open_], beyond[open_]
    ends = np.stack([first, last, np.clip(beyond, first, last)], axis=1)
    result = _at(pairs, ends)
    begin, end = first + 1, np.minimum(last, beyond) - 1
    few = np.flatnonzero((begin <= end) & (end - begin < FEW))
    if few.size:
        count = int((end - begin)[few].max()) + 1
        levels = np.minimum(begin[few, None] + np.arange(count), end[few, None])
        result[few] = np.maximum(result[few], _at(pairs.take(few), levels))
    for index in np.flatnonzero(end - begin >= FEW).tolist():
        lines = max(_line(pairs, index, int(level[index])) for level in (begin, end))
        # A margin that no pair within the bounds has is enough for any claim.
        most = pairs.own[index] * pairs.own_bounds[1][index]
        most -= pairs.other[index] * pairs.rival_bounds[0][index]
        result[index] = max(int(result[index]), min(lines, int(most) + 1))
    found[open_] = result
    return found


def _at(pairs: Pairs, levels: Int64Array) -> Int64Array:
    """Int64 [pairs]: the greatest margin that levels [pairs, n] of the rivals ask for."""
    own_low, own_high, low, high = (
        end[:, None] for end in (*pairs.own_bounds, *pairs.rival_bounds)
    )
    label = np.array(pairs.label)
    own_point = pairs.staircases.least(levels + pairs.gap[:, None], label, own_low, own_high)
    rival_point = pairs.staircases.least(levels, pairs.rivals[:, None], low, high)
    values = pairs.own[:, None] * (own_point - 1) - pairs.other[:, None] * rival_point + 1
    return values.max(axis=1)


def _line(pairs: Pairs, index: int, level: int) -> int:
    """At least the margin that a level of one rival asks for, for a level between the clamps."""
    steps = pairs.staircases
    label, rival, gap = pairs.label, int(pairs.rivals[index]), int(pairs.gap[index])
    own, other = int(pairs.own[index]), int(pairs.other[index])
    if own == other and gap == 0 and steps.same(label, rival):
        return 1 - own  # the same monotone function: t(k) = a(k)
    own_largest, rival_largest = (
        max(abs(int(end[index])) for end in bounds)
        for bounds in (pairs.own_bounds, pairs.rival_bounds)
    )
    highest = level + gap - 1 - steps.zero_point + steps.error(label, own_largest)
    lowest = level - steps.zero_point - steps.error(rival, rival_largest)
    difference = own * highest / steps.factor(label)  # exact: Fractions
    difference -= other * lowest / steps.factor(rival)  # exact: Fractions
    # What rounds halves up does not take ``highest`` itself.
    excluded = steps.rounds_halves_up(label)
    return difference.__ceil__() if excluded else difference.__floor__() + 1
