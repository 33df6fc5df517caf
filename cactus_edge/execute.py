"""The reference executor: dense, slow, obviously right; every other executor equals it.

Accumulators are NumPy int64 sums, one kernel tap at a time; everything else is a function of
``semantics``. Nothing here is float.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cactus_edge import operators, profiles, semantics
from cactus_edge.errors import DataError
from cactus_edge.graph import (
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    MaxPool2D,
    Operator,
    Pad,
    Padding,
    Pool2D,
    Requantization,
    Reshape,
    Tensor,
    window_geometry,
)
from cactus_edge.operators import Lookup, Move, Pair
from cactus_edge.semantics import Rounding

__all__ = ["execute", "execute_all"]


def execute(graph: Graph, batch: npt.ArrayLike, profile: str = profiles.DEFAULT) -> Int64Array:
    """Logits of a batch of stored integers.

    Args:
        graph: resolved, or else resolved here under ``profile``.
        batch: integers [samples, *shape of the graph's integer input without the leading 1].
        profile: name of a rounding profile, ignored by operators that are resolved already.

    Returns:
        int64 [samples, *shape of the logits without the leading 1].
    """
    return execute_all(graph, batch, profile)[graph.logits]


def execute_all(
    graph: Graph, batch: npt.ArrayLike, profile: str = profiles.DEFAULT
) -> dict[int, Int64Array]:
    """Every activation, by tensor index: the layer-by-layer form of ``execute``."""
    resolved = profiles.resolve(graph, profile)
    values = {graph.core_input: check_input(graph, batch)}
    for op in resolved.core:
        values[op.output] = run_operator(resolved, op, [values[i] for i in op.inputs])
    return values


def check_input(graph: Graph, batch: npt.ArrayLike) -> Int64Array:
    """``batch`` as int64.

    Raises:
        DataError: not integers, another shape, or values outside the input's type.
    """
    array = np.asarray(batch)
    tensor = graph.tensors[graph.core_input]
    if array.dtype.kind not in "iu":
        raise DataError(f"input must be stored integers, got {array.dtype}; quantize it first")
    if array.shape[1:] != tensor.shape[1:] or array.ndim != len(tensor.shape):
        raise DataError(
            f"input has shape {list(array.shape)}, the model takes [n, "
            f"{', '.join(map(str, tensor.shape[1:]))}]"
        )
    lower, upper = tensor.dtype.range
    if array.size and not (lower <= int(array.min()) and int(array.max()) <= upper):
        raise DataError(f"input holds values outside {tensor.dtype.value}")
    return array.astype(np.int64)


def run_operator(graph: Graph, op: Operator, inputs: list[Int64Array]) -> Int64Array:
    """One operator of a resolved graph on int64 activations [samples, ...]."""
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    limits = graph.output_range(op)
    match op:
        case Linear():
            accumulator = accumulate(op, source, inputs[0])
            assert op.requantization is not None, "graph is not resolved"
            return requantize(accumulator, op.requantization, target.zero_point, limits)
        case Add():
            assert op.requantization is not None, "graph is not resolved"
            a, b = (x - graph.tensors[i].zero_point for x, i in zip(inputs, op.inputs, strict=True))
            rounded = semantics.ADD[op.requantization.rounding](a, b, *op.requantization.integers)
            return semantics.clamp(rounded + target.zero_point, *limits)  # pyright: ignore
        case Pool2D():
            return semantics.clamp(pool(op, inputs[0]), *limits)  # pyright: ignore
        case Pad():
            return np.pad(inputs[0], op.paddings, constant_values=source.zero_point)
        case Reshape():
            return inputs[0].reshape(-1, *target.shape[1:])
        case Lookup():
            return operators.looked_up(graph, op, inputs[0])
        case Pair():
            return operators.paired(graph, op, *inputs)
        case Move():
            return operators.moved(graph, op, inputs)
        case _:
            raise AssertionError(f"{op.kind} is not part of the integer core")


def requantize(
    accumulator: Int64Array,
    parameters: Requantization,
    zero_point: int,
    limits: tuple[int, int],
) -> Int64Array:
    """Stored integers from accumulators [..., channels], channel by channel."""
    output = np.empty_like(accumulator)
    for code in np.unique(parameters.rounding).tolist():
        chosen = parameters.rounding == code
        output[..., chosen] = semantics.REQUANTIZE[Rounding(code)](
            accumulator[..., chosen], parameters.multiplier[chosen], parameters.shift[chosen]
        )
    return semantics.clamp(output + zero_point, *limits)  # pyright: ignore


def accumulate(op: Linear, source: Tensor, x: Int64Array) -> Int64Array:
    """Bias plus the sum of weights times (input less its zero point), int64."""
    weights = op.weights.values.astype(np.int64)
    offset = x - source.zero_point
    if isinstance(op, FullyConnected):
        return offset.reshape(len(x), -1) @ weights.T + op.bias
    assert isinstance(op, Conv2D)
    taps = windows(offset, weights.shape[1:3], op.stride, op.dilation, op.padding, fill=0)
    total = np.int64(0)
    for (row, column), patch in taps:
        if isinstance(op, DepthwiseConv2D):
            repeats = op.channels // patch.shape[-1]
            total = total + np.repeat(patch, repeats, axis=-1) * weights[0, row, column]
        else:
            total = total + patch @ weights[:, row, column].T
    return total + op.bias.astype(np.int64)


def windows(
    x: Int64Array,
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: Padding,
    fill: int,
) -> list[tuple[tuple[int, int], Int64Array]]:
    """For each kernel tap the strided view [samples, out height, out width, channels] it reads."""
    geometry = [
        window_geometry(x.shape[1 + a], kernel[a], stride[a], dilation[a], padding) for a in (0, 1)
    ]
    borders = [(0, 0), geometry[0][1:], geometry[1][1:], (0, 0)]
    padded = np.pad(x, borders, constant_values=fill)
    views: list[tuple[tuple[int, int], Int64Array]] = []
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            top, left = row * dilation[0], column * dilation[1]
            bottom = top + (geometry[0][0] - 1) * stride[0] + 1
            right = left + (geometry[1][0] - 1) * stride[1] + 1
            view = padded[:, top : bottom : stride[0], left : right : stride[1]]
            views.append(((row, column), view))
    return views


def pool(op: Pool2D, x: Int64Array) -> Int64Array:
    """Maximum, or ``semantics.average`` over the elements inside the input."""
    arguments = (op.window, op.stride, (1, 1), op.padding)
    if isinstance(op, MaxPool2D):
        lowest = np.iinfo(np.int64).min
        return np.maximum.reduce([v for _, v in windows(x, *arguments, fill=lowest)])
    assert isinstance(op, AveragePool2D)
    total = sum(v for _, v in windows(x, *arguments, fill=0))
    inside = np.ones((1, *x.shape[1:3], 1), np.int64)
    count = sum(v for _, v in windows(inside, *arguments, fill=0))
    return semantics.average(total, count)  # pyright: ignore
