"""Stages to operators: integer weights, scales, shapes, and the universal form of each layer.

What ends in ReLU is stored with zero point -128. The logits are stored the same way: a constant
that makes them non-negative is put into the bias, where it changes no decision, because a two-sided
output has no universal scale. Sums, and layers without ReLU, are described in ``storage``. int4
linear layers are written as 1x1 convolutions, because stock runtimes refuse per-channel int4
FULLY_CONNECTED.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cactus_edge.errors import UnsupportedModelError
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
    INPUT,
    NO_PADS,
    Branch,
    Flatten,
    FloatArray,
    Layer,
    Pads,
    Pool,
    Range,
    Stage,
    Sum,
    output_of,
)
from cactus_edge.lowering.storage import Storage, storages
from cactus_edge.lowering.weighted import LayerReport, ScaleBits, WeightedOperator
from cactus_edge.universal import disagreeing_channels

PIXEL = Quantization.of(np.float32(1) / np.float32(255), -128)


@dataclass(frozen=True, eq=False)
class Shadow:
    """The fake-quantized float form of one weighted operator, for the layer-by-layer check.

    ``shift`` is the real constant that was added to every output, ``offset`` the levels that stand
    for 0 in the source.
    """

    operator: str
    source: int
    target: int
    layer: Layer
    shift: float
    offset: int


class Assembly:
    """Builds the graph of one network; ``shadows`` are filled by ``build``."""

    def __init__(
        self,
        stages: Sequence[Stage],
        ranges: Mapping[str, Range],
        input_shape: tuple[int, ...],
        widths: Mapping[str, int],
        *,
        per_tensor: bool = False,
        like: Assembly | None = None,
    ) -> None:
        """Keep the parts.

        ``input_shape`` is (C, H, W) or (F,), ``widths`` bits by layer name; ``per_tensor`` gives
        all channels of a layer one scale, which those of the logits have in any case. Weight scales
        of ``like``, which differs in biases alone, are kept where they are still as good.
        """
        shape = (
            (1, *input_shape[1:], input_shape[0]) if len(input_shape) == 3 else (1, *input_shape)
        )
        self._stages = list(stages)
        self._ranges = ranges
        self._widths = widths
        self._per_tensor = per_tensor
        self._known = {} if like is None else like.scales
        self._tensors = [Tensor("input", shape, quantization=PIXEL)]
        self._operators: list[Operator] = []
        self._reports: list[LayerReport] = []
        self._spatial: tuple[int, ...] | None = None
        self._current = 0  # the tensor that the next operator reads
        self._made = {INPUT: 0}  # by name of the output, for what is read again
        self._offsets: dict[int, int] = {}  # see _offset, by tensor
        self._storages: Mapping[str, Storage] = {}
        self.shadows: list[Shadow] = []
        self.scales: dict[str, tuple[ScaleBits, LayerReport]] = {}

    def build(
        self, universal: bool, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Graph, list[LayerReport]]:
        """The graph without metadata, and a report for each weighted layer.

        ``progress`` is called with (weighted layers done, weighted layers in all).

        Raises:
            UnsupportedModelError: an order of layers that has no deployed form.
        """
        self._storages = storages(self._stages, self._ranges, universal=universal)
        last = max(i for i, stage in enumerate(self._stages) if isinstance(stage, Layer))
        for stage in self._stages[last:]:
            if isinstance(stage, Sum):
                raise UnsupportedModelError(
                    f"layer '{stage.name}': a sum at the end has no deployed form; a layer must "
                    "make the logits"
                )
        total, done = sum(isinstance(stage, Layer) for stage in self._stages), 0
        for index, stage in enumerate(self._stages):
            match stage:
                case Layer():
                    self._layer(stage, index == last, universal)
                    done += 1
                    if progress is not None:
                        progress(done, total)
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

    @property
    def _offset(self) -> int:
        """Levels above the zero point that stand for 0 in what the next operator reads."""
        return self._offsets.get(self._current, 0)

    def _append(self, operator: Operator, tensor: Tensor, offset: int = 0) -> None:
        self._offsets[len(self._tensors)] = offset
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
            self._offset,
        )

    def _flatten(self, stage: Flatten) -> None:
        source = self._tensors[self._current]
        if len(source.shape) == 4:
            self._spatial = source.shape
            self._reshape(stage.name, (1, source.size))

    def _pool(self, stage: Pool) -> None:
        padding = self._pool_padding(stage)
        inputs, output, source = self._next()
        _, height, width, channels = source.shape
        extents = tuple(
            window_geometry(extent, stage.window[a], stage.stride[a], 1, padding)[0]
            for a, extent in enumerate((height, width))
        )
        kind = AveragePool2D if stage.kind == "average" else MaxPool2D
        operator = kind(
            name=stage.name, inputs=inputs, output=output, window=stage.window,
            stride=stage.stride, padding=padding,
        )  # fmt: skip
        target = replace(source, name=stage.name, shape=(1, *extents, channels))
        self._append(operator, target, self._offset)

    def _pool_padding(self, stage: Pool) -> Padding:
        """VALID, SAME where that is the same, or a PAD operator with what cannot win, and VALID."""
        if stage.padding == NO_PADS:
            return Padding.VALID
        maximum, source = stage.kind == "max", self._tensors[self._current]
        same = self._is_same(stage.window, stage.stride, (1, 1), stage.padding)
        if same and (maximum or not stage.counts_padding):
            return Padding.SAME
        # The zero point is the least stored integer, or stands for 0.
        least = source.zero_point == -128
        if least if maximum else stage.counts_padding and self._offset == 0:
            self._pad(f"{stage.name}/pad", stage.padding)
            return Padding.VALID
        raise UnsupportedModelError(
            f"layer '{stage.name}': its padding {stage.padding} has no deployed form; pad as SAME "
            "does, or put a ReLU before it"
        )

    def _layer(self, layer: Layer, last: bool, universal: bool) -> None:
        span, storage = self._ranges[layer.name], self._storages[layer.name]
        if layer.padding != NO_PADS and self._offset:
            self._centre(layer.name, universal)
        shift = -span.lower if last else storage.offset * storage.step if universal else 0.0
        zero_point = -128 if last or universal else -128 + storage.offset
        target = Quantization.of(storage.step, zero_point)
        offset = storage.offset if universal and not last else 0
        self._weighted(
            layer, self._widths[layer.name], target, shift, universal,
            per_tensor=last or self._per_tensor, offset=offset,
        )  # fmt: skip

    def _centre(self, name: str, universal: bool) -> None:
        """The same levels with a zero point that stands for 0, because padding reads it.

        A layer that copies needs no rounding, so that all profiles agree on it.
        """
        source, offset = self._tensors[self._current], self._offset
        assert source.quantization is not None
        target = replace(source.quantization, zero_point=source.zero_point + offset)
        layer = _identity(f"{name}/centred", source.shape, 0.0, relu=False)
        self._weighted(layer, 8, target, 0.0, universal)

    def _sum(self, stage: Sum, universal: bool) -> None:
        """ADD; in a universal graph a layer behind it takes offsets away and is the ReLU."""
        (first,), output, source = self._next()
        second, storage = self._made[stage.source], self._storages[stage.name]
        offset = self._offset + self._offsets.get(second, 0)
        clips = universal and stage.relu and offset > 0
        zero_point = -128 if universal else -128 + storage.offset
        target = replace(
            source,
            name=stage.name if clips else stage.output,
            quantization=Quantization.of(storage.step, zero_point),
        )
        activation = Activation.RELU if stage.relu and not universal else Activation.NONE
        operands = (first, second)
        operator = Add(name=stage.name, inputs=operands, output=output, activation=activation)
        self._append(operator, target, offset)
        if clips:
            assert target.quantization is not None
            layer = _identity(stage.output, source.shape, -offset * storage.step, relu=True)
            self._offsets[self._current] = 0  # the bias of that layer has it
            self._weighted(layer, 8, target.quantization, 0.0, universal)

    def _weighted(
        self,
        layer: Layer,
        width: int,
        quantization: Quantization,
        shift: float,
        universal: bool,
        *,
        per_tensor: bool = False,
        offset: int = 0,
    ) -> None:
        """The operator of a layer, its report and its shadow.

        ``shift`` is added to the outputs, of which ``offset`` levels have to be taken away again.
        """
        padding = self._padding(layer) if layer.convolution else Padding.VALID
        values = self._arranged(layer)
        if not layer.convolution and width <= 4 and len(self._tensors[self._current].shape) == 2:
            self._reshape(f"{layer.name}/pixel", (1, 1, 1, self._tensors[self._current].size))
        inputs, output, source = self._next()
        target = Tensor(
            layer.output, self._shape(layer, source, padding), quantization=quantization
        )
        maker = WeightedOperator(
            layer, values, width, (source, target), (inputs, output), padding, shift,
            (*self._tensors, target), self._offset,
        )  # fmt: skip
        bits, report = self._scales(maker, per_tensor=per_tensor, universal=universal)
        _, operator = maker.make(bits)
        absorbed = self._offset
        self._append(operator, target, offset)
        self._reports.append(report)
        scale = bits.view(np.float32).astype(np.float64)
        level = np.broadcast_to(scale * maker.factors(scale), layer.weight.shape[0])
        step, limit = level.reshape(-1, *[1] * (layer.weight.ndim - 1)), maker.limit
        rounded = np.clip(np.rint(layer.weight / step), -limit, limit) * step
        shadow = replace(layer, weight=rounded)
        self.shadows.append(
            Shadow(operator.name, inputs[0], output, self._as_shipped(shadow), shift, absorbed)
        )

    def _scales(
        self, maker: WeightedOperator, *, per_tensor: bool, universal: bool
    ) -> tuple[ScaleBits, LayerReport]:
        """Known ones if no more channels disagree under them than did."""
        name, found = maker.layer.name, self._known.get(maker.layer.name)
        if found is not None and universal:
            disagreeing = disagreeing_channels(*maker.make(found[0]))
            found = found if set(disagreeing) <= set(found[1].unsnapped) else None
        if found is None:
            found = maker.scales(per_tensor=per_tensor, universal=universal)
        self.scales[name] = found
        return found

    def _as_shipped(self, layer: Layer) -> Layer:
        """Explicit padding has become a PAD operator, which the shadow's input has behind it."""
        padded = bool(self._operators[-2:-1]) and isinstance(self._operators[-2], Pad)
        return replace(layer, padding=NO_PADS) if padded else layer

    def _padding(self, layer: Layer) -> Padding:
        """VALID, SAME where that is the same geometry, or a PAD operator and VALID."""
        if layer.padding == NO_PADS:
            return Padding.VALID
        kernel = (layer.weight.shape[2], layer.weight.shape[3])
        if self._is_same(kernel, layer.stride, layer.dilation, layer.padding):
            return Padding.SAME
        self._pad(f"{layer.name}/pad", layer.padding)
        return Padding.VALID

    def _is_same(
        self,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        dilation: tuple[int, int],
        pads: Pads,
    ) -> bool:
        """Whether these pads are those of SAME."""
        shape = self._tensors[self._current].shape
        for axis in (0, 1):
            extent, window = shape[1 + axis], (kernel[axis], stride[axis], dilation[axis])
            size, *own = window_geometry(extent, *window, Padding.SAME)
            wanted = window_geometry(extent + sum(pads[axis]), *window, Padding.VALID)
            if (*own, size) != (*pads[axis], wanted[0]):
                return False
        return True

    def _pad(self, name: str, pads: Pads) -> None:
        inputs, output, source = self._next()
        paddings = ((0, 0), *pads, (0, 0))
        operator = Pad(name=name, inputs=inputs, output=output, paddings=paddings)
        shape = tuple(e + sum(pair) for e, pair in zip(source.shape, paddings, strict=True))
        self._append(operator, replace(source, name=name, shape=shape), self._offset)

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


def _identity(name: str, shape: tuple[int, ...], bias: float, *, relu: bool) -> Layer:
    """X + bias for x [1, h, w, channels], as a depthwise layer with 1x1 windows."""
    weight = np.ones((shape[-1], 1, 1, 1))
    return Layer(name, name, weight, np.full(shape[-1], bias), relu=relu, groups=shape[-1])
