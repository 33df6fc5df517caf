"""Elided margins: logits are compared through the last layer, not bound by bound.

Let ``y`` be the label and ``j`` a rival, ``a_y`` and ``a_j`` their accumulators in the last layer.
For positive integers ``p_y``, ``p_j`` (their multipliers in common units, rounded) let ``E`` be a
lower bound of ``p_y * a_y - p_j * a_j``; over a box of the layer's input the least value is one
exact integer sum. The stored logit ``q`` is a staircase of its accumulator. Let ``k`` be a level
that ``q_j`` can reach, ``a_k`` the least accumulator that reaches it, and ``t`` the least one with
which ``q_y`` reaches ``k + gap``. "``q_y >= q_j + gap`` for all inputs" holds if and only if the
bounds leave no pair with ``a_j >= a_k`` and ``a_y <= t - 1``, for any such level:

    E >= p_y * (t - 1) - p_j * a_k + 1

The greatest right-hand side is the margin that is *needed*; where ``E`` reaches it, the pair is
proved. Saturation needs no rule of its own: where ``q_j`` can be at the upper clamp and the gap is
1, ``q_y`` cannot reach ``k + gap``, ``t - 1`` is the greatest ``a_y`` there is, and only a margin
that keeps ``q_j`` away from the clamp will do.

Int8 logits have few levels, and ``t`` and ``a_k`` come from a table. Wider ones, see
``margin_wide``. Any positive ``p`` give a sound proof; the multipliers give the tight one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge.certify import margin_wide
from cactus_edge.certify.margin_steps import Staircases
from cactus_edge.constraints import ACCUMULATOR_LIMIT
from cactus_edge.graph import (
    BoolArray,
    Conv2D,
    DepthwiseConv2D,
    DType,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Padding,
    Reshape,
)

_PAIRS = 1024
_NARROW_LEVELS = 256
# Above and below every accumulator, and small enough that products with ``parts`` fit int64.
_NEVER = 1 << 40
_ANY = -(1 << 60)


@dataclass(frozen=True, eq=False)
class LastLayer:
    """The layer that computes the logits, as a matrix on its flattened input.

    ``weights`` int64 [classes, inputs]; ``parts`` int64 [classes] are the integers p above.
    ``thresholds`` int64 [classes, levels]: the least accumulator that reaches each level within
    the clamp, the lowest included; None for logits of more than 256 levels, or behind int16.
    """

    source: int
    weights: Int64Array
    bias: Int64Array
    zero_point: int
    staircases: Staircases
    parts: Int64Array
    thresholds: Int64Array | None


def last_layer(graph: Graph) -> LastLayer | None:
    """The last layer of a resolved graph; None where the logits are no linear map of one tensor."""
    tensor = graph.logits
    for op in reversed(graph.core):
        if op.output != tensor:
            continue
        if isinstance(op, Reshape):
            tensor = op.inputs[0]
            continue
        return _matrix(graph, op) if isinstance(op, Linear) else None
    return None


def _matrix(graph: Graph, op: Linear) -> LastLayer | None:
    source = graph.tensors[op.inputs[0]]
    if isinstance(op, DepthwiseConv2D):
        return None
    if isinstance(op, Conv2D):
        whole = op.weights.values.shape[1:3] == source.shape[1:3] and op.dilation == (1, 1)
        inside = op.padding is Padding.VALID or source.shape[1:3] == (1, 1)
        if not (whole and inside):
            return None
    else:
        assert isinstance(op, FullyConnected)
    parameters = op.requantization
    assert parameters is not None, "graph is not resolved"
    limits = graph.output_range(op)
    # The table reaches as far as accumulators of int8 inputs.
    narrow = limits[1] - limits[0] < _NARROW_LEVELS and source.dtype is not DType.INT16
    staircases = Staircases(parameters, graph.tensors[op.output].zero_point, limits)
    return LastLayer(
        source=op.inputs[0],
        weights=op.weights.values.astype(np.int64).reshape(op.channels, -1),
        bias=op.bias.astype(np.int64),
        zero_point=source.zero_point,
        staircases=staircases,
        parts=_parts(staircases),
        thresholds=_thresholds(staircases) if narrow else None,
    )


def _parts(staircases: Staircases) -> Int64Array:
    """Multipliers in common units, rounded to integers of 4 bits more than the logits have.

    At least 12 bits, at most 28: with accumulators below 2**27 every margin fits int64. So it does
    with int16 logits, of which they have 21, and accumulators below 2**35.
    """
    factors = [staircases.factor(c) for c in range(staircases.parameters.rounding.size)]
    largest = max(factors)
    if min(factors) == largest:
        return np.ones(len(factors), np.int64)
    bits = (staircases.limits[1] - staircases.limits[0]).bit_length() + 4
    units = 1 << min(28, max(12, bits))
    shares = [factor / largest for factor in factors]  # exact: Fractions
    return np.array([max(1, round(share * units)) for share in shares], np.int64)


def _thresholds(staircases: Staircases) -> Int64Array:
    """Int64 [classes, levels], over every accumulator that a valid graph can have."""
    classes = staircases.parameters.rounding.size
    lower, upper = staircases.limits
    levels = np.tile(np.arange(lower, upper + 1, dtype=np.int64), (classes, 1))
    ends = (np.array(sign * ACCUMULATOR_LIMIT) for sign in (-1, 1))
    found = staircases.least(levels, np.arange(classes)[:, None], *ends)
    found[found > ACCUMULATOR_LIMIT] = _NEVER
    found[found == -ACCUMULATOR_LIMIT] = -_NEVER
    return found


def wins(
    layer: LastLayer,
    lower: Int64Array,
    upper: Int64Array,
    labels: Int64Array,
    gaps: Int64Array,
) -> tuple[BoolArray, BoolArray]:
    """Which rivals the label beats everywhere in each box.

    Args:
        layer: of the resolved graph.
        lower: int64 [samples, inputs], stored integers of the layer's input; ``upper`` likewise.
        upper: see ``lower``.
        labels: int64 [samples].
        gaps: int64 [samples, classes], the lead that the label needs.

    Returns:
        bool [samples, classes] twice: proved by comparing stored bounds, and proved by either way.
    """
    low, high = lower - layer.zero_point, upper - layer.zero_point
    positive, negative = np.maximum(layer.weights, 0), np.minimum(layer.weights, 0)
    least = low @ positive.T + high @ negative.T + layer.bias
    most = high @ positive.T + low @ negative.T + layer.bias
    rows = np.arange(len(labels))
    channels = np.arange(len(layer.bias))
    stored_most = layer.staircases.stored(most, channels)
    stored_least = layer.staircases.stored(least, channels)
    plain = stored_least[rows, labels][:, None] >= stored_most + gaps
    plain[rows, labels] = True
    proved = plain.copy()
    for label in np.unique(labels).tolist():
        chosen = np.flatnonzero((labels == label) & ~plain.all(axis=1))
        if not chosen.size:
            continue
        own = int(layer.parts[label])
        combined = own * layer.weights[label] - layer.parts[:, None] * layer.weights
        constant = own * layer.bias[label] - layer.parts * layer.bias
        margin = low[chosen] @ np.maximum(combined, 0).T + high[chosen] @ np.minimum(combined, 0).T
        margin += constant
        sample, rival = np.nonzero(~plain[chosen])
        sample_index = chosen[sample]
        for start in range(0, sample.size, _PAIRS):
            part = slice(start, start + _PAIRS)
            index, other = sample_index[part], rival[part]
            proved[index, other] = _pairs(
                layer,
                label,
                other,
                margin[sample[part], other],
                (least[index, other], most[index, other]),
                (least[index, label], most[index, label]),
                gaps[index, other],
            )
    return plain, proved


def needed_margin(
    layer: LastLayer,
    label: int,
    rival: int,
    gap: int,
    own_bounds: tuple[int, int],
    rival_bounds: tuple[int, int],
) -> int | None:
    """The least ``E`` such that ``p_label * a_label - p_rival * a_rival >= E`` proves the pair.

    Args:
        layer: of the resolved graph; ``layer.parts`` are the integers p.
        label: the logit that has to lead.
        rival: the logit that it has to lead.
        gap: by how many stored steps.
        own_bounds: least and greatest accumulator of ``label``.
        rival_bounds: least and greatest accumulator of ``rival``.

    Returns:
        ``E``, exact for int8 logits and at most a step too large for wider ones. Where the bounds
        are proof enough, the ``E`` that follows from them. None where the label's greatest logit
        does not lead the rival's greatest one (both can saturate, say): however great ``a_label``,
        the rival has to be kept from its last steps first, which is a claim about ``a_rival``.
    """
    ends = np.array([own_bounds[1], rival_bounds[1]], np.int64)
    own_most, rival_most = layer.staircases.stored(ends, np.array([label, rival])).tolist()
    if own_most < rival_most + gap:
        return None
    least = int(layer.parts[label]) * own_bounds[0] - int(layer.parts[rival]) * rival_bounds[1]
    return max(least, _single(layer, label, rival, gap, own_bounds, rival_bounds))


def proved(
    layer: LastLayer,
    label: int,
    rival: int,
    gap: int,
    margin: int,
    own_bounds: tuple[int, int],
    rival_bounds: tuple[int, int],
) -> bool:
    """Whether ``p_label * a_label - p_rival * a_rival >= margin`` proves the pair.

    Arguments as for ``needed_margin``, which is the least margin that does where it is not None.
    Elsewhere a margin is proof that keeps the rival from the steps that the label cannot lead, and
    so is one that no pair of accumulators has at all: then there is no input.
    """
    least = int(layer.parts[label]) * own_bounds[0] - int(layer.parts[rival]) * rival_bounds[1]
    return max(margin, least) >= _single(layer, label, rival, gap, own_bounds, rival_bounds)


def _single(
    layer: LastLayer,
    label: int,
    rival: int,
    gap: int,
    own_bounds: tuple[int, int],
    rival_bounds: tuple[int, int],
) -> int:
    own, other = (
        (np.array([least], np.int64), np.array([most], np.int64))
        for least, most in (own_bounds, rival_bounds)
    )
    return int(_needed(layer, label, np.array([rival]), other, own, np.array([gap]))[0])


def _pairs(
    layer: LastLayer,
    label: int,
    rivals: Int64Array,
    margin: Int64Array,
    rival_bounds: tuple[Int64Array, Int64Array],
    own_bounds: tuple[Int64Array, Int64Array],
    gap: Int64Array,
) -> BoolArray:
    """Bool [pairs]: the argument of the module's docstring."""
    implied = layer.parts[label] * own_bounds[0] - layer.parts[rivals] * rival_bounds[1]
    needed = _needed(layer, label, rivals, rival_bounds, own_bounds, gap)
    return np.maximum(margin, implied) >= needed


def _needed(
    layer: LastLayer,
    label: int,
    rivals: Int64Array,
    rival_bounds: tuple[Int64Array, Int64Array],
    own_bounds: tuple[Int64Array, Int64Array],
    gap: Int64Array,
) -> Int64Array:
    """Int64 [pairs]: the needed margin; ``_ANY`` where the bounds alone are proof."""
    if layer.thresholds is None:
        own = np.full(rivals.size, layer.parts[label])
        pairs = margin_wide.Pairs(
            layer.staircases,
            label,
            rivals,
            own,
            layer.parts[rivals],
            own_bounds,
            rival_bounds,
            gap,
        )
        return margin_wide.needed(pairs, _ANY)
    levels = layer.thresholds.shape[1]
    reached = np.arange(levels)[None, :] + gap[:, None]
    own_point = layer.thresholds[label][np.minimum(reached, levels - 1)]
    own_point = np.where(reached < levels, own_point, _NEVER)
    rival_point = layer.thresholds[rivals]
    possible = rival_point <= rival_bounds[1][:, None]
    possible &= own_point > own_bounds[0][:, None]
    own_point = np.minimum(own_point - 1, own_bounds[1][:, None])
    rival_point = np.maximum(rival_point, rival_bounds[0][:, None])
    needed = layer.parts[label] * own_point - layer.parts[rivals][:, None] * rival_point + 1
    return np.where(possible, needed, _ANY).max(axis=1)
