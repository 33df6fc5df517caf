"""The one function that Python calls: a whole graph on a batch, block by block.

It takes addresses. To unpack a dozen arrays costs Numba some microseconds for each call, which is
as long as a small network takes. ``Worker`` owns the arrays behind the addresses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from cactus_edge import semantics
from cactus_edge.kernels.elementwise import add, copy_runs, pool
from cactus_edge.kernels.jit import entry, pointer, source_digest
from cactus_edge.kernels.linear import linear
from cactus_edge.kernels.program import Program
from cactus_edge.kernels.rows import Tables, Workspace
from cactus_edge.kernels.steps import ADD, COPY, DEPTHWISE, LOAD, STEP, STORE

Int64Array = npt.NDArray[np.int64]
Walk = Callable[[Int64Array, int, int, int], int]

DIGEST = source_digest(semantics)
_FRAME = 23


def _walker(digest: int) -> Walk:
    @entry
    def run(frame: Int64Array, batch: int, results: int, images: int) -> int:
        """Run a program on images.

        Args:
            frame: address and length of each array, see ``Worker``; then the bytes of an image, the
                bytes of its results, and how many images are computed together.
            batch: address of uint8 [images, bytes of an image], int8 as it is stored.
            results: address of uint8 [images, bytes of results], written.
            images: how many there are.

        Returns:
            the digest of the sources that were compiled, which ties the cache to them.
        """
        steps = carray(pointer(frame[0]), (frame[1],), STEP)  # pyright: ignore
        tables = Tables(
            carray(pointer(frame[2]), (frame[3],), np.int8),
            carray(pointer(frame[4]), (frame[5],), np.uint16),
            carray(pointer(frame[6]), (frame[7],), np.int64),
        )
        work = Workspace(
            carray(pointer(frame[8]), (frame[9],), np.uint8),
            carray(pointer(frame[10]), (frame[11],), np.int16),
            carray(pointer(frame[12]), (frame[13],), np.int32),
            carray(pointer(frame[14]), (frame[15],), np.int8),
            carray(pointer(frame[16]), (frame[17],), np.int32),
            carray(pointer(frame[18]), (frame[19],), np.int64),
        )
        image_bytes, result_bytes, block = frame[20], frame[21], frame[22]
        for first in range(0, images, block):
            count = min(block, images - first)
            sources = carray(pointer(batch + first * image_bytes), (count, image_bytes), np.uint8)
            targets = carray(
                pointer(results + first * result_bytes), (count, result_bytes), np.uint8
            )
            for i in range(len(steps)):
                step = steps[i]
                code = step.opcode
                if code <= DEPTHWISE:
                    linear(step, tables, work, count)
                elif code == ADD:
                    add(step, tables, work, count)
                elif code == LOAD:
                    for j in range(count):
                        copy_runs(step, tables.integers, sources[j], work.activations, j)
                elif code == STORE:
                    for j in range(count):
                        copy_runs(step, tables.integers, work.activations, targets[j], j)
                elif code == COPY:
                    for j in range(count):
                        copy_runs(step, tables.integers, work.activations, work.activations, j)
                else:
                    pool(step, tables, work, count)
        return digest

    return run


walk = _walker(DIGEST)


class Worker:
    """A program with the memory of one thread, and staging for one block of images.

    ``images`` uint8 [block, bytes of an image] and ``results`` uint8 [block, bytes of results] may
    be used by the caller between two calls.
    """

    def __init__(self, program: Program) -> None:
        """Allocate, and collect the addresses."""
        self.program = program
        self.images = np.zeros((program.block, program.image_bytes), np.uint8)
        self.results = np.zeros((program.block, program.result_bytes), np.uint8)
        self._arrays = (program.steps, *program.tables, *program.workspace())
        pairs = [(array.ctypes.data, array.size) for array in self._arrays]
        sizes = (program.image_bytes, program.result_bytes, program.block)
        self._frame = np.array([*np.ravel(pairs), *sizes], np.int64)
        assert self._frame.size == _FRAME
        self._staging = (self.images.ctypes.data, self.results.ctypes.data)

    def run_staged(self, count: int) -> None:
        """Results of the first images of ``self.images`` to ``self.results``."""
        walk(self._frame, *self._staging, count)

    def run(self, batch: npt.NDArray[np.uint8], results: npt.NDArray[np.uint8]) -> None:
        """Results of any number of images; both arrays are contiguous."""
        assert batch.flags.c_contiguous and results.flags.c_contiguous
        assert batch.shape == (len(results), self.program.image_bytes)
        assert results.shape[1] == self.program.result_bytes
        walk(self._frame, batch.ctypes.data, results.ctypes.data, len(batch))


def prepare() -> None:
    """Compile the kernels, or load them from Numba's cache, by running no image.

    Raises:
        AssertionError: the cache holds code of other sources.
    """
    frame = np.zeros(_FRAME, np.int64)
    frame[-1] = 1
    digest = walk(frame, 0, 0, 0)
    assert digest == DIGEST, "kernels in the cache are not those of this package; delete the cache"
