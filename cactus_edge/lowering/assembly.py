"""Stages to operators: integer weights, scales, shapes, and the universal form of each layer.

Hidden layers end in ReLU and are stored with zero point -128. The logits are stored the same way:
a constant that makes them non-negative is put into the bias, where it changes no decision, because
a two-sided output has no universal scale. Sums of layers are described in ``storage``. int4 linear
layers are written as 1x1 convolutions, because stock runtimes refuse per-channel int4
FULLY_CONNECTED.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cactus_edge.graph import (
    Activation,
    Add,
    AveragePool2D,
    Graph,
    MaxPool2D,
    Operator,
    Pad,
    Padding,
    Quantization,
    Reshape,
    Tensor,
    window_geometry,
)
from cactus_edge.lowering.stages import (
    NO_PADS,
    Branch,
    Flatten,
    FloatArray,
    Layer,
    Pool,
    Range,
    Stage,
    Sum,
    output_of,
)
from cactus_edge.lowering.storage import Storage, storages
from cactus_edge.lowering.weighted import LayerReport, WeightedOperator

PIXEL = Quantization.of(np.float32(1) / np.float32(255), -128)


@dataclass(frozen=True, eq=False)
class Shadow:
    """The fake-quantized float form of one weighted operator, for the layer-by-layer check.

    ``shift`` is the real constant that was added to every output.
    """

    operator: str
    source: int
    target: int
    layer: Layer
    shift: float


class Assembly:
    """Builds the graph of one network; ``shadows`` are filled by ``build``."""

    def __init__(
        self,
        stages: Sequence[Stage],
        ranges: Mapping[str, Range],
        input_shape: tuple[int, ...],
        widths: Mapping[str, int],
    ) -> None:
        """Keep the parts; ``input_shape`` is (C, H, W) or (F,), ``widths`` bits by layer name."""
        shape = (
            (1, *input_shape[1:], input_shape[0]) if len(input_shape) == 3 else (1, *input_shape)
        )
        self._stages = list(stages)
        self._ranges = ranges
        self._widths = widths
        self._tensors = [Tensor("input", shape, quantization=PIXEL)]
        self._operators: list[Operator] = []
        self._reports: list[LayerReport] = []
        self._spatial: tuple[int, ...] | None = None
        self._current = 0  # the tensor that the next operator reads
        self._made: dict[str, int] = {}  # by name of the output, for what is read again
        self._offsets: dict[int, int] = {}  # levels that stand for 0, by tensor
        self._storages: Mapping[str, Storage] = {}
        self.shadows: list[Shadow] = []

    def build(self, universal: bool) -> tuple[Graph, list[LayerReport]]:
        """The graph without metadata, and a report for each weighted layer.

        Raises:
            UnsupportedModelError: an order of layers that has no deployed form.
        """
        self._storages = storages(self._stages, self._ranges, universal=universal)
        last = max(i for i, stage in enumerate(self._stages) if isinstance(stage, Layer))
        for index, stage in enumerate(self._stages):
            match stage:
                case Layer():
                    self._layer(stage, index == last, universal)
                case Pool():
                    self._pool(stage)
                case Flatten():
                    self._flatten(stage)
                case Branch():
                    self._current = self._made[stage.source]
                case Sum():
                    self._sum(stage, universal)
            self._made[output_of(stage)] = self._current
        if len(self._tensors[-1].shape) != 2:
            self._reshape("logits", (1, self._tensors[-1].size))
        graph = Graph(tuple(self._tensors), tuple(self._operators), 0, len(self._tensors) - 1)
        return graph, self._reports

    def _append(self, operator: Operator, tensor: Tensor) -> None:
        self._tensors.append(tensor)
        self._operators.append(operator)
        self._current = len(self._tensors) - 1

    def _next(self) -> tuple[tuple[int], int, Tensor]:
        """Input index (as a tuple), output index and input tensor of the next operator."""
        return (self._current,), len(self._tensors), self._tensors[self._current]

    def _reshape(self, name: str, shape: tuple[int, ...]) -> None:
        inputs, output, source = self._next()
        self._append(
            Reshape(name=name, inputs=inputs, output=output),
            replace(source, name=name, shape=shape),
        )

    def _flatten(self, stage: Flatten) -> None:
        source = self._tensors[self._current]
        if len(source.shape) == 4:
            self._spatial = source.shape
            self._reshape(stage.name, (1, source.size))

    def _pool(self, stage: Pool) -> None:
        inputs, output, source = self._next()
        _, height, width, channels = source.shape
        extents = tuple(
            window_geometry(extent, stage.window[a], stage.stride[a], 1, Padding.VALID)[0]
            for a, extent in enumerate((height, width))
        )
        kind = AveragePool2D if stage.kind == "average" else MaxPool2D
        operator = kind(
            name=stage.name, inputs=inputs, output=output, window=stage.window, stride=stage.stride
        )
        self._append(operator, replace(source, name=stage.name, shape=(1, *extents, channels)))

    def _layer(self, layer: Layer, last: bool, universal: bool) -> None:
        span, storage = self._ranges[layer.name], self._storages[layer.name]
        shift = -span.lower if last else storage.offset * storage.step if universal else 0.0
        zero_point = -128 if last or universal else -128 + storage.offset
        target = Quantization.of(storage.step, zero_point)
        self._weighted(layer, self._widths[layer.name], target, shift, universal, per_tensor=last)
        self._offsets[self._current] = storage.offset

    def _sum(self, stage: Sum, universal: bool) -> None:
        """ADD; in a universal graph a layer behind it takes the offsets away and is the ReLU."""
        (first,), output, source = self._next()
        second, storage = self._made[stage.source], self._storages[stage.name]
        offset = self._offsets.get(first, 0) + self._offsets.get(second, 0) if universal else 0
        target = replace(
            source,
            name=stage.name if offset else stage.output,
            quantization=Quantization.of(storage.step, -128),
        )
        activation = Activation.NONE if universal else Activation.RELU
        operands = (first, second)
        self._append(
            Add(name=stage.name, inputs=operands, output=output, activation=activation), target
        )
        if offset:
            assert target.quantization is not None
            self._weighted(
                _clipping(stage.output, source.shape, offset * storage.step),
                8,
                target.quantization,
                0.0,
                universal,
            )

    def _weighted(
        self,
        layer: Layer,
        width: int,
        quantization: Quantization,
        shift: float,
        universal: bool,
        *,
        per_tensor: bool = False,
    ) -> None:
        """The operator of a layer, its report and its shadow; ``shift`` is added to the outputs."""
        padding = self._pad(layer) if layer.convolution else Padding.VALID
        values = self._arranged(layer)
        if not layer.convolution and width <= 4 and len(self._tensors[self._current].shape) == 2:
            self._reshape(f"{layer.name}/pixel", (1, 1, 1, self._tensors[self._current].size))
        inputs, output, source = self._next()
        target = Tensor(
            layer.output, self._shape(layer, source, padding), quantization=quantization
        )
        maker = WeightedOperator(
            layer, values, width, (source, target), (inputs, output), padding, shift,
            (*self._tensors, target),
        )  # fmt: skip
        bits, report = maker.scales(per_tensor=per_tensor, universal=universal)
        _, operator = maker.make(bits)
        self._append(operator, target)
        self._reports.append(report)
        scale = np.broadcast_to(bits.view(np.float32).astype(np.float64), layer.weight.shape[0])
        shipped = scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
        limit = 2 ** (width - 1) - 1
        rounded = np.clip(np.rint(layer.weight / shipped), -limit, limit) * shipped
        shadow = replace(layer, weight=rounded)
        self.shadows.append(
            Shadow(operator.name, inputs[0], output, self._as_shipped(shadow), shift)
        )

    def _as_shipped(self, layer: Layer) -> Layer:
        """Explicit padding has become a PAD operator, which the shadow's input has behind it."""
        padded = bool(self._operators[-2:-1]) and isinstance(self._operators[-2], Pad)
        return replace(layer, padding=NO_PADS) if padded else layer

    def _pad(self, layer: Layer) -> Padding:
        """VALID, SAME where that is the same geometry, or a PAD operator and VALID."""
        inputs, output, source = self._next()
        if layer.padding == NO_PADS:
            return Padding.VALID
        same = True
        for axis in (0, 1):
            extent, kernel = source.shape[1 + axis], layer.weight.shape[2 + axis]
            size, *pads = window_geometry(
                extent, kernel, layer.stride[axis], layer.dilation[axis], Padding.SAME
            )
            padded = extent + sum(layer.padding[axis])
            wanted = window_geometry(
                padded, kernel, layer.stride[axis], layer.dilation[axis], Padding.VALID
            )
            same = same and (*pads, size) == (*layer.padding[axis], wanted[0])
        if same:
            return Padding.SAME
        name = f"{layer.name}/pad"
        paddings = ((0, 0), *layer.padding, (0, 0))
        operator = Pad(name=name, inputs=inputs, output=output, paddings=paddings)
        shape = tuple(e + sum(pair) for e, pair in zip(source.shape, paddings, strict=True))
        self._append(operator, replace(source, name=name, shape=shape))
        return Padding.VALID

    def _arranged(self, layer: Layer) -> FloatArray:
        """Float weights in TFLite's order; a linear layer behind a flatten reads NHWC."""
        weight = layer.weight
        if layer.convolution:
            if layer.groups > 1:
                return np.ascontiguousarray(weight.transpose(1, 2, 3, 0))
            return np.ascontiguousarray(weight.transpose(0, 2, 3, 1))
        if self._spatial is None:
            return weight
        _, height, width, channels = self._spatial
        self._spatial = None
        image = weight.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(image.reshape(len(weight), -1))

    def _shape(self, layer: Layer, source: Tensor, padding: Padding) -> tuple[int, ...]:
        channels = layer.weight.shape[0]
        if not layer.convolution:
            return (1,) * (len(source.shape) - 1) + (channels,)
        extents = tuple(
            window_geometry(
                source.shape[1 + a],
                layer.weight.shape[2 + a],
                layer.stride[a],
                layer.dilation[a],
                padding,
            )[0]
            for a in (0, 1)
        )
        return (1, *extents, channels)


def _clipping(name: str, shape: tuple[int, ...], offset: float) -> Layer:
    """max(0, x - offset) for x [1, h, w, channels], as a depthwise layer with 1x1 windows."""
    channels = shape[-1]
    bias = np.full(channels, -offset)
    return Layer(name, name, np.ones((channels, 1, 1, 1)), bias, relu=True, groups=channels)
