"""Weights for vector tiles, and the tables that tell a tile where it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cactus_edge.graph import Int8Array, Int64Array, Linear
from cactus_edge.kernels.demand import Demand, Layout, TableBuilder
from cactus_edge.kernels.formats import permuted
from cactus_edge.kernels.formats.bitmask import pack_bitmask
from cactus_edge.kernels.formats.blocks import STEP, pack_blocks
from cactus_edge.kernels.formats.dense import pack_dense
from cactus_edge.kernels.formats.depthwise import pack_depthwise
from cactus_edge.kernels.place import Placement
from cactus_edge.kernels.simd import emit
from cactus_edge.kernels.simd.emit import Shape
from cactus_edge.kernels.simd.skipping import AHEAD
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.kernels.steps import (
    BLOCKS,
    DEPTHWISE_TILE,
    MASKED_STREAM,
    PERMUTED,
    PERMUTED_STREAM,
    SKIPPING,
    STREAM,
    TILED,
    Step,
)
from cactus_edge.semantics import Rounding

_SMALLEST_GROUP_SHARE = 0.9
"""Tiles of many channels are taken unless more than a tenth of their channels would be empty."""
_SINGLE_SHARED, _SINGLE_ALONE = 0.72, 0.6
"""Time of a sparse step of one chunk in that of one of two, if registers share chunks or not."""


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


@dataclass(frozen=True, eq=False)
class Packed:
    """A step, the scratch memory that it demands, and in which order it writes the channels."""

    step: Step
    demand: Demand
    order: Int64Array | None = None


def with_rows(
    builder: TableBuilder, base: Step, source: Placement, target: Placement, block: int, pixels: int
) -> Step:
    """A step with ``windows`` and ``targets``, for tiles of so many rows.

    Where a block of images has fewer rows, the last one is repeated.
    """
    image, y, x = (axis.reshape(-1) for axis in np.indices((block, base.height, base.width)))
    windows = base.source + image * source.image + y * base.down + x * base.right
    targets = target.origin + image * target.image + y * target.row + x * base.channels
    missing = max(pixels - windows.size, 0)
    windows, targets = (np.pad(places, (0, missing), "edge") for places in (windows, targets))
    return replace(
        base,
        tile=pixels,
        windows=builder.integers(windows),
        targets=builder.integers(targets),
    )


def pack_vector(
    builder: TableBuilder,
    tier: Tier,
    op: Linear,
    matrix: Matrix,
    base: Step,
    layout: Layout,
    *,
    single: bool,
    any_order: bool,
) -> Packed:
    """The step of a CONV_2D or FULLY_CONNECTED.

    Args:
        builder: receives weights and tables.
        tier: of the kernels.
        op: the layer, resolved.
        matrix: its weights.
        base: its step, with ``windows`` and ``targets`` of ``tile`` rows or more.
        layout: dense, sparse, in blocks, with masks or skipping. What a layer or a tier does not
            have is dense: blocks need many rows, masks few and AVX512, skipping a single one and
            inputs whose zero point is the byte that adds nothing.
        single: whether the layer has one row in all.
        any_order: whether channels may be written in another order than the layer's.
    """
    many = base.tile >= emit.wide(tier).pixels
    count = matrix.values.shape[0]
    shape, small = _shape(tier, many, count)
    if layout is Layout.BLOCKS and many:
        shape, small = emit.wide(tier), False
    masked = layout is Layout.BITMASK and not many and tier is Tier.AVX512
    if masked or (layout is Layout.SPARSE and not many):
        shape, small = emit.thin(tier), True
    skipping = layout is Layout.SKIPPING and single
    skipping = skipping and base.source_zero == emit.activation_shift(tier)
    if skipping:
        shape, small = emit.skipping(tier), False
    channels = shape.channels(tier)
    groups = -(-count // channels)
    step = replace(
        base, tile=shape.pixels, groups=groups, group_channels=channels, small=int(small)
    )
    order: Int64Array | None = None
    live = 0
    if layout is Layout.BLOCKS and many:
        step = replace(step, opcode=BLOCKS, **_blocks(builder, matrix, channels))
    elif masked:
        step = replace(step, opcode=MASKED_STREAM, **_masked(builder, matrix))
    elif layout is Layout.SPARSE:
        fields, order = _permuted(builder, matrix, tier, shape, many, any_order)
        step = replace(step, opcode=PERMUTED if many else PERMUTED_STREAM, **fields)
    elif skipping:
        step = replace(step, opcode=SKIPPING, nibbles=int(matrix.bits <= 4))
        fields, steps = _dense(builder, matrix, replace(shape, phases=1), step)
        step = replace(step, depth=steps, **fields)
        live = 1 + steps + AHEAD
    else:
        nibbles = not many and matrix.bits <= 4  # weights are read once: bytes are what counts
        step = replace(step, opcode=TILED if many else STREAM, nibbles=int(nibbles))
        step = replace(step, **_dense(builder, matrix, shape, step)[0])
    step = replace(
        step, **_epilogue(builder, tier, op, matrix, base.source_zero, groups * channels, order)
    )
    return Packed(step, Demand(accumulators=shape.pixels * channels, rows=live), order)


def pack_taps(builder: TableBuilder, tier: Tier, op: Linear, matrix: Matrix, base: Step) -> Packed:
    """The step of a DEPTHWISE_CONV_2D with an output for each input.

    Args:
        builder: receives weights and tables.
        tier: of the kernels.
        op: the layer, resolved.
        matrix: weights int8 [channels, taps], and where in a channel's window each tap lies.
        base: its step, with ``windows`` and ``targets`` of ``tile`` rows or more.
    """
    count, taps = matrix.values.shape
    large, few = emit.depthwise_wide(tier), emit.depthwise_narrow(tier)
    shape, small = _smaller(tier, large, few, count)
    if count < large.channels(tier):  # a last group of fewer channels cannot be moved back
        shape, small = few, True
    channels, together = shape.channels(tier), emit.products_of(tier)
    packed = pack_depthwise(matrix.values, channels, together)
    # Taps that only fill up a register have weight 0 and read where the first one does.
    filler = np.full(-taps % together, matrix.offsets[0])
    step = replace(
        base,
        opcode=DEPTHWISE_TILE,
        taps=builder.integers(matrix.offsets, filler),
        tap_count=taps + filler.size,
        groups=len(packed),
        group_channels=channels,
        small=int(small),
        weights=builder.bytes(packed),
    )
    padded = max(count, channels)
    step = replace(step, **_epilogue(builder, tier, op, matrix, base.source_zero, padded, None))
    return Packed(step, Demand(accumulators=shape.pixels * padded))


def _permuted(
    builder: TableBuilder,
    matrix: Matrix,
    tier: Tier,
    shape: Shape,
    many: bool,
    any_order: bool,
) -> tuple[dict[str, int], Int64Array | None]:
    """No zeros; four weights of a channel at a time. Also the channels' order, if it changed."""
    wide = tier is Tier.AVX512
    registers = shape.channels(tier) // emit.channels_of(tier)
    steps = permuted.Shape(
        lanes=emit.channels_of(tier),
        registers=registers,
        window=emit.chunk_of(tier),
        alignment=1 if registers > 1 or not wide else emit.chunk_of(tier),
        dual=wide,
        single_cost=_SINGLE_SHARED if registers > 1 else _SINGLE_ALONE,
    )
    packed = permuted.pack_permuted(matrix.values, matrix.offsets, steps, keep_order=not any_order)
    stream, offsets = builder.bytes(packed.stream), builder.bytes(packed.offsets)
    table: list[list[int]] = []
    size = 2 * permuted.SLOTS * steps.channels
    for singles, duals in packed.counts.tolist():
        behind, after = stream + singles * size, offsets + 4 * singles
        table.append([stream, offsets, singles, after, duals, behind])
        stream, offsets = behind + duals * size, after + 8 * duals
    changed = (packed.order != np.arange(len(packed.order))).any()
    return {"group_table": builder.integers(table)}, packed.order if changed else None


def _blocks(builder: TableBuilder, matrix: Matrix, channels: int) -> dict[str, int]:
    """Only the blocks of a group's channels times four inputs that have a weight."""
    packed = pack_blocks(matrix.values, matrix.offsets, channels)
    weights, offsets = builder.bytes(packed.weights), builder.bytes(packed.offsets)
    begins = np.cumsum(packed.counts) - packed.counts
    size = STEP * channels
    return {
        "group_table": builder.integers(
            [
                [weights + begin * size, offsets + 4 * begin, count, 0, 0, 0]
                for begin, count in zip(begins.tolist(), packed.counts.tolist(), strict=True)
            ]
        )
    }


def _masked(builder: TableBuilder, matrix: Matrix) -> dict[str, int]:
    """All steps, with the zeros left out of the stream."""
    packed = pack_bitmask(matrix.values, matrix.offsets)
    masks, values = builder.bytes(packed.masks), builder.bytes(packed.values)
    size = 8 * packed.masks.shape[1]
    return {
        "runs": builder.integers(packed.runs),
        "run_count": len(packed.runs),
        "group_table": builder.integers(
            [
                [masks + group * size, values + start, 0, 0, 0, 0]
                for group, start in enumerate(packed.starts.tolist())
            ]
        ),
    }


def _shape(tier: Tier, many: bool, channels: int) -> tuple[Shape, bool]:
    """The tile for many rows or one and so many channels, and whether it is one of few channels."""
    large, few = (
        (emit.wide(tier), emit.narrow(tier)) if many else (emit.streaming(tier), emit.thin(tier))
    )
    return _smaller(tier, large, few, channels)


def _smaller(tier: Tier, large: Shape, few: Shape, channels: int) -> tuple[Shape, bool]:
    """The tile of few channels if the other one would have too many empty ones."""
    padded = [-(-channels // s.channels(tier)) * s.channels(tier) for s in (large, few)]
    small = padded[1] < _SMALLEST_GROUP_SHARE * padded[0]
    return (few, True) if small else (large, False)


def _epilogue(
    builder: TableBuilder,
    tier: Tier,
    op: Linear,
    matrix: Matrix,
    zero: int,
    count: int,
    order: Int64Array | None,
) -> dict[str, int]:
    """Biases with zero points folded in, and how sums are requantized, in the order of writing."""
    given = op.requantization
    assert given is not None, "graph is not resolved"
    order = np.arange(op.channels) if order is None else order
    shift = zero - emit.activation_shift(tier)
    bias = np.zeros(count, np.int64)
    sums = matrix.values.astype(np.int64).sum(axis=1)
    bias[: op.channels] = (op.bias - shift * sums)[order]
    codes, multiplier, shifts = (v[order] for v in (given.rounding, given.multiplier, given.shift))
    ends = np.flatnonzero(np.concatenate([np.diff(codes) != 0, [True]])) + 1
    fields = {
        "bias": builder.bytes(bias.astype(np.int32)),  # sums are exact modulo 2**32
        "rounding": builder.integers(np.stack([ends, codes[ends - 1]], axis=1)),
        "round_count": ends.size,
        "multipliers": builder.integers(multiplier, shifts),
    }
    if (codes == int(Rounding.FLOAT32)).all():
        scales = np.zeros(count, np.float32)  # exact: a FLOAT32 multiplier has 24 bits
        scales[: op.channels] = np.ldexp(multiplier.astype(np.float32), -shifts)
        fields |= {"fused": 1, "factors": builder.bytes(scales)}
    return fields


def _dense(
    builder: TableBuilder, matrix: Matrix, shape: Shape, step: Step
) -> tuple[dict[str, int], int]:
    """All weights, four bytes of a run for each channel of a group at a time; how many steps."""
    packed = pack_dense(
        matrix.values,
        matrix.offsets,
        step.group_channels,
        nibble=bool(step.nibbles),
        phases=shape.phases,
    )
    weights = builder.bytes(packed.weights)
    size = packed.steps * packed.step_bytes * packed.channels // (2 if packed.nibbles else 1)
    runs = packed.runs * [1, packed.step_bytes // 4]  # a kernel counts in four bytes
    fields = {
        "runs": builder.integers(runs),
        "run_count": len(runs),
        "group_table": builder.integers(
            [[weights + group * size, 0, 0, 0, 0, 0] for group in range(packed.groups)]
        ),
    }
    return fields, packed.steps
