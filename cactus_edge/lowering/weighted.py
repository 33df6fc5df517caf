"""One weighted operator for any weight scales, and the choice of these scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec
import numpy as np
import numpy.typing as npt

from cactus_edge.constraints import ACCUMULATOR_LIMIT
from cactus_edge.graph import (
    Activation,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int8Array,
    Int64Array,
    Linear,
    Padding,
    Tensor,
    Weights,
)
from cactus_edge.lowering.stages import FloatArray, Layer
from cactus_edge.snap import LARGEST_MULTIPLIER, snap

ScaleBits = npt.NDArray[np.uint32]

# Channels whose weights all but vanished: below these bounds a level of theirs means nothing, and a
# bias in units of it would not fit.
_SMALLEST_MULTIPLIER = 2.0**-18
_LARGEST_BIAS = 2.0**25
_LEVELS = 255  # of an input above its zero point, at most
_STORED_BITS = 4  # at least
_STORED_LIMIT = 7


class LayerReport(msgspec.Struct, frozen=True):
    """One weighted layer; ``snapped`` of ``channels`` scales are universal, ``unsnapped`` are not.

    Changes are relative to the scale that the largest weight asks for; a large one belongs to a
    channel whose weights all but vanished.
    """

    name: str
    bits: int
    sparsity: float
    channels: int
    snapped: int
    unsnapped: tuple[int, ...]
    median_change: float
    largest_change: float


@dataclass(frozen=True, eq=False)
class WeightedOperator:
    """One weighted operator for any weight scales.

    ``offset`` levels above the zero point stand for 0 in the input; the bias takes them away.
    """

    layer: Layer
    values: FloatArray
    bits: int
    ends: tuple[Tensor, Tensor]
    indices: tuple[tuple[int], int]
    padding: Padding
    shift: float
    tensors: tuple[Tensor, ...]
    offset: int = 0

    @property
    def limit(self) -> int:
        """The largest weight level."""
        return 2 ** (self.bits - 1) - 1

    @property
    def most(self) -> int:
        """The most stored integers of one level; 4 bits are stored in any case.

        Levels of 2 bits may be stored as -7, 0 and 7, of 3 bits as even numbers. Multipliers are
        that much smaller, and universal scales that much closer to each other. Of layers with tens
        of thousands of inputs it is what accumulators have room for.
        """
        largest = self.layer.weight[0].size * (_LEVELS + self.offset) * self.limit
        room = int(ACCUMULATOR_LIMIT - _LARGEST_BIAS) // largest
        return max(min(_STORED_LIMIT // self.limit, room), 1)

    def factors(self, scale: FloatArray, rows: list[int] | None = None) -> Int64Array:
        """The stored integers of one level at these scales, float64 [channels] or [1]: int64.

        That many with which a level is nearest to the one that the largest weight asks for.
        ``rows`` are the channels that are meant, all without it.
        """
        level = self._level(scale.size == 1 and rows is None)
        level = level if rows is None else level[rows]
        counts = np.arange(1, self.most + 1)[:, None]
        return np.abs(scale * counts - level).argmin(0) + 1

    def _level(self, per_tensor: bool) -> FloatArray:
        """The level that the largest weight of each channel, or of all, asks for."""
        largest = self._largest()
        if per_tensor:
            largest = largest.max(keepdims=True)
        return np.where(largest > 0, largest, max(float(np.median(largest)), 1e-6)) / self.limit

    def scales(self, *, per_tensor: bool, universal: bool) -> tuple[ScaleBits, LayerReport]:
        """Weight scales as float32 patterns, universal where possible."""
        level = self._level(per_tensor)
        source, target = self._scale_of(0), self._scale_of(1)
        ratio = source / target
        floor = self._smallest_scale(source, ratio, per_tensor)
        # A multiplier of 1 or more is not monotone.
        largest = LARGEST_MULTIPLIER / ratio
        wanted = np.minimum(np.maximum(level / self.most, floor), largest)
        bits = wanted.astype(np.float32).view(np.uint32)
        solved, change = np.zeros(wanted.size, bool), np.zeros(wanted.size)
        if universal:
            unclipped = self.limit / (self.limit + 0.499)

            def smallest(factor: int) -> FloatArray:
                return np.maximum(level * unclipped / factor, floor)

            others = [
                (np.maximum(level / factor, floor), smallest(factor))
                for factor in range(1, self.most)
            ]
            snapped = snap(self.make, wanted, smallest(self.most), ratio, others)
            bits, solved, change = snapped.scale_bits, snapped.solved, np.abs(snapped.change)
        report = LayerReport(
            name=self.layer.name,
            bits=self.bits,
            sparsity=1 - np.count_nonzero(self._quantized(bits)) / self.values.size,
            channels=wanted.size,
            snapped=int(solved.sum()),
            unsnapped=tuple(np.flatnonzero(~solved).tolist()),
            median_change=float(np.median(change)),
            largest_change=float(change.max()),
        )
        return bits, report

    def _smallest_scale(self, source: float, ratio: float, per_tensor: bool) -> FloatArray:
        """Scales below which a bias, multiplier or accumulator leaves its range: float64 [n]."""
        bias = np.abs(self._real_bias()) / (source * _LARGEST_BIAS)
        floor = np.maximum(bias, _SMALLEST_MULTIPLIER / ratio)
        # Rounding moves each weight by half a level at most.
        levels = _LEVELS + self.offset
        inputs, most = self.layer.weight[0].size, ACCUMULATOR_LIMIT - _LARGEST_BIAS
        magnitude = np.abs(self.layer.weight).reshape(len(self.layer.weight), -1).sum(1)
        floor = np.maximum(floor, magnitude * levels / (most - inputs * levels / 2))
        return floor.max(keepdims=True) if per_tensor else floor

    def _real_bias(self) -> FloatArray:
        return self.layer.bias + self.shift

    def _scale_of(self, end: int) -> float:
        quantization = self.ends[end].quantization
        assert quantization is not None
        return float(quantization.scale)

    def _largest(self) -> FloatArray:
        return np.abs(self.layer.weight).reshape(len(self.layer.weight), -1).max(1)

    def _quantized(self, bits: ScaleBits, rows: list[int] | None = None) -> Int8Array:
        scale = bits.view(np.float32).astype(np.float64)
        factor = self.factors(scale, rows)
        values = self.values
        if self.layer.groups > 1:
            values = values if rows is None else values[..., rows]
        else:
            values = values if rows is None else values[rows]
            shape = (-1, *[1] * (self.values.ndim - 1))
            scale, factor = scale.reshape(shape), factor.reshape(shape)
        levels = np.clip(np.rint(values / (scale * factor)), -self.limit, self.limit)
        return (levels * factor).astype(np.int8)

    def make(self, bits: ScaleBits, rows: list[int] | None = None) -> tuple[Graph, Linear]:
        """The operator for these scales, with a graph of all tensors so far and it alone.

        With ``rows``, the output channels of the operator are these alone, one scale each; it then
        serves for questions about channels, not for execution.
        """
        scale = bits.view(np.float32).astype(np.float64)
        real = self._real_bias()
        real = real if rows is None else real[rows]
        channels = len(real)
        quantized = self._quantized(bits, rows)
        by_channel = quantized.reshape(-1, channels).T if self.layer.groups > 1 else quantized
        bias = np.rint(real / (self._scale_of(0) * scale))
        if self.offset:
            bias = bias - self.offset * by_channel.reshape(channels, -1).sum(1, dtype=np.int64)
        inputs, output = self.indices
        weights = Weights(quantized, max(self.bits, _STORED_BITS), bits)
        activation = Activation.RELU if self.layer.relu else Activation.NONE
        name, whole = self.layer.name, np.broadcast_to(bias, channels).astype(np.int32)
        operator: Linear
        if self.layer.convolution:
            kind = DepthwiseConv2D if self.layer.groups > 1 else Conv2D
            operator = kind(
                name=name, inputs=inputs, output=output, weights=weights, bias=whole,
                activation=activation, stride=self.layer.stride, dilation=self.layer.dilation,
                padding=self.padding,
            )  # fmt: skip
        elif len(self.ends[0].shape) == 4:
            pixel = replace(weights, values=weights.values[:, None, None, :])
            operator = Conv2D(
                name=name, inputs=inputs, output=output, weights=pixel, bias=whole,
                activation=activation,
            )  # fmt: skip
        else:
            operator = FullyConnected(
                name=name, inputs=inputs, output=output, weights=weights, bias=whole,
                activation=activation,
            )  # fmt: skip
        return Graph(self.tensors, (operator,), inputs[0], output), operator
