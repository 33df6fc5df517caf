"""What each layer of a program runs as, how large it is and how long it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cactus_edge.graph import DepthwiseConv2D, FullyConnected, Graph, Linear
from cactus_edge.kernels import steps
from cactus_edge.kernels.choose import seconds
from cactus_edge.kernels.program import Program
from cactus_edge.kernels.replay import Replay, median_seconds

KERNELS = {
    steps.DENSE: "plain dense",
    steps.SPARSE: "plain sparse",
    steps.DEPTHWISE: "plain depthwise",
    steps.ADD: "add",
    steps.AVERAGE: "average pool",
    steps.MAXIMUM: "max pool",
    steps.COPY: "copy",
    steps.LOOKUP: "table",
    steps.PAIR: "table of two",
    steps.TILED: "dense tile",
    steps.STREAM: "dense stream",
    steps.BLOCKS: "blocks",
    steps.PERMUTED: "gather-permute tile",
    steps.PERMUTED_STREAM: "gather-permute stream",
    steps.MASKED_STREAM: "bit mask stream",
    steps.DEPTHWISE_TILE: "depthwise tile",
    steps.SKIPPING: "skipping stream",
}


@dataclass(frozen=True)
class Explanation:
    """One operator of a program for a block of images.

    ``sparsity`` is the share of zero weights, ``packed_bytes`` the size of its tables,
    ``multiplications`` those of a dense layer for one image; ``microseconds`` for one image.
    ``live`` is the share of steps that are not skipped, the median over samples; None where nothing
    is skipped, and without samples, where the time is that of a layer that skips nothing.
    """

    name: str
    kind: str
    kernel: str
    sparsity: float
    packed_bytes: int
    multiplications: int
    microseconds: float
    live: float | None


def explain(
    graph: Graph,
    program: Program,
    images: npt.NDArray[np.uint8] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Explanation]:
    """Time every operator by itself.

    Args:
        graph: the resolved graph, before channels were left out for the program.
        program: see ``program``.
        images: uint8 [samples, bytes of an image], on which steps are timed whose time depends on
            their inputs.
        progress: called with (operators done, operators in all), those included that take no step.
    """
    found: list[Explanation] = []
    for number, op in enumerate(graph.core):
        if progress is not None:
            progress(number, len(graph.core))
        if number not in program.operators:
            continue
        position = program.operators.index(number)
        kernel = KERNELS[program.opcode(number)]
        if program.steps[position]["nibbles"]:
            kernel += ", int4"
        if program.steps[position]["fused"]:
            kernel += ", fused"
        zeros = 0.0  # float: a share
        if isinstance(op, Linear):
            zeros = 1 - np.count_nonzero(op.weights.values) / op.weights.values.size
        if images is not None and program.opcode(number) == steps.SKIPPING:
            replay = Replay(graph, program, number, images)
            (taken,), live = median_seconds([replay]), replay.live()
        else:
            taken, live = seconds(program, number, program.block), None
        found.append(
            Explanation(
                name=op.name,
                kind=op.kind,
                kernel=kernel,
                sparsity=zeros,
                packed_bytes=program.sizes[position],
                multiplications=_multiplications(graph, op) if isinstance(op, Linear) else 0,
                microseconds=1e6 * taken / program.block,
                live=live,
            )
        )
    if progress is not None:
        progress(len(graph.core), len(graph.core))
    return found


def _multiplications(graph: Graph, op: Linear) -> int:
    if isinstance(op, FullyConnected):
        return op.weights.values.size
    _, height, width, channels = graph.tensors[op.output].shape
    per_output = op.weights.values.size // channels
    if isinstance(op, DepthwiseConv2D):
        per_output = int(np.prod(op.weights.values.shape[1:3]))
    return height * width * channels * per_output
