"""Which element a case is divided at: where the relaxation is loose, and dividing has paid before.

Everything here steers the search and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cactus_edge.certify.linear.ascent import Ascent, FloatArray
from cactus_edge.certify.linear.bounds import State
from cactus_edge.certify.linear.network import Network, Staircase, Stairs

_CANDIDATES = 16
_MANY_STEPS = 8
_LARGEST_GAIN = 100.0


@dataclass(frozen=True)
class Division:
    """``level`` is an offset value; ``looseness`` how far the relaxation is off there."""

    tensor: int
    element: int
    level: int
    looseness: float


@dataclass(eq=False)
class Branching:
    """Pseudo-costs (Benichou et al. 1971): what dividing an element gained, by its looseness.

    An element without a past counts as the average of all.
    """

    network: Network
    gains: dict[tuple[int, int], FloatArray] = field(default_factory=dict)
    total: FloatArray = field(default_factory=lambda: np.zeros(3))

    def choose(self, state: State, ascent: Ascent) -> Division | None:
        """The division that should raise the bounds of both children most; None if none would."""
        best, found = 0.0, None
        usual = _mean(self.total) if self.total[2] else np.ones(2)
        for loose, node, index in self._looseness(state, ascent):
            for position in np.argsort(-loose, kind="stable")[:_CANDIDATES].tolist():
                gap = float(loose[position])
                element = int(ascent.corners[index].index[position])
                known = self.gains.get((node.output, element))
                gain = usual if known is None else _mean(known)
                score = gap * gap * float(gain[0] * gain[1])
                if score <= best:
                    continue
                best = score
                first, last = (int(state.ranges[index][row, element]) for row in (2, 3))
                steps = node.staircase
                reached = int(ascent.reached[index][position]) - steps.lowest
                level = _cut(first, last, reached, steps) + steps.lowest
                found = Division(node.output, element, level, gap)
        return found

    def learn(self, division: Division, gained: tuple[int, int]) -> None:
        """Remember by how much the bounds of the two children rose."""
        if division.looseness <= 0:
            return
        rose = np.maximum(np.array(gained, np.float64), 0) + 1
        entry = np.append(np.minimum(rose / division.looseness, _LARGEST_GAIN), 1)
        key = division.tensor, division.element
        self.gains[key] = self.gains.get(key, np.zeros(3)) + entry
        self.total = self.total + entry

    def _looseness(self, state: State, ascent: Ascent) -> list[tuple[FloatArray, Stairs, int]]:
        """For each node: how much each of its open elements loosens the bound, and its index."""
        found: list[tuple[FloatArray, Stairs, int]] = []
        for index, gaps in ascent.gaps.items():
            node = self.network.nodes[index]
            assert isinstance(node, Stairs)
            ranges = state.ranges[index][:, ascent.corners[index].index]
            width = np.abs(ascent.weights[index]) * (ranges[3] - ranges[2])
            loose = np.where(ranges[2] < ranges[3], gaps + 1e-3 * width, 0.0)
            found.append((loose, node, index))
        return found


def _mean(sums: FloatArray) -> FloatArray:
    return sums[:2] / sums[2]


def _cut(first: int, last: int, reached: int, steps: Staircase) -> int:
    """The level at which a range of levels is divided: a clamp's bend, else where it is loose."""
    if last - first > _MANY_STEPS:
        if first == 0:
            return first
        if last == steps.thresholds.shape[1]:
            return last - 1
    quarter = (last - first) >> 2 if last - first > _MANY_STEPS else 0
    return min(max(reached, first + quarter), last - 1 - quarter)
