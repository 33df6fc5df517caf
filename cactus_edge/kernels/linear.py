"""Every linear layer, tile by tile: accumulators by one of the kernels, then requantization.

Requantization stands here alone, because its loops are the larger part of the code to compile.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.extending import overload

from cactus_edge.kernels.arithmetic import requantize_channels
from cactus_edge.kernels.dense import dense
from cactus_edge.kernels.depthwise import depthwise
from cactus_edge.kernels.jit import kernel
from cactus_edge.kernels.rows import Tables, Workspace, target_of
from cactus_edge.kernels.simd.depthwise import depthwise_tiles
from cactus_edge.kernels.simd.layers import vector_layer
from cactus_edge.kernels.simd.tags import Tag, TierType
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.kernels.sparse import sparse
from cactus_edge.kernels.steps import DENSE, DEPTHWISE, DEPTHWISE_TILE, SPARSE, Step


def linear(
    tag: Tag, step: Step, tables: Tables, work: Workspace, images: int, part: int, parts: int
) -> None:
    """A part of a layer for a block of images, on a tier's kernels; for compiled code alone."""
    raise NotImplementedError("called by compiled code alone")


@overload(linear, strict=False, jit_options={"nogil": True, "error_model": "numpy"})
def _linear(
    tag: TierType,
    step: object,
    tables: object,
    work: object,
    images: object,
    part: object,
    parts: object,
) -> Callable[[Tag, Step, Tables, Workspace, int, int, int], None]:
    """What is compiled for a tier: only its own tiles."""

    def plain(
        tag: Tag, step: Step, tables: Tables, work: Workspace, images: int, part: int, parts: int
    ) -> None:
        plain_layer(step, tables, work, images, part, parts)

    def vector(
        tag: Tag, step: Step, tables: Tables, work: Workspace, images: int, part: int, parts: int
    ) -> None:
        if step.opcode == DEPTHWISE:
            depthwise_layer(step, tables, work, images, part, parts)
        elif step.opcode == DEPTHWISE_TILE:
            depthwise_tiles(tag, step, tables, work, images, part, parts)
        else:
            vector_layer(tag, step, tables, work, images, part, parts)

    return plain if tag.tier is Tier.PLAIN else vector


@kernel
def plain_layer(
    step: Step, tables: Tables, work: Workspace, images: int, part: int, parts: int
) -> None:
    """A part of the rows, without any vector tile."""
    channels = step.channels
    rows = images * step.height * step.width
    tiles = -(-rows // step.tile)
    for number in range(tiles * part // parts, tiles * (part + 1) // parts):
        first = number * step.tile
        count = min(step.tile, rows - first)
        if step.opcode == DENSE:
            dense(step, tables, work, first, count)
        elif step.opcode == SPARSE:
            sparse(step, tables, work, first, count)
        else:
            depthwise(step, tables, work, first, count)
        for row in range(count):
            begin = row * channels
            target = target_of(step, first + row)
            requantize_channels(
                step,
                tables.integers,
                work.accumulators[begin : begin + channels],
                work.activations[target : target + channels],
                0,
            )


@kernel
def depthwise_layer(
    step: Step, tables: Tables, work: Workspace, images: int, part: int, parts: int
) -> None:
    """A part of the rows of a DEPTHWISE_CONV_2D, one by one."""
    channels = step.channels
    rows = images * step.height * step.width
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        depthwise(step, tables, work, row, 1)
        target = target_of(step, row)
        requantize_channels(
            step,
            tables.integers,
            work.accumulators[:channels],
            work.activations[target : target + channels],
            0,
        )
