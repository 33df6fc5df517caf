"""A graph in the terms of other frameworks: layers with explicit padding, channels first.

PAD is folded into the convolution behind it, and RESHAPE into the fully connected layer behind it,
whose weights then name the order in which features are flattened. What has no such form is refused:
a peer that computed something else would be no peer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cactus_edge.errors import ToolError
from cactus_edge.graph import (
    Activation,
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    DType,
    FullyConnected,
    Graph,
    Int8Array,
    Linear,
    MaxPool2D,
    Operator,
    Pad,
    Pool2D,
    Reshape,
    Tensor,
    window_geometry,
)
from cactus_edge.operators import Mean

Pads = tuple[int, int, int, int]
"""Top, left, bottom, right."""
_NO_PADS: Pads = (0, 0, 0, 0)


@dataclass(frozen=True)
class Edge:
    """An activation as unsigned bytes.

    ``shape`` is (channels, height, width), or (features,) where height and width are 1.
    """

    index: int
    shape: tuple[int, ...]
    scale: float
    zero: int


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution, weights [out, in / groups, kh, kw], or a matrix [out, in].

    ``flatten`` says that the matrix reads a source with height and width. ``limits`` are the bytes
    to which the output is clamped, None where that is the whole range; ``activation`` is what the
    clamp is meant as.
    """

    source: Edge
    target: Edge
    weights: Int8Array
    scales: npt.NDArray[np.float32]
    bias: npt.NDArray[np.int32]
    limits: tuple[int, int] | None
    flatten: bool = False
    pads: Pads = _NO_PADS
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: Activation = Activation.NONE


@dataclass(frozen=True)
class Pool:
    """A pool over the elements that lie inside the input."""

    source: Edge
    target: Edge
    average: bool
    window: tuple[int, int]
    stride: tuple[int, int]
    pads: Pads


@dataclass(frozen=True)
class Sum:
    """The sum of two activations."""

    sources: tuple[Edge, Edge]
    target: Edge
    limits: tuple[int, int] | None
    activation: Activation = Activation.NONE


Step = Layer | Pool | Sum


@dataclass(frozen=True)
class Flow:
    """What is computed, in order, from ``source`` to ``target``."""

    source: Edge
    target: Edge
    steps: tuple[Step, ...]


def flow(graph: Graph, *, channels_first: bool) -> Flow:
    """Translate the integer core of a valid graph.

    Args:
        graph: with scales.
        channels_first: the order in which features are flattened, (c, h, w) instead of (h, w, c).

    Raises:
        ToolError: something has no form in other frameworks.
    """
    reader = _Reader(graph, channels_first)
    steps = [step for op in graph.core if (step := reader.step(op)) is not None]
    source = reader.edge(graph.core_input)
    return Flow(source, reader.edge(reader.origin(graph.logits)), tuple(steps))


def byte_offset(dtype: DType) -> int:
    """What makes a stored integer an unsigned byte.

    Raises:
        ToolError: the type is wider than a byte.
    """
    if dtype not in (DType.INT8, DType.UINT8):
        raise ToolError(f"activations of type {dtype.value} have no form in this runtime")
    return 0 if dtype is DType.UINT8 else 128


class _Reader:
    """Follows PAD and RESHAPE to the tensors that they read."""

    def __init__(self, graph: Graph, channels_first: bool) -> None:
        self._graph = graph
        self._channels_first = channels_first
        self._reshaped: dict[int, int] = {}
        self._padded: dict[int, tuple[int, Pads]] = {}

    def origin(self, tensor: int) -> int:
        """The tensor whose elements these are."""
        return self._reshaped.get(tensor, tensor)

    def edge(self, index: int) -> Edge:
        """A tensor."""
        tensor = self._graph.tensors[index]
        if tensor.quantization is None:
            raise ToolError(f"tensor '{tensor.name}' has no scale")
        zero = tensor.zero_point + byte_offset(tensor.dtype)
        return Edge(index, _extents(tensor), float(tensor.quantization.scale), zero)

    def step(self, op: Operator) -> Step | None:
        """One operator; None where the next one takes it over."""
        match op:
            case Reshape():
                self._reshaped[op.output] = self.origin(op.inputs[0])
                return None
            case Pad():
                before = [pair[0] for pair in op.paddings]
                after = [pair[1] for pair in op.paddings]
                if len(before) != 4 or any((before[0], after[0], before[3], after[3])):
                    raise ToolError(f"PAD '{op.name}' pads other axes than height and width")
                pads = (before[1], before[2], after[1], after[2])
                self._padded[op.output] = (op.inputs[0], pads)
                return None
            case Mean():  # its weights have no scale that says what it divides by
                raise ToolError(f"MEAN '{op.name}' has no form in this runtime")
            case Linear():
                return self._layer(op)
            case MaxPool2D() | AveragePool2D():
                return self._pool(op)
            case Add():
                first, second = (self.edge(self._plain(op, index)) for index in op.inputs)
                return Sum((first, second), self.edge(op.output), self._limits(op), op.activation)
            case _:
                raise ToolError(f"{op.kind} '{op.name}' has no form in this runtime")

    def _plain(self, op: Operator, tensor: int) -> int:
        """A tensor that is read as it was written."""
        origin = self.origin(tensor)
        moved = _extents(self._graph.tensors[tensor]) != _extents(self._graph.tensors[origin])
        if origin in self._padded or moved:
            raise ToolError(f"{op.kind} '{op.name}' reads a PAD or RESHAPE, which has no form here")
        return origin

    def _limits(self, op: Operator) -> tuple[int, int] | None:
        dtype = self._graph.tensors[op.output].dtype
        limits = self._graph.output_range(op)
        if limits == dtype.range:
            return None
        return limits[0] + byte_offset(dtype), limits[1] + byte_offset(dtype)

    def _layer(self, op: Linear) -> Layer:
        seen = self._graph.tensors[op.inputs[0]]
        kernel = op.weights.values.shape[1:3] if isinstance(op, Conv2D) else (1, 1)
        flat = len(_extents(seen)) == 1
        if isinstance(op, FullyConnected) or (flat and kernel == (1, 1)):
            return self._matrix(op)
        assert isinstance(op, Conv2D), "Linear is FullyConnected or Conv2D"
        index, pads = self._padded.get(op.inputs[0], (op.inputs[0], _NO_PADS))
        source = self.edge(self._plain(op, index))
        if len(source.shape) == 1:
            raise ToolError(f"{op.kind} '{op.name}': a window over one pixel has no form here")
        own = _window_pads(seen, kernel, op.stride, op.dilation, op)
        values = op.weights.values
        groups = source.shape[0] if isinstance(op, DepthwiseConv2D) else 1
        axes = (3, 0, 1, 2) if isinstance(op, DepthwiseConv2D) else (0, 3, 1, 2)
        top, left, bottom, right = (a + b for a, b in zip(pads, own, strict=True))
        return Layer(
            source,
            self.edge(op.output),
            np.ascontiguousarray(values.transpose(axes)),
            _scales(op),
            op.bias.astype(np.int32, copy=False),
            self._limits(op),
            pads=(top, left, bottom, right),
            stride=op.stride,
            dilation=op.dilation,
            groups=groups,
            activation=op.activation,
        )

    def _matrix(self, op: Linear) -> Layer:
        origin = self.origin(op.inputs[0])
        source = self.edge(origin)
        matrix = op.weights.values.reshape(op.channels, -1)
        if isinstance(op, DepthwiseConv2D) or origin in self._padded:
            raise ToolError(f"{op.kind} '{op.name}': no form for one pixel in this runtime")
        flatten = len(source.shape) == 3
        if flatten and self._channels_first:
            channels, height, width = source.shape
            spatial = matrix.reshape(op.channels, height, width, channels)
            matrix = spatial.transpose(0, 3, 1, 2).reshape(op.channels, -1)
        return Layer(
            source,
            self.edge(op.output),
            np.ascontiguousarray(matrix),
            _scales(op),
            op.bias.astype(np.int32, copy=False),
            self._limits(op),
            flatten,
            activation=op.activation,
        )

    def _pool(self, op: Pool2D) -> Pool:
        seen = self._graph.tensors[op.inputs[0]]
        source, target = self.edge(self._plain(op, op.inputs[0])), self.edge(op.output)
        if len(source.shape) == 1 or self._limits(op) is not None:
            raise ToolError(f"{op.kind} '{op.name}' has no form in this runtime")
        pads = _window_pads(seen, op.window, op.stride, (1, 1), op)
        average = isinstance(op, AveragePool2D)
        return Pool(source, target, average, op.window, op.stride, pads)


def _extents(tensor: Tensor) -> tuple[int, ...]:
    """Channels first; features alone where there is one pixel."""
    if len(tensor.shape) == 4 and tensor.shape[1:3] != (1, 1):
        return tensor.shape[3], tensor.shape[1], tensor.shape[2]
    return (tensor.size,)


def _scales(op: Linear) -> npt.NDArray[np.float32]:
    if op.weights.scale.size == 0:
        raise ToolError(f"{op.kind} '{op.name}' has no scales")
    return np.broadcast_to(op.weights.scale, op.channels).copy()


def _window_pads(
    source: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    op: Conv2D | Pool2D,
) -> Pads:
    """What SAME adds on each side."""
    (_, top, bottom), (_, left, right) = (
        window_geometry(source.shape[1 + a], kernel[a], stride[a], dilation[a], op.padding)
        for a in (0, 1)
    )
    return top, left, bottom, right
