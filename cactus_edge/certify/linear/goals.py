"""What a linear bound has to show: that a rival never wins, or that an atom never holds.

A goal turns a bound of its target into a proof. ``PairGoal`` bounds ``p_y a_y - p_j a_j`` of the
last layer's accumulators and closes with the staircase argument of ``margin``, so that ties and
saturation are seen; ``AtomGoal`` bounds an integer combination of stored logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cactus_edge import exact
from cactus_edge.certify import margin
from cactus_edge.certify.linear.bounds import State, Target
from cactus_edge.certify.linear.network import Network, Stairs
from cactus_edge.certify.margin import LastLayer
from cactus_edge.graph import Int64Array

_BITS = 26


@dataclass(frozen=True, eq=False)
class Aim:
    """A target and the least bound of it that closes the case.

    ``kind`` 0: the claim itself; 1: the case is empty, because the rival cannot reach its range.
    """

    target: Target
    needed: int
    kind: int = 0


class Goal(Protocol):
    """A claim that a lower bound can prove."""

    def settled(self, state: State) -> bool:
        """Whether intervals prove the claim."""
        ...

    def holds(self, logits: Int64Array) -> bool:
        """Whether stored logits [classes] satisfy the claim."""
        ...

    def interval(self, state: State) -> int:
        """The bound of kind 0 by intervals."""
        ...

    def aim(self, state: State, bits: int = _BITS) -> Aim | None:
        """What has to be bounded; None where ``divide`` has to come first."""
        ...

    def divide(self, state: State) -> tuple[int, int, int] | None:
        """(tensor, element, level) of a division without which no bound helps."""
        ...


@dataclass(frozen=True, eq=False)
class PairGoal:
    """``label`` beats ``rival`` by ``gap`` stored steps on every input.

    ``output`` is the tensor of node ``node``, ``top`` its greatest offset value.
    """

    layer: LastLayer
    node: int
    output: int
    top: int
    label: int
    rival: int
    gap: int

    def holds(self, logits: Int64Array) -> bool:
        """See ``Goal``."""
        return int(logits[self.label]) >= int(logits[self.rival]) + self.gap

    def interval(self, state: State) -> int:
        """See ``Goal``."""
        layer = self.layer
        own, other = (int(layer.parts[c]) for c in (self.label, self.rival))
        combined = own * layer.weights[self.label] - other * layer.weights[self.rival]
        low, high = state.values[layer.source]
        least = exact.total(np.minimum(combined * low, combined * high))
        return least + own * int(layer.bias[self.label]) - other * int(layer.bias[self.rival])

    def _needed(self, state: State) -> int | None:
        ranges = state.ranges[self.node]
        own, other = (
            (int(ranges[0, channel]), int(ranges[1, channel]))
            for channel in (self.label, self.rival)
        )
        return margin.needed_margin(self.layer, self.label, self.rival, self.gap, own, other)

    def settled(self, state: State) -> bool:
        """See ``Goal``."""
        needed = self._needed(state)
        return needed is not None and self.interval(state) >= needed

    def aim(self, state: State, bits: int = _BITS) -> Aim | None:
        """See ``Goal``."""
        layer, ranges = self.layer, state.ranges[self.node]
        multipliers = np.zeros(len(layer.bias), np.int64)
        needed = self._needed(state)
        if needed is not None:
            own, other = (int(layer.parts[c]) for c in (self.label, self.rival))
            multipliers[self.label], multipliers[self.rival] = own, -other
            combined = own * layer.weights[self.label] - other * layer.weights[self.rival]
            return Aim(_scaled(self.node, multipliers, int(np.abs(combined).max()), bits), needed)
        if not ranges[5, self.rival]:
            return None
        multipliers[self.rival] = -1
        largest = int(np.abs(layer.weights[self.rival]).max())
        target = _scaled(self.node, multipliers, largest, bits)
        return Aim(target, 1 - int(ranges[0, self.rival]), 1)

    def divide(self, state: State) -> tuple[int, int, int] | None:
        """See ``Goal``: where both logits may saturate, the rival's last step is its own case."""
        if state.ranges[self.node][5, self.rival] or self._needed(state) is not None:
            return None
        return self.output, self.rival, self.top - 1


@dataclass(frozen=True, eq=False)
class AtomGoal:
    """``sum(weights * stored logits) < bound`` on every input: the atom never holds."""

    network: Network
    weights: Int64Array
    bound: int

    def holds(self, logits: Int64Array) -> bool:
        """See ``Goal``."""
        return exact.dot(self.weights, logits) < self.bound

    def interval(self, state: State) -> int:
        """See ``Goal``."""
        low, high = state.values[self.network.graph.logits]
        return exact.total(np.minimum(-self.weights * low, -self.weights * high))

    def settled(self, state: State) -> bool:
        """See ``Goal``."""
        return self.interval(state) >= self._enough()

    def aim(self, state: State, bits: int = _BITS) -> Aim | None:
        """See ``Goal``."""
        nodes = len(self.network.nodes)
        target = _scaled(nodes, -self.weights, int(np.abs(self.weights).max()), bits)
        return Aim(target, self._enough())

    def divide(self, state: State) -> tuple[int, int, int] | None:
        """See ``Goal``."""
        return None

    def _enough(self) -> int:
        """``-sum(w x) > -bound + zero_point sum(w)`` for offset values x."""
        zero_point = self.network.zero_points[self.network.graph.logits]
        return -self.bound + zero_point * int(self.weights.sum()) + 1


def _scaled(node: int, multipliers: Int64Array, largest: int, bits: int) -> Target:
    shift = max(0, bits - max(largest, 1).bit_length())
    return Target(node, multipliers << shift, 1 << shift, bits)


def pair_goal(network: Network, layer: LastLayer, label: int, rival: int, gap: int) -> PairGoal:
    """The goal that ``label`` beats ``rival`` by ``gap`` steps."""
    index = last_node(network)
    node = network.nodes[index]
    assert isinstance(node, Stairs)
    top = node.staircase.lowest + node.staircase.thresholds.shape[1]
    return PairGoal(layer, index, node.output, top, label, rival, gap)


def last_node(network: Network) -> int:
    """The index of the node that computes the logits."""
    return max(i for i, node in enumerate(network.nodes) if isinstance(node, Stairs))
