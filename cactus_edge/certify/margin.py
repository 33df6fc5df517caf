"""Elided margins: logits are compared through the last layer, not bound by bound.

Let ``y`` be the label and ``j`` a rival, ``a_y`` and ``a_j`` their accumulators in the last layer.
For positive integers ``p_y``, ``p_j`` (their multipliers in common units, rounded) the least value
``E`` of ``p_y * a_y - p_j * a_j`` over the box of the layer's input is one exact integer sum, and
therefore ``a_y >= ceil((E + p_j * a_j) / p_y)``. The stored logit ``q`` is a staircase of its
accumulator, so "``q_y >= q_j + gap`` everywhere in the box" follows when it holds for the least
``a_j`` of each step that ``j`` can reach, with ``a_y`` at that bound or at its own least value,
whichever is greater. Saturation needs no rule of its own: where ``q_j`` can be at the upper clamp
and the gap is 1, no ``q_y`` is greater and the proof fails, as it must.

Any positive ``p`` give a sound proof; the multipliers give the tight one.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cactus_edge import semantics
from cactus_edge.constraints import accumulator_bounds
from cactus_edge.graph import (
    BoolArray,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Padding,
    Requantization,
    Reshape,
)
from cactus_edge.semantics import Rounding
from cactus_edge.universal import step_points

_UNITS = 1 << 12
_PAIRS = 2048


@dataclass(frozen=True, eq=False)
class LastLayer:
    """The layer that computes the logits, as a matrix on its flattened input.

    ``weights`` int64 [classes, inputs]; ``parts`` int64 [classes] are the integers p above.
    """

    source: int
    weights: Int64Array
    bias: Int64Array
    zero_point: int
    output_zero_point: int
    limits: tuple[int, int]
    parameters: Requantization
    parts: Int64Array
    steps: Int64Array


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
    output_zero_point = graph.tensors[op.output].zero_point
    limits = graph.output_range(op)
    lower, upper = accumulator_bounds(graph, op)
    steps = np.stack(
        [
            step_points(
                Requantization(*(part[c : c + 1] for part in _arrays(parameters))),
                lower[c : c + 1],
                upper[c : c + 1],
                output_zero_point,
                limits,
            )[:, 0]
            for c in range(op.channels)
        ],
        axis=1,
    )
    return LastLayer(
        source=op.inputs[0],
        weights=op.weights.values.astype(np.int64).reshape(op.channels, -1),
        bias=op.bias.astype(np.int64),
        zero_point=source.zero_point,
        output_zero_point=output_zero_point,
        limits=limits,
        parameters=parameters,
        parts=_parts(parameters),
        steps=steps,
    )


def _arrays(parameters: Requantization) -> tuple[Int64Array, Int64Array, Int64Array]:
    return parameters.rounding, parameters.multiplier, parameters.shift


def _parts(parameters: Requantization) -> Int64Array:
    """Multipliers in common units, rounded to integers in [1, 4096]."""
    factors: list[Fraction] = []
    for code, multiplier, shift in zip(*(a.tolist() for a in _arrays(parameters)), strict=True):
        double = code in (Rounding.DOUBLE_HALF_AWAY, Rounding.DOUBLE_HALF_UP)
        factors.append(Fraction(multiplier, 1 << (shift + 31 if double else shift)))
    largest = max(factors)
    if min(factors) == largest:
        return np.ones(len(factors), np.int64)
    shares = [factor / largest for factor in factors]  # exact: Fractions
    return np.array([max(1, round(share * _UNITS)) for share in shares], np.int64)


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
    stored_most = stored(layer, most, channels)
    stored_least = stored(layer, least, channels)
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


def _pairs(
    layer: LastLayer,
    label: int,
    rivals: Int64Array,
    margin: Int64Array,
    rival_bounds: tuple[Int64Array, Int64Array],
    own_bounds: tuple[Int64Array, Int64Array],
    gap: Int64Array,
) -> BoolArray:
    """Bool [pairs]: the staircase argument of the module's docstring."""
    points = np.clip(layer.steps[:, rivals].T, *(bound[:, None] for bound in rival_bounds))
    own = int(layer.parts[label])
    needed = margin[:, None] + layer.parts[rivals][:, None] * points
    # Both ends bound a_y, so clipping to the upper one only weakens the proof, never overflows.
    own_point = np.clip(-(-needed // own), *(bound[:, None] for bound in own_bounds))
    rival_stored = stored(layer, points, np.broadcast_to(rivals[:, None], points.shape))
    own_stored = stored(layer, own_point, np.full(points.shape, label))
    return (own_stored >= rival_stored + gap[:, None]).all(axis=1)


def stored(layer: LastLayer, accumulator: Int64Array, channels: Int64Array) -> Int64Array:
    """Stored logits of accumulators; ``channels`` broadcasts against them."""
    channel = np.broadcast_to(channels, accumulator.shape)
    output = np.empty_like(accumulator)
    codes = layer.parameters.rounding[channel]
    for code in np.unique(codes).tolist():
        chosen = codes == code
        index = channel[chosen]
        output[chosen] = semantics.REQUANTIZE[Rounding(code)](
            accumulator[chosen],
            layer.parameters.multiplier[index],
            layer.parameters.shift[index],
        )
    return semantics.clamp(output + layer.output_zero_point, *layer.limits)  # pyright: ignore
