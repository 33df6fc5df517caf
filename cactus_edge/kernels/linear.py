"""Every linear layer, tile by tile: accumulators by one of the kernels, then requantization.

Requantization stands here alone, because its loops are the larger part of the code to compile.
"""

from __future__ import annotations

from cactus_edge.kernels.arithmetic import requantize_pixel
from cactus_edge.kernels.dense import dense
from cactus_edge.kernels.depthwise import depthwise
from cactus_edge.kernels.jit import kernel
from cactus_edge.kernels.rows import Tables, Workspace, target_of
from cactus_edge.kernels.sparse import sparse
from cactus_edge.kernels.steps import DENSE, SPARSE, Step


@kernel
def linear(step: Step, tables: Tables, work: Workspace, images: int) -> None:
    """All rows of a block of images."""
    channels = step.channels
    rows = images * step.height * step.width
    for first in range(0, rows, step.tile):
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
            requantize_pixel(
                step,
                tables.integers,
                work.accumulators[begin : begin + channels],
                work.activations[target : target + channels],
            )
