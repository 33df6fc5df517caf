"""The decision rule: argmax over the stored logits, the lowest index wins a tie.

For label ``y`` to win against ``j``, its stored logit must lead by a *gap*: 0 when ``j > y`` (a tie
goes to ``y``), 1 when ``j < y``. When the model ends in SOFTMAX the decision is taken on stored
probabilities, and two different logits can become one probability. SOFTMAX is monotone, so
``j > y`` still needs 0; for ``j < y`` the gap is the least number of logit steps that is sure to
separate two probabilities in every implementation whose stored result is within one step of the
exact one:
with ``y`` the greatest of ``n`` logits and ``t = gap * scale``, the probabilities differ by at
least ``(1 - exp(-t)) / n >= t / (1 + t) / n``, and a difference of 3/256 leaves a whole step.

``top``: the label is among the ``top`` first when the logits are sorted, greatest first, the lowest
index first among equals: fewer than ``top`` rivals *precede* it. Without SOFTMAX the gaps are the
same. Behind SOFTMAX a label that is not the greatest can have a probability too small to be told
from another one, so that no gap keeps a rival of lower index behind it.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from cactus_edge import scales
from cactus_edge.graph import BoolArray, Graph, Int64Array

NEVER = 1 << 33
"""More steps than any two stored logits are apart, int32 ones included."""
_SEPARATION = Fraction(3, 256)


def lead(graph: Graph) -> int:
    """The gap that the greatest logit needs against a lower index: 1, or more before SOFTMAX.

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
    return min((share / (1 - share) / scale).__ceil__(), NEVER)


def gaps(graph: Graph, label: int, classes: int, top: int = 1) -> Int64Array:
    """Int64 [classes]: the gap that keeps each rival behind ``label``; 0 for itself."""
    needed = np.zeros(classes, np.int64)
    needed[:label] = lead(graph) if top == 1 or not graph.has_softmax else NEVER
    return needed


def predict(logits: Int64Array) -> Int64Array:
    """The winning index of stored logits [samples, classes] (NumPy's argmax: lowest wins ties)."""
    return logits.reshape(len(logits), -1).argmax(axis=1)


def within(logits: Int64Array, labels: Int64Array, top: int = 1) -> BoolArray:
    """Bool [samples]: ``labels`` are among the ``top`` first of stored logits, ties by index."""
    flat = logits.reshape(len(logits), -1)
    own = np.take_along_axis(flat, labels[:, None], axis=1)
    lower_index = np.arange(flat.shape[1])[None, :] < labels[:, None]
    return ((flat > own) | (lower_index & (flat == own))).sum(axis=1) < top


def surely_wrong(graph: Graph, logits: Int64Array, labels: Int64Array, top: int = 1) -> BoolArray:
    """Bool [samples]: ``labels`` are not among the ``top`` first, whatever the softmax.

    Without SOFTMAX this is ``~within(logits, labels, top)``. With it, a rival of lower index
    precedes the label when its logit is at least the label's; one of higher index when it is the
    greatest of all and leads by a sure gap.
    """
    flat = logits.reshape(len(logits), -1)
    own = np.take_along_axis(flat, labels[:, None], axis=1)
    lower_index = np.arange(flat.shape[1])[None, :] < labels[:, None]
    ahead = flat - own >= lead(graph)
    if graph.has_softmax:
        ahead &= flat == flat.max(axis=1, keepdims=True)
    precedes = np.where(lower_index, flat >= own, ahead)
    precedes[np.arange(len(flat)), labels] = False
    return precedes.sum(axis=1) >= top


def describe(graph: Graph, top: int = 1) -> str:
    """The decision rule in words, as certificates state it."""
    rule = "argmax of the stored logits, the lowest index wins a tie"
    if top > 1:
        rule = f"among the {top} greatest stored logits, the lowest index first among equals"
    return f"{rule}; taken behind SOFTMAX" if graph.has_softmax else rule
