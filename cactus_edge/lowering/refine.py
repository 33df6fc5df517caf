"""What post-training quantization does to the weights: equalize channels, correct biases, clip.

Cross-layer equalization and bias correction are those of Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction" (2019), the latter from samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from cactus_edge.lowering.calibration import BATCH
from cactus_edge.lowering.stages import (
    Branch,
    Flatten,
    FloatArray,
    Layer,
    Pool,
    Stage,
    Sum,
    linear,
    output_of,
    run,
)

_ROUNDS = 10
_LARGEST_FACTOR = 2.0**10
_SHARES = np.linspace(0.4, 1, 61)


def equalized(stages: Sequence[Stage]) -> list[Stage]:
    """The same function with weights whose channels use their layers' ranges alike.

    Channel c of a layer is divided by a factor and what reads it multiplied, wherever one layer
    alone reads another, with nothing between them that is not positively homogeneous.
    """
    result = list(stages)
    pairs = list(_pairs(result))
    for _ in range(_ROUNDS):
        for first, second in pairs:
            before, after = result[first], result[second]
            assert isinstance(before, Layer)
            assert isinstance(after, Layer)
            result[first], result[second] = _balanced(before, after)
    return result


def _pairs(stages: Sequence[Stage]) -> Iterator[tuple[int, int]]:
    """Indices of layers, the second of which alone reads the first."""
    again = {stage.source for stage in stages if isinstance(stage, Branch | Sum)}
    first: int | None = None
    for index, stage in enumerate(stages):
        if isinstance(stage, Layer):
            if first is not None:
                yield first, index
            first = index if stage.ceiling == math.inf else None
        elif not isinstance(stage, Pool | Flatten):
            first = None
        if output_of(stage) in again:
            first = None


def _balanced(before: Layer, after: Layer) -> tuple[Layer, Layer]:
    channels = len(before.weight)
    # [channels, what each is multiplied with]
    own = np.abs(before.weight).reshape(channels, -1).max(1)
    if after.groups > 1:
        read = np.abs(after.weight).reshape(channels, -1).max(1)
    else:
        read = np.abs(after.weight).reshape(len(after.weight), channels, -1).max(axis=(0, 2))
    factor = np.ones(channels)
    alive = (own > 0) & (read > 0)
    factor[alive] = np.sqrt(own[alive] / read[alive])
    factor = factor.clip(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    shape = (-1, *[1] * (before.weight.ndim - 1))
    first = replace(before, weight=before.weight / factor.reshape(shape), bias=before.bias / factor)
    if after.groups > 1:
        times = np.repeat(factor, len(after.weight) // channels).reshape(-1, 1, 1, 1)
    else:
        times = np.repeat(factor, after.weight.shape[1] // channels)
        times = times.reshape(1, -1, *[1] * (after.weight.ndim - 2))
    return first, replace(after, weight=after.weight * times)


def corrected(
    stages: Sequence[Stage], shipped: Mapping[str, FloatArray], samples: FloatArray
) -> list[Stage]:
    """Biases less the mean error that rounded weights make on samples.

    Args:
        stages: the network.
        shipped: weights by layer as they ship, in the layers' order of axes.
        samples: float64 [N, C, H, W] or [N, F].
    """
    totals: dict[str, FloatArray] = {}
    for start in range(0, len(samples), BATCH):
        for stage, before, _ in run(stages, samples[start : start + BATCH]):
            if isinstance(stage, Layer):
                error = linear(stage, before, shipped[stage.name] - stage.weight)
                mean = error.mean(axis=tuple(range(2, error.ndim))).sum(axis=0)
                totals[stage.name] = totals.get(stage.name, np.zeros(len(mean))) + mean
    return [
        replace(stage, bias=stage.bias - totals[stage.name] / len(samples))
        if isinstance(stage, Layer)
        else stage
        for stage in stages
    ]


def clipped(stages: Sequence[Stage], bits: int, *, per_tensor: bool = False) -> list[Stage]:
    """Weights limited to where rounding and clipping cost the least squared error.

    By channel, or for all channels of a layer alike where they share a scale: with ``per_tensor``,
    and in the last layer.
    """
    last = [stage for stage in stages if isinstance(stage, Layer)][-1]
    return [
        replace(stage, weight=_clipped(stage.weight, bits, per_tensor or stage is last))
        if isinstance(stage, Layer)
        else stage
        for stage in stages
    ]


def _clipped(weight: FloatArray, bits: int, shared: bool) -> FloatArray:
    rows = weight.reshape(1 if shared else len(weight), -1)
    largest, limit = np.abs(rows).max(1, keepdims=True), 2 ** (bits - 1) - 1
    largest = np.where(largest > 0, largest, 1)
    best, least = largest.copy(), np.full_like(largest, np.inf)
    for share in _SHARES:
        step = share * largest / limit
        rounded = np.rint(rows / step).clip(-limit, limit) * step
        error = np.square(rounded - rows).sum(1, keepdims=True)
        better = error < least
        best, least = np.where(better, share * largest, best), np.minimum(error, least)
    return rows.clip(-best, best).reshape(weight.shape)
