"""The decision rule: argmax over the stored logits, the lowest index wins a tie.

For label ``y`` to win against ``j``, its stored logit must lead by a *gap*: 0 when ``j > y`` (a tie
goes to ``y``), 1 when ``j < y``. When the model ends in SOFTMAX the decision is taken on stored
probabilities, and two different logits can become one probability. SOFTMAX is monotone, so
``j > y`` still needs 0; for ``j < y`` the gap is the least number of logit steps that is sure to
separate two probabilities in every implementation whose stored result is within one step of the
exact one:
with ``y`` the greatest of ``n`` logits and ``t = gap * scale``, the probabilities differ by at
least ``(1 - exp(-t)) / n >= t / (1 + t) / n``, and a difference of 3/256 leaves a whole step.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from cactus_edge import scales
from cactus_edge.graph import BoolArray, Graph, Int64Array

NEVER = 1 << 16
_SEPARATION = Fraction(3, 256)


def lead(graph: Graph) -> int:
    """The gap that a logit needs against a lower index: 1, or more before SOFTMAX.

    ``NEVER`` where no gap is sure to separate the probabilities (more than 85 classes).
    """
    if not graph.has_softmax:
        return 1
    tensor = graph.tensors[graph.logits]
    assert tensor.quantization is not None, "softmax_edge is proved by constraints"
    share = _SEPARATION * tensor.size
    if share >= 1:
        return NEVER
    scale = scales.decode_float32(tensor.quantization.scale_bits).fraction()
    return (share / (1 - share) / scale).__ceil__()


def gaps(graph: Graph, label: int, classes: int) -> Int64Array:
    """Int64 [classes]: the gap that ``label`` needs against each rival; 0 for itself."""
    needed = np.zeros(classes, np.int64)
    needed[:label] = lead(graph)
    return needed


def predict(logits: Int64Array) -> Int64Array:
    """The winning index of stored logits [samples, classes] (NumPy's argmax: lowest wins ties)."""
    return logits.reshape(len(logits), -1).argmax(axis=1)


def surely_wrong(graph: Graph, logits: Int64Array, labels: Int64Array) -> BoolArray:
    """Bool [samples]: the decision is not ``labels``, whatever the softmax implementation.

    Without SOFTMAX this is ``predict(logits) != labels``. With it, a rival of lower index wins when
    its logit is at least the label's, one of higher index when it leads by a sure gap.
    """
    flat = logits.reshape(len(logits), -1)
    winner = predict(flat)
    own = np.take_along_axis(flat, labels[:, None], axis=1)[:, 0]
    best = flat.max(axis=1)
    gap = lead(graph)
    return (winner != labels) & ((winner < labels) | (best - own >= gap))


def describe(graph: Graph) -> str:
    """The decision rule in words, as certificates state it."""
    rule = "argmax of the stored logits, the lowest index wins a tie"
    return f"{rule}; taken behind SOFTMAX" if graph.has_softmax else rule
