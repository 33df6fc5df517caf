"""Routes to a wrong decision, each with a *deficit* that a search drives down.

Against label ``y``, code ``k`` of ``classes`` is rival ``k``:

- ``MARGIN``: the rival's score passes the label's.
- ``TOP``: both reach the upper clamp, where the lower index wins; only for ``k < y``.
- ``FLOOR``: the label sinks to the lower clamp, where every lower index beats it; ``k`` is ``y``.

Scores are finer than stored logits, see ``Network.scores``, and the last two routes are the ones
that a difference of scores cannot see: there the label may lead by any number of accumulator units.
A deficit of 0 or less is a hint. Whether a point is wrong is read from its stored logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge.certify.attack_network import Int32Array, Network
from cactus_edge.constraints import ACCUMULATOR_LIMIT
from cactus_edge.graph import BoolArray, Int64Array

MARGIN, TOP, FLOOR = range(3)
_SEED = 1 << 12
_FAR = 1 << 60


@dataclass(frozen=True, eq=False)
class Routes:
    """Clamps in units of the scores, int64 [classes]; None for logits that are never clamped.

    ``top`` is the least score that is stored as the greatest logit, ``floor`` the greatest score
    that is stored as the least one, ``step`` the scores of one stored step.
    """

    top: Int64Array
    floor: Int64Array
    step: int
    clamps: bool

    def deficits(self, scores: Int64Array, labels: Int64Array, codes: Int64Array) -> Int64Array:
        """How far each row is from where its route leads: int64 [rows].

        Args:
            scores: int64 [rows, classes].
            labels: int64 [rows].
            codes: int64 [rows], ``kind * classes + k``.
        """
        kind, rival = np.divmod(codes, scores.shape[1])
        rows = np.arange(len(codes))
        own, other = scores[rows, labels], scores[rows, rival]
        margin = own - other + np.where(rival > labels, self.step, 0)
        top = np.maximum(self.top[rival] - other, 0) + np.maximum(self.top[labels] - own, 0)
        floor = np.maximum(own - self.floor[labels], 0)
        return np.where(kind == MARGIN, margin, np.where(kind == TOP, top, floor))

    def seeds(self, scores: Int64Array, labels: Int64Array, codes: Int64Array) -> Int32Array:
        """Weights of the scores whose sum has to grow: int32 [rows, classes]; see ``deficits``."""
        classes = scores.shape[1]
        kind, rival = np.divmod(codes, classes)
        rows = np.arange(len(codes))
        short = scores[rows, labels] < self.top[labels]
        weights = np.zeros((len(codes), classes), np.int32)
        weights[rows, labels] = np.where(kind == TOP, short * _SEED, -_SEED)
        reached = (kind == TOP) & (scores[rows, rival] >= self.top[rival]) & short
        weights[rows, rival] = np.where(reached, 0, np.where(kind == FLOOR, -_SEED, _SEED))
        return weights

    def every(self, scores: Int64Array, labels: Int64Array) -> Int64Array:
        """Deficits of all codes, int64 [rows, 3 * classes]; huge where a route does not exist."""
        count, classes = scores.shape
        codes = np.arange(3 * classes)
        spread = np.repeat(np.arange(count), codes.size)
        found = self.deficits(scores[spread], labels[spread], np.tile(codes, count))
        found = found.reshape(count, 3, classes)
        rival, label = np.arange(classes)[None, :], labels[:, None]
        found[:, MARGIN][rival == label] = _FAR
        found[:, TOP][(rival >= label) | (not self.clamps)] = _FAR
        found[:, FLOOR][(rival != label) | (label == 0) | (not self.clamps)] = _FAR
        return found.reshape(count, -1)

    def exists(self, deficits: Int64Array) -> BoolArray:
        """Which of ``every``'s deficits belong to a route."""
        return deficits < _FAR


def routes(network: Network) -> Routes:
    """The routes of a network, from the thresholds of its last layer."""
    graph, layer = network.graph, network.layer
    classes = graph.tensors[graph.logits].size
    if layer is None:
        lower, upper = graph.output_range(network.last)
        ends = np.full(classes, upper, np.int64), np.full(classes, lower, np.int64)
        return Routes(*ends, 1, not graph.tensors[graph.logits].dtype.is_wide)
    if layer.thresholds is None or layer.thresholds.shape[1] < 2:
        zeros = np.zeros(classes, np.int64)
        return Routes(zeros, zeros, 1, False)
    # Levels that no accumulator reaches have huge thresholds; the products have to fit int64.
    thresholds = np.clip(layer.thresholds, -2 * ACCUMULATOR_LIMIT, 2 * ACCUMULATOR_LIMIT)
    top = thresholds[:, -1] * layer.parts
    floor = (thresholds[:, 1] - 1) * layer.parts
    levels = layer.thresholds.shape[1] - 1
    return Routes(top, floor, max(1, int((top - floor).min()) // levels), True)
