"""The twin: a graph whose forward pass is the interval propagation of another graph.

For a linear layer with a monotone epilogue the bounds (lower, upper) are the output of a layer with
weights ``[[W+, W-], [W-, W+]]`` and the same bias, multiplier, shift and clamp on the stacked input
(lower, upper). Sums, pools and clamps are monotone in each argument and apply to both halves. So
the certifier has no arithmetic of its own: it rewrites the graph and runs an ordinary executor.

The twin of a *resolved* graph keeps its integers, channel by channel, so that the shapes of the
twin (twice the channels) never decide how anything is rounded. The twin of a graph with scales
keeps the scales, from which a runtime derives integers anew; ``twin_model`` says where they are the
same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.graph import (
    Add,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int8Array,
    Int64Array,
    Linear,
    Operator,
    Pad,
    Pool2D,
    Requantization,
    Reshape,
    Stored,
    Tensor,
    Weights,
)
from cactus_edge.operators import Lookup, Mean, Rows, Unary
from cactus_edge.profiles import is_resolved
from cactus_edge.semantics import Rounding

_LARGEST_PERMUTATION = 4096
_HALF = np.array([0x3F000000], np.uint32)  # the pattern of 1/2 in float32
_NO_SCALE = np.zeros(0, np.uint32)


@dataclass(frozen=True, eq=False)
class Twin:
    """``graph`` computes bounds; ``halves[t]`` are the flat positions of both bounds of tensor t.

    Tensor indices are those of the original graph.
    """

    graph: Graph
    halves: dict[int, tuple[Int64Array, Int64Array]]

    def stack(self, lower: Int64Array, upper: Int64Array) -> Int64Array:
        """The twin's input from a box: int64 [samples, *input shape with the last axis doubled]."""
        index = self.graph.input
        low, high = self.halves[index]
        stacked = np.empty((len(lower), low.size + high.size), np.int64)
        stacked[:, low] = lower.reshape(len(lower), -1)
        stacked[:, high] = upper.reshape(len(upper), -1)
        return stacked.reshape(-1, *self.graph.tensors[index].shape[1:])

    def split(self, tensor: int, values: Stored) -> tuple[Int64Array, Int64Array]:
        """(lower, upper), each int64 [samples, elements], of an original tensor."""
        flat = values.reshape(len(values), -1).astype(np.int64)
        low, high = self.halves[tensor]
        return flat[:, low], flat[:, high]


def twin(graph: Graph, *, tables: bool = False) -> Twin:
    """The twin of a graph, from its integer input to its logits; resolved if the graph is.

    Args:
        graph: with scales, or resolved.
        tables: take functions of one value, too, where they do not fall anywhere. Without scales
            that is seen in the table; with them, ``twin_model`` looks at each profile's.

    Raises:
        UnsupportedModelError: a RESHAPE splits the channels of a large tensor that a convolution, a
            pool or an ADD then reads; or an operator is a table that falls or moves elements.
    """
    tensors = [_doubled(tensor) for tensor in graph.tensors]
    halves = {graph.core_input: _stacked(graph.tensors[graph.core_input])}
    operators: list[Operator] = []
    for op in graph.core:
        sources = [halves[index] for index in op.inputs]
        halves[op.output] = (
            sources[0] if isinstance(op, Reshape) else _stacked(graph.tensors[op.output])
        )
        if tables and isinstance(op, Lookup):
            doubled = _table(op)
        else:
            doubled = _rewrite(graph, op, sources[0])
        if not (isinstance(op, Reshape) or _reads_any_order(graph, op)):
            inputs = tuple(
                _stack_again(graph, tensors, operators, index, source)
                for index, source in zip(op.inputs, sources, strict=True)
            )
            doubled = replace(doubled, inputs=inputs)
        operators.append(doubled)
    whole = Graph(tuple(tensors), tuple(operators), graph.core_input, graph.logits)
    return Twin(whole, halves)


def _reads_any_order(graph: Graph, op: Operator) -> bool:
    """Whether the columns of a layer's weights can follow its input: each is one element of it."""
    if isinstance(op, FullyConnected):
        return True
    if not isinstance(op, Conv2D) or isinstance(op, DepthwiseConv2D):
        return False
    ends = (graph.tensors[index] for index in (op.inputs[0], op.output))
    whole = all(end.shape[1:3] == (1, 1) for end in ends)
    return whole and op.weights.values.shape[1:3] == (1, 1)


def _doubled(tensor: Tensor) -> Tensor:
    return replace(tensor, shape=(*tensor.shape[:-1], 2 * tensor.shape[-1]))


def _stacked(tensor: Tensor) -> tuple[Int64Array, Int64Array]:
    """Positions when both halves are concatenated along the last axis."""
    channels = tensor.shape[-1]
    position = np.arange(tensor.size, dtype=np.int64)
    lower = position // channels * 2 * channels + position % channels
    return lower, lower + channels


def _stack_again(
    graph: Graph,
    tensors: list[Tensor],
    operators: list[Operator],
    index: int,
    source: tuple[Int64Array, Int64Array],
) -> int:
    """A tensor with the halves of ``index`` side by side along the last axis; itself if they are.

    A RESHAPE that changes the channels leaves the halves interleaved. They are put in order by a
    FULLY_CONNECTED layer that doubles each element and halves the sum, which is exact under every
    rounding. Between tensors with scales its weights have the scale 1/2.
    """
    tensor = graph.tensors[index]
    target = _stacked(tensor)
    if np.array_equal(source[0], target[0]):
        return index
    if tensor.size > _LARGEST_PERMUTATION:
        raise UnsupportedModelError(
            f"'{tensor.name}' comes from a RESHAPE that splits channels and has {tensor.size} "
            f"elements; up to {_LARGEST_PERMUTATION} can be certified"
        )
    permutation = np.zeros((2 * tensor.size, 2 * tensor.size), np.int8)
    for old, new in zip(source, target, strict=True):
        permutation[new, old] = 2
    scaled = not is_resolved(graph)
    halving = Requantization.uniform(Rounding.SINGLE, 1, 1, 2 * tensor.size)
    flat = Tensor(f"{tensor.name}/ordered", (1, 2 * tensor.size), tensor.dtype, tensor.quantization)
    tensors += [flat, _doubled(tensor)]
    operators.append(
        FullyConnected(
            name=flat.name,
            inputs=(index,),
            output=len(tensors) - 2,
            weights=Weights(permutation, 8, _HALF if scaled else _NO_SCALE),
            bias=np.zeros(2 * tensor.size, np.int32),
            requantization=None if scaled else halving,
        )
    )
    operators.append(
        Reshape(name=f"{tensor.name}/stacked", inputs=(len(tensors) - 2,), output=len(tensors) - 1)
    )
    return len(tensors) - 1


def _rewrite(graph: Graph, op: Operator, source: tuple[Int64Array, Int64Array]) -> Operator:
    match op:
        case Mean() | Rows() if op.requantization is None:
            raise UnsupportedModelError(
                f"{op.kind} '{op.name}' has no twin in a file: a convolution rounds otherwise"
            )
        case Linear():
            return _linear(graph, op, source)
        case Add() if op.requantization is None:
            return op
        case Add():
            return replace(op, clamp=graph.output_range(op))
        case Pad() | Reshape():
            return op
        case Pool2D():
            return replace(op, clamp=graph.output_range(op))
        case _:
            raise UnsupportedModelError(
                f"{op.kind} '{op.name}' has no twin: bounds of it are propagated another way"
            )


def _table(op: Lookup) -> Operator:
    if isinstance(op, Unary) and (op.table is None or not (np.diff(op.table) < 0).any()):
        return op
    raise UnsupportedModelError(
        f"{op.kind} '{op.name}' has no twin: of functions, only those of one value that fall "
        "nowhere apply to both bounds"
    )


def _linear(graph: Graph, op: Linear, source: tuple[Int64Array, Int64Array]) -> Linear:
    doubled = _twice(op.requantization)
    positive = np.maximum(op.weights.values, 0)
    negative = np.minimum(op.weights.values, 0)
    bias = np.tile(op.bias, 2)
    clamp = op.clamp if doubled is None else graph.output_range(op)
    if _reads_any_order(graph, op):
        low, high = source
        values = np.zeros((2 * op.channels, low.size + high.size), np.int8)
        for rows, same, other in ((0, low, high), (op.channels, high, low)):
            values[rows : rows + op.channels, same] = positive.reshape(op.channels, -1)
            values[rows : rows + op.channels, other] = negative.reshape(op.channels, -1)
        if isinstance(op, Conv2D):
            values = values[:, None, None, :]
        weights = _weights(op, values)
        return replace(op, weights=weights, bias=bias, clamp=clamp, requantization=doubled)
    assert isinstance(op, Conv2D)
    if isinstance(op, DepthwiseConv2D):
        channels = graph.tensors[op.inputs[0]].shape[-1]
        positive, negative = _spread(positive, channels), _spread(negative, channels)
    values = np.concatenate(
        [
            np.concatenate([positive, negative], axis=3),
            np.concatenate([negative, positive], axis=3),
        ]
    )
    return Conv2D(
        name=op.name,
        inputs=op.inputs,
        output=op.output,
        weights=_weights(op, values),
        bias=bias,
        activation=op.activation,
        clamp=clamp,
        requantization=doubled,
        stride=op.stride,
        dilation=op.dilation,
        padding=op.padding,
    )


def _twice(parameters: Requantization | None) -> Requantization | None:
    if parameters is None:
        return None
    parts = (parameters.rounding, parameters.multiplier, parameters.shift)
    return Requantization(*(np.tile(part, 2) for part in parts))


def _weights(op: Linear, values: Int8Array) -> Weights:
    """``values`` with the layer's width and scales, for both halves of the channels."""
    old = op.weights
    scale_bits = np.tile(old.scale_bits, 2) if old.per_channel else old.scale_bits
    return Weights(values, old.bits, scale_bits)


def _spread(values: Int8Array, channels: int) -> Int8Array:
    """Depthwise weights [1, kh, kw, out] as a convolution's [out, kh, kw, channels]."""
    outputs = values.shape[-1]
    spread = np.zeros((outputs, *values.shape[1:3], channels), np.int8)
    index = np.arange(outputs)
    spread[index, :, :, index // (outputs // channels)] = np.moveaxis(values[0], 2, 0)
    return spread
