"""A network as a list of deployable stages, in float64, and what each computes.

Batch normalization is already part of the layer before it, and a following ReLU part of the layer
or of the sum. Images are [N, C, H, W] and weights are in the order of torch and ONNX; the integer
graph has its own order (see ``assembly``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Pads = tuple[tuple[int, int], tuple[int, int]]
"""Zeros (before, after) along height and along width."""
INPUT = ""
"""The name under which stages read the network's input again."""
NO_PADS: Pads = ((0, 0), (0, 0))


# Elements of all windows together, a quarter of a gigabyte; more samples are taken one by one.
_MOST_TAPS = 1 << 25


@dataclass(frozen=True)
class Range:
    """Real interval that the stored output of a layer or a sum covers."""

    lower: float
    upper: float


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution [out, in / groups, kh, kw] or a linear layer [out, in], with its ReLU.

    ``output`` is the name of the last operation that was folded in; ``ceiling`` is what a ReLU
    clips at (6 for ReLU6), if anything.
    """

    name: str
    output: str
    weight: FloatArray
    bias: FloatArray
    relu: bool = False
    stride: tuple[int, int] = (1, 1)
    padding: Pads = NO_PADS
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    ceiling: float = math.inf

    @property
    def convolution(self) -> bool:
        """Whether this is a convolution."""
        return self.weight.ndim == 4


@dataclass(frozen=True)
class Pool:
    """A pool; ``counts_padding``: an average over what was padded as well."""

    name: str
    kind: Literal["average", "max"]
    window: tuple[int, int]
    stride: tuple[int, int]
    padding: Pads = NO_PADS
    counts_padding: bool = False


@dataclass(frozen=True)
class Flatten:
    """From [N, C, H, W] to [N, C * H * W]."""

    name: str


@dataclass(frozen=True)
class Branch:
    """Goes on from the earlier stage whose ``output`` is ``source``."""

    name: str
    source: str


@dataclass(frozen=True)
class Sum:
    """The stage before plus the earlier one whose ``output`` is ``source``, with its ReLU."""

    name: str
    output: str
    source: str
    relu: bool = False
    ceiling: float = math.inf


Stage = Layer | Pool | Flatten | Branch | Sum


def output_of(stage: Stage) -> str:
    """The name under which later stages read what ``stage`` yields."""
    return stage.output if isinstance(stage, Layer | Sum) else stage.name


def linear(layer: Layer, x: FloatArray, weight: FloatArray) -> FloatArray:
    """A layer's map with another weight and without bias: [N, in, ...] -> [N, out, ...]."""
    if not layer.convolution:
        return x @ weight.T
    taps = int(np.prod(weight.shape[1:])) * x.shape[2] * x.shape[3]
    if len(x) > 1 and len(x) * taps > _MOST_TAPS:
        return np.concatenate([linear(layer, x[i : i + 1], weight) for i in range(len(x))])
    x = np.pad(x, ((0, 0), (0, 0), *layer.padding))
    kernel = weight.shape[2:]
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, layer.dilation, strict=True))
    seen = _windows(x, reach, layer.stride)[..., :: layer.dilation[0], :: layer.dilation[1]]
    count, channels, height, width = seen.shape[:4]
    # [N, groups, in / groups, h, w, kh, kw] -> [groups, N * h * w, in / groups * kh * kw]
    seen = seen.reshape(count, layer.groups, channels // layer.groups, *seen.shape[2:])
    rows = seen.transpose(1, 0, 3, 4, 2, 5, 6).reshape(layer.groups, count * height * width, -1)
    columns = weight.reshape(layer.groups, len(weight) // layer.groups, -1).transpose(0, 2, 1)
    result = (rows @ columns).reshape(layer.groups, count, height, width, -1)
    return result.transpose(1, 0, 4, 2, 3).reshape(count, len(weight), height, width)


def spread(layer: Layer, values: FloatArray) -> FloatArray:
    """One value for each output channel [out] in the shape in which outputs take it."""
    return values.reshape(-1, 1, 1) if layer.convolution else values


def pooled(pool: Pool, x: FloatArray) -> FloatArray:
    """A pool on [N, C, H, W]."""
    pads = ((0, 0), (0, 0), *pool.padding)
    if pool.kind == "max":
        x = np.pad(x, pads, constant_values=-np.inf)
        return _windows(x, pool.window, pool.stride).max(axis=(4, 5))
    total = _windows(np.pad(x, pads), pool.window, pool.stride).sum(axis=(4, 5))
    inside = np.pad(np.ones_like(x[:1]), pads, constant_values=float(pool.counts_padding))
    return total / _windows(inside, pool.window, pool.stride).sum(axis=(4, 5))


def _windows(x: FloatArray, window: tuple[int, ...], stride: tuple[int, int]) -> FloatArray:
    """A view of all windows: [N, C, H, W] -> [N, C, h, w, *window]."""
    every = np.lib.stride_tricks.sliding_window_view(x, window, axis=(2, 3))  # pyright: ignore
    return every[:, :, :: stride[0], :: stride[1]]


def run(stages: Sequence[Stage], x: FloatArray) -> Iterator[tuple[Stage, FloatArray, FloatArray]]:
    """Each stage with its input and its output, on ``x`` [N, C, H, W] or [N, F]."""

    def exact(layer: Layer, x: FloatArray) -> tuple[FloatArray]:
        return (linear(layer, x, layer.weight) + spread(layer, layer.bias),)

    for stage, (before,), (after,) in _walk(stages, (x,), exact):
        yield stage, before, after


def run_bounds(
    stages: Sequence[Stage], lower: FloatArray, upper: FloatArray
) -> Iterator[tuple[Stage, FloatArray, FloatArray]]:
    """Each stage with interval bounds of its output, for inputs in [lower, upper]."""

    def interval(layer: Layer, low: FloatArray, high: FloatArray) -> tuple[FloatArray, ...]:
        centre = linear(layer, (low + high) / 2, layer.weight) + spread(layer, layer.bias)
        radius = linear(layer, (high - low) / 2, np.abs(layer.weight))
        return centre - radius, centre + radius

    for stage, _, (low, high) in _walk(stages, (lower, upper), interval):
        yield stage, low, high


def _walk(
    stages: Sequence[Stage],
    ends: tuple[FloatArray, ...],
    layer: Callable[..., tuple[FloatArray, ...]],
) -> Iterator[tuple[Stage, tuple[FloatArray, ...], tuple[FloatArray, ...]]]:
    """All but layers is monotone in each operand, so that it maps each end by itself."""
    sources = {stage.source for stage in stages if isinstance(stage, Branch | Sum)}
    kept = {INPUT: ends}
    for stage in stages:
        before = ends
        match stage:
            case Layer():
                ends = layer(stage, *ends)
            case Pool():
                ends = tuple(pooled(stage, x) for x in ends)
            case Flatten():
                ends = tuple(x.reshape(len(x), -1) for x in ends)
            case Branch():
                ends = kept[stage.source]
            case Sum():
                ends = tuple(x + y for x, y in zip(ends, kept[stage.source], strict=True))
        if isinstance(stage, Layer | Sum) and stage.relu:
            ends = tuple(x.clip(0, stage.ceiling) for x in ends)
        if output_of(stage) in sources:
            kept[output_of(stage)] = ends
        yield stage, before, ends
