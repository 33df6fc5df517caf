"""Channels on which no result depends, taken out of a graph before its weights are packed.

Pruning leaves channels that nothing reads, and channels without a weight, which have one value for
every input. Two passes find them all. *Forwards*: what a layer reads of constant channels moves
into its bias, which may leave further channels without a weight. *Backwards*: a channel is read
where a reader has a weight on it in a channel that is read itself.

Tensors that are joined element by element (pools, PAD, RESHAPE, ADD and depthwise convolutions)
are cut together. Their elements, in order, fall into classes modulo the greatest number that
divides all their channels; a class goes where no tensor needs it. So flattened features go with the
channel that they come from, and a sum with both operands.

Nothing here is certified: bounds are those of the shipped weights. The accumulators of channels
that are read stay what they are, and so do all values that are wanted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable
from dataclasses import replace

import numpy as np

from cactus_edge import semantics
from cactus_edge.constraints import validate
from cactus_edge.errors import InvalidGraphError
from cactus_edge.execute import requantize, run_operator
from cactus_edge.graph import (
    EDGES,
    Add,
    BoolArray,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Operator,
    Pad,
    Pool2D,
    Requantization,
    Reshape,
    Weights,
    window_geometry,
)
from cactus_edge.operators import TABLED, Move

_log = logging.getLogger(__name__)

_VARIES = 1 << 40
"""Stands for the value of a channel that is not known to be the same for every input."""


def compact(graph: Graph, wanted: Collection[int]) -> Graph:
    """A graph with fewer channels that gives the same values of some tensors for every input.

    It has the same operators and tensors in the same order. Input, logits and ``wanted`` keep
    their shape, and every tensor at least one channel; what is left in other tensors that nothing
    reads is arbitrary.

    Args:
        graph: resolved and validated.
        wanted: integer activations, by tensor index.

    Returns:
        ``graph`` itself where no tensor loses a channel, where what is left would break a
        constraint, or where it has tables or moved elements.
    """
    if any(isinstance(op, (*TABLED, Move)) for op in graph.core):
        return graph  # they join channels in ways that the families below do not describe
    whole = {graph.core_input, graph.logits, *wanted}
    operators, needed = _read(graph, _folded(graph), {graph.logits, *wanted})
    kept = _kept(graph, needed, whole)
    if all(mask.all() for mask in kept.values()):
        return graph
    tensors = list(graph.tensors)
    for index, mask in kept.items():
        shape = tensors[index].shape
        tensors[index] = replace(tensors[index], shape=(*shape[:-1], int(mask.sum())))
    cut = (_cut(op, kept) if isinstance(op, Linear) else op for op in operators)
    smaller = replace(graph, tensors=tuple(tensors), operators=tuple(cut))
    try:
        validate(smaller)
    except InvalidGraphError as error:
        _log.warning("no channels are left out: %s", error)
        return graph
    return smaller


# ---------------------------------------------------------------------- forwards: constants
def _folded(graph: Graph) -> list[Operator]:
    """The operators, with what layers read of constant channels in their biases."""
    # The values of each tensor's channels, int64 [channels], or _VARIES.
    constants = {graph.core_input: np.full(_channels(graph, graph.core_input), _VARIES)}
    operators: list[Operator] = []
    for op in graph.operators:
        operators.append(op)
        if isinstance(op, EDGES):
            continue
        if isinstance(op, Linear):
            op = operators[-1] = _fold(graph, op, constants[op.inputs[0]])
        constants[op.output] = _constants(graph, op, [constants[i] for i in op.inputs])
    return operators


def _fold(graph: Graph, op: Linear, constant: Int64Array) -> Linear:
    """``op`` without weights on constant channels, where it reads them at every position alike."""
    distance = constant - graph.tensors[op.inputs[0]].zero_point
    settled = constant != _VARIES
    if isinstance(op, Conv2D) and _pads(graph, op):
        settled &= distance == 0  # the padding's
    if not settled.any():
        return op
    # Int64, because NumPy would sum in less; no sum reaches 2**31 where the graph is valid: each
    # input stays within what its producer may store, for which accumulators were bounded.
    values = op.weights.values
    if isinstance(op, DepthwiseConv2D):
        settled, distance = (np.repeat(v, op.channels // v.size) for v in (settled, distance))
        moved = values.sum(axis=(0, 1, 2), dtype=np.int64) * np.where(settled, distance, 0)
        values = np.where(settled, np.int8(0), values)
    else:
        matrix = values.reshape(op.channels, -1, constant.size)
        moved = matrix[..., settled].sum(axis=1, dtype=np.int64) @ distance[settled]
        values = np.where(settled, np.int8(0), matrix).reshape(values.shape)
    return replace(op, weights=replace(op.weights, values=values), bias=op.bias + moved)


def _constants(graph: Graph, op: Operator, inputs: list[Int64Array]) -> Int64Array:
    """Values of the output's channels that are the same at every position for every input."""
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    known = inputs[0] != _VARIES
    match op:
        case Linear():
            assert op.requantization is not None, "graph is not resolved"
            known = ~_has_weights(op)
            limits = graph.output_range(op)
            bias = op.bias.astype(np.int64)
            values = requantize(bias, op.requantization, target.zero_point, limits)
        case Add():
            known = known & (inputs[1] != _VARIES)
            values = run_operator(graph, op, [np.where(known, v, 0) for v in inputs])
        case Pool2D():  # the maximum and the mean of equal integers are that integer
            values = semantics.clamp(inputs[0], *graph.output_range(op))  # pyright: ignore
        case Pad():
            values = inputs[0]
            if np.any(op.paddings):
                known = known & (values == source.zero_point)
        case Reshape():
            elements = np.tile(inputs[0], source.size // inputs[0].size)
            elements = elements.reshape(-1, target.shape[-1])
            values = elements[0]
            known = (elements == values).all(axis=0)
        case _:
            raise AssertionError(f"{op.kind} is not part of the integer core")
    return np.where(known, values, _VARIES)


def _pads(graph: Graph, op: Conv2D) -> bool:
    """Whether a convolution reads anything outside its input."""
    extents, kernel = graph.tensors[op.inputs[0]].shape[1:3], op.weights.values.shape[1:3]
    return any(
        any(window_geometry(extents[a], kernel[a], op.stride[a], op.dilation[a], op.padding)[1:])
        for a in (0, 1)
    )


# ---------------------------------------------------------------------- backwards: what is read
def _read(
    graph: Graph, operators: Iterable[Operator], wanted: Collection[int]
) -> tuple[list[Operator], dict[int, BoolArray]]:
    """The operators without weights of unread channels, and which channels are read, [channels]."""
    core = {graph.core_input, *(op.output for op in graph.core)}
    needed = {tensor: np.full(_channels(graph, tensor), tensor in wanted) for tensor in core}
    found: list[Operator] = []
    for op in reversed(list(operators)):
        found.append(op)
        if isinstance(op, EDGES):
            continue
        mask = needed[op.output]
        if isinstance(op, Linear):
            op = found[-1] = _only(op, mask)
        for source in op.inputs:
            needed[source] |= _needs(graph, op, mask)
    return found[::-1], needed


def _only(op: Linear, needed: BoolArray) -> Linear:
    """``op`` without weights in output channels that are not needed."""
    if (needed | ~_has_weights(op)).all():
        return op
    rows = needed if isinstance(op, DepthwiseConv2D) else _column(needed, op)
    values = np.where(rows, op.weights.values, np.int8(0))
    return replace(op, weights=replace(op.weights, values=values))


def _needs(graph: Graph, op: Operator, needed: BoolArray) -> BoolArray:
    """Channels of an input that are read for those of the output that are needed."""
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    if isinstance(op, DepthwiseConv2D):
        return _has_weights(op).reshape(source.shape[-1], -1).any(axis=1)
    if isinstance(op, Linear):
        return op.weights.values.reshape(-1, source.shape[-1]).any(axis=0)
    if isinstance(op, Reshape):
        elements = np.tile(needed, target.size // needed.size)
        return elements.reshape(-1, source.shape[-1]).any(axis=0)
    return needed


def _has_weights(op: Linear) -> BoolArray:
    """Whether an output channel has a weight that is not 0, [out]."""
    if isinstance(op, DepthwiseConv2D):
        return op.weights.values.any(axis=(0, 1, 2))
    return op.weights.values.reshape(op.channels, -1).any(axis=1)


def _column(mask: BoolArray, op: Linear) -> BoolArray:
    return mask.reshape(-1, *[1] * (op.weights.values.ndim - 1))


# ---------------------------------------------------------------------- removal
def _kept(
    graph: Graph, needed: dict[int, BoolArray], whole: Collection[int]
) -> dict[int, BoolArray]:
    """Which channels of each tensor stay, [channels]."""
    kept: dict[int, BoolArray] = {}
    for family, loose in _families(graph):
        classes = math.gcd(*(_channels(graph, tensor) for tensor in family))
        if not loose or not family.isdisjoint(whole):
            stays = np.ones(classes, bool)
        else:
            parts = [needed[tensor].reshape(-1, classes) for tensor in family]
            stays = np.concatenate(parts).any(axis=0)
            stays[0] |= not stays.any()  # a tensor has at least one channel
        for tensor in family:
            kept[tensor] = np.tile(stays, _channels(graph, tensor) // classes)
    return kept


def _families(graph: Graph) -> list[tuple[set[int], bool]]:
    """Tensors that have to be cut together, and whether they can be."""
    families = {graph.core_input: {graph.core_input}}
    fixed: set[int] = set()
    for op in graph.core:
        families[op.output] = {op.output}
        if isinstance(op, DepthwiseConv2D):
            channels = _channels(graph, op.inputs[0])
            if channels == 1:
                continue  # every output channel reads the same one
            if op.channels != channels:
                fixed |= {op.inputs[0], op.output}
        elif isinstance(op, Linear):
            continue
        for source in op.inputs:
            joined = families[source] | families[op.output]
            families |= dict.fromkeys(joined, joined)
    distinct = {id(family): family for family in families.values()}
    return [(family, family.isdisjoint(fixed)) for family in distinct.values()]


def _cut(op: Linear, kept: dict[int, BoolArray]) -> Linear:
    """``op`` between smaller tensors."""
    rows, columns = kept[op.output], kept[op.inputs[0]]
    if rows.all() and columns.all():
        return op
    values, scales = op.weights.values, op.weights.scale_bits
    if isinstance(op, DepthwiseConv2D):
        values = values[..., rows]
    else:
        if isinstance(op, FullyConnected):  # flattens
            columns = np.tile(columns, values.shape[1] // columns.size)
        values = values[rows][..., columns]
    given = op.requantization
    assert given is not None, "graph is not resolved"
    return replace(
        op,
        weights=Weights(values, op.weights.bits, scales[rows] if scales.size > 1 else scales),
        bias=op.bias[rows],
        requantization=Requantization(
            given.rounding[rows], given.multiplier[rows], given.shift[rows]
        ),
    )


def _channels(graph: Graph, tensor: int) -> int:
    return graph.tensors[tensor].shape[-1]
