"""The one function that Python calls: a whole graph on a batch, block by block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cactus_edge import semantics
from cactus_edge.kernels.elementwise import add, copy_runs, pool
from cactus_edge.kernels.jit import entry, source_digest
from cactus_edge.kernels.linear import linear
from cactus_edge.kernels.rows import Tables, Workspace
from cactus_edge.kernels.steps import ADD, COPY, DEPTHWISE, LOAD, STORE

ByteArray = npt.NDArray[np.uint8]
Walk = Callable[[npt.NDArray[np.void], Tables, Workspace, ByteArray, ByteArray, int], int]


def _walker(digest: int) -> Walk:
    @entry
    def run(
        steps: npt.NDArray[np.void],
        tables: Tables,
        work: Workspace,
        batch: ByteArray,
        results: ByteArray,
        block: int,
    ) -> int:
        """Run ``steps`` on every image.

        Args:
            steps: records of ``steps.STEP``.
            tables: packed graph.
            work: memory of this thread, for ``block`` images.
            batch: uint8 [images, input bytes], int8 as it is stored.
            results: uint8 [images, result bytes], written.
            block: images that are computed together, layer by layer.

        Returns:
            the digest of the sources that were compiled, which ties the cache to them.
        """
        for first in range(0, len(batch), block):
            images = min(block, len(batch) - first)
            for i in range(len(steps)):
                step = steps[i]
                code = step.opcode
                if code <= DEPTHWISE:
                    linear(step, tables, work, images)
                elif code == ADD:
                    add(step, tables, work, images)
                elif code == LOAD:
                    for image in range(images):
                        source = batch[first + image]
                        copy_runs(step, tables.integers, source, work.activations, image)
                elif code == STORE:
                    for image in range(images):
                        target = results[first + image]
                        copy_runs(step, tables.integers, work.activations, target, image)
                elif code == COPY:
                    for image in range(images):
                        copy_runs(step, tables.integers, work.activations, work.activations, image)
                else:
                    pool(step, tables, work, images)
        return digest

    return run


walk = _walker(source_digest(semantics))
