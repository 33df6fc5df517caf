"""DEPTHWISE_CONV_2D: one tap at a time over all channels of a pixel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cactus_edge.kernels.jit import inlined, kernel
from cactus_edge.kernels.rows import Tables, Workspace, fill_bias, source_of
from cactus_edge.kernels.steps import Step

ByteArray = npt.NDArray[np.uint8]
Int8Array = npt.NDArray[np.int8]
Int32Array = npt.NDArray[np.int32]


@kernel
def depthwise(step: Step, tables: Tables, work: Workspace, first: int, count: int) -> None:
    """Accumulators of some rows, int32 [rows, channels]. Weights are [taps, channels]."""
    channels = step.channels
    inputs = channels // step.multiplier
    taps = tables.integers[step.taps : step.taps + step.tap_count]
    for row in range(count):
        start = source_of(step, first + row)
        sums = work.accumulators[row * channels : (row + 1) * channels]
        fill_bias(step, tables.integers, sums)
        for tap in range(step.tap_count):
            source = work.activations[start + taps[tap] : start + taps[tap] + inputs]
            begin = step.weights + tap * channels
            _add_tap(step, source, tables.weights[begin : begin + channels], sums)


@inlined
def _add_tap(step: Step, source: ByteArray, weights: Int8Array, sums: Int32Array) -> None:
    zero = np.int32(step.source_zero)
    if step.multiplier == 1:
        for i in range(len(source)):
            value = np.int32(np.int32(source[i]) - zero)
            sums[i] = np.int32(sums[i] + np.int32(value * np.int32(weights[i])))
        return
    channel = 0
    for i in range(len(source)):
        value = np.int32(np.int32(source[i]) - zero)
        for _ in range(step.multiplier):
            sums[channel] = np.int32(sums[channel] + np.int32(value * np.int32(weights[channel])))
            channel += 1
