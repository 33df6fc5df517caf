"""Search for a stored input that breaks a property: signed gradient steps from many starts.

A point's objective is the slack of the disjunct that has to hold next: of all disjuncts, ordered by
their least slack over atoms, the one after those that are allowed to hold. For the gradient see
``attack_network``. What is returned is an integer point of the box whose logits, as computed by the
kernels, break the property.
"""

from __future__ import annotations

import numpy as np

from cactus_edge.certify.attack import Settings
from cactus_edge.certify.attack_network import Int32Array, Network, transposed
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.specification import Atom, Specification

_STARTS = 8
_OWN_STEPS = 4
_LARGEST = 1 << 12  # of a coefficient that steers; larger ones are scaled down


class Searcher:
    """Compiled once for a resolved graph."""

    def __init__(self, graph: Graph) -> None:
        """Compile the kernels and transpose the layers."""
        self.network = Network(graph)

    def search(
        self,
        lower: Int64Array,
        upper: Int64Array,
        specification: Specification,
        settings: Settings,
    ) -> Int64Array | None:
        """A stored input in the box that breaks the property for sure, or None.

        Args:
            lower: int64 [*input shape]; ``upper`` likewise.
            upper: see ``lower``.
            specification: what must not happen.
            settings: ``steps``, ``restarts`` (``8 * (restarts + 1)`` starts) and ``seed``.
        """
        if len(specification.breaking) <= specification.allowed:
            return None
        random = np.random.default_rng(settings.seed)
        count = _STARTS * (settings.restarts + 1)
        point = random.integers(lower, upper + 1, (count, *lower.shape))
        point[0] = (lower + upper) >> 1
        width = int((upper - lower).max(initial=0))
        for step in range(settings.steps + 1):
            values = self.network.forward(point)
            logits = self.network.logits(values)
            for row, found in enumerate(logits):
                if specification.violated(found):
                    return point[row].copy()
            if step == settings.steps:
                break
            seeds = np.stack([_seed(specification, row, i, step) for i, row in enumerate(logits)])
            uphill = np.sign(transposed(self.network, values, seeds))
            # Half the box at first, a single level at the end.
            size = max(1, width * (settings.steps - step) // (2 * settings.steps))
            point = np.clip(point + size * uphill, lower, upper)
        return None


def _seed(specification: Specification, logits: Int64Array, start: int, step: int) -> Int32Array:
    """Int32 [classes]: the weights of the logits whose sum has to grow.

    In its first steps every start but the first pursues a disjunct of its own.
    """
    exact = [int(value) for value in logits]
    ranked = sorted(
        (min((_slack(atom, exact) for atom in disjunct), default=0), index)
        for index, disjunct in enumerate(specification.breaking)
    )
    wanted = [index for _, index in ranked[-1 - specification.allowed :]]
    if start and step < _OWN_STEPS:
        wanted[0] = (start - 1) % len(ranked)
    weights = np.zeros(len(exact), np.int32)
    for index in wanted:
        disjunct = specification.breaking[index]
        worst = min(disjunct, key=lambda atom: _slack(atom, exact), default=None)
        if worst is None or (worst.holds(exact) and index != wanted[0]):
            continue
        divisor = max(1, max((abs(c) for _, c in worst.terms), default=1) // _LARGEST)
        for k, coefficient in worst.terms:
            weights[k] += coefficient // divisor
    return weights


def _slack(atom: Atom, logits: list[int]) -> int:
    """By how much an atom holds (0 and up) or not, in 1024ths of its greatest coefficient."""
    lead = sum(c * logits[k] for k, c in atom.terms) - atom.bound
    return (lead << 10) // max((abs(c) for _, c in atom.terms), default=1)
