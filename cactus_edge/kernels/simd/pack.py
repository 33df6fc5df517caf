"""Weights for vector tiles, and the tables that tell a tile where it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cactus_edge.graph import FullyConnected, Int8Array, Int64Array, Linear
from cactus_edge.kernels.demand import Demand, Layout, TableBuilder
from cactus_edge.kernels.simd import emit
from cactus_edge.kernels.simd.emit import Shape
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.kernels.steps import STREAM, TILED, Step
from cactus_edge.semantics import Rounding

_SMALLEST_GROUP_SHARE = 0.9
"""Tiles of many channels are taken unless more than a tenth of their channels would be empty."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A linear layer as a matrix.

    Attributes:
        values: int8 [channels, inputs].
        offsets: int64 [inputs], ascending: bytes from a window's start to each input.
        bits: of the weights.
    """

    values: Int8Array
    offsets: Int64Array
    bits: int

    def runs(self) -> list[tuple[int, int]]:
        """Contiguous stretches of inputs (index of the first, number)."""
        starts = np.flatnonzero(np.concatenate([[True], np.diff(self.offsets) != 1]))
        ends = np.append(starts[1:], self.offsets.size)
        return [(a, b - a) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def pack_vector(
    builder: TableBuilder,
    tier: Tier,
    op: Linear,
    matrix: Matrix,
    base: Step,
    rows: int,
    layout: Layout,
) -> tuple[Step, Demand]:
    """The step of a CONV_2D or FULLY_CONNECTED.

    Args:
        builder: receives weights and tables.
        tier: of the kernels.
        op: the layer, resolved.
        matrix: its weights.
        base: its step, with ``windows`` and ``targets``.
        rows: output pixels of a block of images.
        layout: dense, sparse, or the one that should be faster.
    """
    shape, small = _shape(tier, rows, matrix.values.shape[0])
    channels = shape.channels(tier)
    groups = -(-matrix.values.shape[0] // channels)
    step = replace(
        base,
        tile=shape.pixels,
        groups=groups,
        group_channels=channels,
        small=int(small),
        **_epilogue(builder, tier, op, matrix, base.source_zero, groups * channels),
    )
    streamed = shape.pixels == 1
    step = replace(
        step,
        opcode=STREAM if streamed else TILED,
        nibbles=int(streamed and matrix.bits <= 4 and isinstance(op, FullyConnected)),
    )
    step = replace(step, **_dense(builder, matrix, shape, groups * channels, step, tier))
    return step, Demand(accumulators=shape.pixels * channels)


def _shape(tier: Tier, rows: int, channels: int) -> tuple[Shape, bool]:
    """The tile for so many rows and channels, and whether it is one of few channels."""
    many, few = (
        (emit.streaming(tier), emit.thin(tier))
        if rows < emit.wide(tier).pixels
        else (emit.wide(tier), emit.narrow(tier))
    )
    padded = [-(-channels // s.channels(tier)) * s.channels(tier) for s in (many, few)]
    small = padded[1] < _SMALLEST_GROUP_SHARE * padded[0]
    return (few, True) if small else (many, False)


def _epilogue(
    builder: TableBuilder, tier: Tier, op: Linear, matrix: Matrix, zero: int, count: int
) -> dict[str, int]:
    """Biases with zero points folded in, and scales where tiles requantize."""
    requantization = op.requantization
    assert requantization is not None, "graph is not resolved"
    shift = zero - emit.activation_shift(tier)
    bias = np.zeros(count, np.int64)
    bias[: op.channels] = op.bias - shift * matrix.values.astype(np.int64).sum(axis=1)
    fields = {"bias": builder.bytes(bias.astype(np.int32))}  # sums are exact modulo 2**32
    if (requantization.rounding == int(Rounding.FLOAT32)).all():
        fields |= {"fused": 1, "factors": builder.bytes(_scales(op, count))}
    return fields


def _scales(op: Linear, count: int) -> npt.NDArray[np.float32]:
    """Float32 factors; a FLOAT32 multiplier has 24 bits, so they are exact."""
    requantization = op.requantization
    assert requantization is not None
    scales = np.zeros(count, np.float32)
    scales[: op.channels] = np.ldexp(
        requantization.multiplier.astype(np.float32), -requantization.shift
    )
    return scales


def _dense(
    builder: TableBuilder, matrix: Matrix, shape: Shape, count: int, step: Step, tier: Tier
) -> dict[str, int]:
    """All weights, four bytes of a run for each channel of a group at a time."""
    unit = 4 * shape.phases
    runs = matrix.runs()
    lengths = [-(-length // unit) * unit for _, length in runs]
    padded = np.zeros((count, sum(lengths)), np.int8)
    end = 0
    for (first, length), size in zip(runs, lengths, strict=True):
        padded[: len(matrix.values), end : end + length] = matrix.values[:, first : first + length]
        end += size
    channels = shape.channels(tier)
    steps = padded.reshape(-1, channels, padded.shape[1] // 4, 4).transpose(0, 2, 1, 3)
    if step.nibbles:
        low, high = steps[:, 0::2].view(np.uint8), steps[:, 1::2].view(np.uint8)
        steps = ((low & 15) | (high << 4)).view(np.int8)
    weights = builder.bytes(np.ascontiguousarray(steps))
    size = steps[0].size
    table = [[weights + group * size, 0, 0, 0, 0, 0] for group in range(len(steps))]
    starts = [int(matrix.offsets[first]) for first, _ in runs]
    return {
        "runs": builder.integers([[a, n // 4] for a, n in zip(starts, lengths, strict=True)]),
        "run_count": len(runs),
        "group_table": builder.integers(table),
    }
