"""Operators that third-party files hold beside those of ``graph``: tables, and moved elements.

``Lookup`` and ``Pair`` compute a result from one or two int8 values. A resolved graph carries it as
a table, so that nothing but ``tables`` knows their arithmetic. ``Move`` puts elements elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from cactus_edge.graph import (
    Activation,
    Add,
    Conv2D,
    DepthwiseConv2D,
    Dequantize,
    Graph,
    Int8Array,
    Int64Array,
    Operator,
    Quantization,
    frozen_array,
)

LEVELS = 256


class Function(Enum):
    """Functions of one value; names of the TFLite schema."""

    RELU = "RELU"
    RELU6 = "RELU6"
    RELU_N1_TO_1 = "RELU_N1_TO_1"
    LEAKY_RELU = "LEAKY_RELU"
    LOGISTIC = "LOGISTIC"
    TANH = "TANH"
    HARD_SWISH = "HARD_SWISH"
    QUANTIZE = "QUANTIZE"


class Combination(Enum):
    """Functions of two values; names of the TFLite schema."""

    ADD = "ADD"
    SUB = "SUB"
    MUL = "MUL"


@dataclass(frozen=True, eq=False, kw_only=True)
class Lookup(Operator):
    """Each element is replaced by an entry of a table.

    ``table`` int64 [kinds, 256] (65,536 for int16 inputs) holds stored integers by the stored input
    less its type's least value; element i uses row ``i % kinds``. None until the graph is resolved.
    """

    table: Int64Array | None = None

    def __post_init__(self) -> None:
        """Freeze the table."""
        if self.table is not None:
            object.__setattr__(self, "table", frozen_array(self.table, np.int64))


@dataclass(frozen=True, eq=False, kw_only=True)
class Unary(Lookup):
    """A function of one value; ``alpha_bits`` is LEAKY_RELU's slope below 0, a float32 pattern."""

    function: Function
    alpha_bits: int = 0

    @property
    def kind(self) -> str:
        """The function's name."""
        return self.function.value


@dataclass(frozen=True, eq=False, kw_only=True)
class WithConstant(Lookup):
    """ADD, SUB or MUL with a constant of one element, of one for each channel, or of all.

    ``constant`` int8, of ``quantization``; ``first`` says that it is the first operand.
    """

    combination: Combination
    constant: Int8Array
    quantization: Quantization
    first: bool = False
    activation: Activation = Activation.NONE

    def __post_init__(self) -> None:
        """Freeze the constant."""
        super().__post_init__()
        object.__setattr__(self, "constant", frozen_array(self.constant, np.int8))

    @property
    def kind(self) -> str:
        """The combination's name."""
        return self.combination.value


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair(Operator):
    """SUB or MUL of two tensors; one of them may have a single pixel, which stands for all.

    ``table`` int64 [256, 256] by both stored inputs less their type's least value. Every row and
    every column is monotone, so the extremes over a box lie at its corners.
    """

    combination: Combination
    activation: Activation = Activation.NONE
    table: Int64Array | None = None

    def __post_init__(self) -> None:
        """Freeze the table."""
        if self.table is not None:
            object.__setattr__(self, "table", frozen_array(self.table, np.int64))

    @property
    def kind(self) -> str:
        """The combination's name."""
        return self.combination.value


@dataclass(frozen=True, eq=False, kw_only=True)
class Mean(DepthwiseConv2D):
    """MEAN over height and width, as the sum that it is: all weights are 1, of scale 1.

    ``keeps``: whether the file's output has both dimensions, as 1. The output here always has; but
    optimized kernels round an output without them otherwise.
    """

    keeps: bool = True

    @property
    def kind(self) -> str:
        """MEAN."""
        return "MEAN"


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows(Conv2D):
    """FULLY_CONNECTED on every pixel of its input: a 1x1 convolution, rounded as that layer is."""

    @property
    def kind(self) -> str:
        """FULLY_CONNECTED."""
        return "FULLY_CONNECTED"


@dataclass(frozen=True, eq=False, kw_only=True)
class Move(Operator):
    """What only puts elements elsewhere, and zero points where none lands; see ``sources``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Transpose(Move):
    """Axes in another order: axis a of the output is axis ``permutation[a]`` of the input."""

    permutation: tuple[int, ...]

    @property
    def kind(self) -> str:
        """TRANSPOSE."""
        return "TRANSPOSE"


@dataclass(frozen=True, eq=False, kw_only=True)
class StridedSlice(Move):
    """A part of each axis, in steps that may be negative; STRIDED_SLICE and SLICE.

    The output's extents say how many elements are taken.
    """

    begin: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def kind(self) -> str:
        """STRIDED_SLICE."""
        return "STRIDED_SLICE"


@dataclass(frozen=True, eq=False, kw_only=True)
class Concatenation(Move):
    """Tensors of one quantization, one behind the other along ``axis``."""

    axis: int

    @property
    def kind(self) -> str:
        """CONCATENATION."""
        return "CONCATENATION"


@dataclass(frozen=True, eq=False, kw_only=True)
class PadAxes(Move):
    """PAD of other axes than height and width; ``paddings`` are (before, after) for each axis."""

    paddings: tuple[tuple[int, int], ...]

    @property
    def kind(self) -> str:
        """PAD."""
        return "PAD"


@dataclass(frozen=True, eq=False, kw_only=True)
class ToUnsigned(Dequantize):
    """SOFTMAX's int8 to uint8 of the same scale: an edge as DEQUANTIZE is, and ignored like it."""

    @property
    def kind(self) -> str:
        """QUANTIZE."""
        return "QUANTIZE"


TABLED = (Lookup, Pair)


def arity(op: Operator) -> int:
    """How many activations an operator takes; CONCATENATION any number but 0."""
    if isinstance(op, Concatenation):
        return max(len(op.inputs), 1)
    return 2 if isinstance(op, (Add, Pair)) else 1


def sources(graph: Graph, op: Move) -> tuple[tuple[Int64Array, Int64Array], ...]:
    """What a ``Move`` copies: for each input (elements read, elements written), int64 [n] each.

    No element is written twice; one that is not written holds the zero point.
    """
    shapes = [graph.tensors[index].shape for index in op.inputs]
    target = graph.tensors[op.output]
    written = np.arange(target.size, dtype=np.int64)
    given = np.arange(graph.tensors[op.inputs[0]].size, dtype=np.int64).reshape(shapes[0])
    match op:
        case Transpose():
            return ((given.transpose(op.permutation).reshape(-1), written),)
        case StridedSlice():
            for axis, (begin, stride) in enumerate(zip(op.begin, op.stride, strict=True)):
                index = begin + stride * np.arange(target.shape[axis])
                given = given.take(index, axis=axis)
            return ((given.reshape(-1), written),)
        case PadAxes():
            inner = written.reshape(target.shape)
            for axis, (before, _) in enumerate(op.paddings):
                inner = inner.take(np.arange(shapes[0][axis]) + before, axis=axis)
            return ((given.reshape(-1), inner.reshape(-1)),)
        case _:
            assert isinstance(op, Concatenation)
            ends = np.cumsum([shape[op.axis] for shape in shapes])[:-1]
            parts = np.split(written.reshape(target.shape), ends, axis=op.axis)
            return tuple((np.arange(p.size, dtype=np.int64), p.reshape(-1)) for p in parts)


def moved(graph: Graph, op: Move, inputs: list[Int64Array]) -> Int64Array:
    """The output [samples, ...] of a ``Move``."""
    target = graph.tensors[op.output]
    flat = np.full((len(inputs[0]), target.size), target.zero_point, inputs[0].dtype)
    for values, (read, written) in zip(inputs, sources(graph, op), strict=True):
        flat[:, written] = values.reshape(len(values), -1)[:, read]
    return flat.reshape(-1, *target.shape[1:])


def looked_up(graph: Graph, op: Lookup, values: Int64Array) -> Int64Array:
    """The output [samples, ...] of a resolved ``Lookup``."""
    assert op.table is not None, "graph is not resolved"
    least = graph.tensors[op.inputs[0]].dtype.range[0]
    flat = values.reshape(len(values), -1) - least
    rows = np.arange(flat.shape[1]) % len(op.table)
    return op.table[rows, flat].reshape(values.shape)


def paired(graph: Graph, op: Pair, a: Int64Array, b: Int64Array) -> Int64Array:
    """The output [samples, ...] of a resolved ``Pair``."""
    assert op.table is not None, "graph is not resolved"
    least = [graph.tensors[index].dtype.range[0] for index in op.inputs]
    return op.table[a - least[0], b - least[1]]
