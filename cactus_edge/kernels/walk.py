"""The one function that Python calls: a whole graph on a batch, block by block.

It takes addresses. To unpack a dozen arrays costs Numba some microseconds for each call, which is
as long as a small network takes. ``Worker`` owns the arrays behind the addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from cactus_edge import semantics
from cactus_edge.kernels.elementwise import add, copy_runs, pool
from cactus_edge.kernels.jit import entry, pointer, source_digest
from cactus_edge.kernels.linear import linear
from cactus_edge.kernels.program import Program
from cactus_edge.kernels.rows import Tables, Workspace
from cactus_edge.kernels.simd.tags import Tag
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.kernels.steps import ADD, COPY, DEPTHWISE, LOAD, STEP, STORE, TILED

Int64Array = npt.NDArray[np.int64]
Walk = Callable[[Tag, int, int, int, int], int]

DIGEST = source_digest(semantics)
_FRAME = 25


def _walker(digest: int) -> Walk:
    @entry
    def run(tag: Tag, frame_: int, batch: int, results: int, images: int) -> int:
        """Run a program on images.

        Args:
            tag: of the tier whose instructions are used.
            frame_: address of int64 [25]: address and length of each array, see ``Worker``; then the
                bytes of an image, the bytes of its results, and how many images are computed
                together.
            batch: address of uint8 [images, bytes of an image], int8 as it is stored.
            results: address of uint8 [images, bytes of results], written.
            images: how many there are.

        Returns:
            the digest of the sources that were compiled, which ties the cache to them.
        """
        frame = carray(pointer(frame_), (_FRAME,), np.int64)
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
            carray(pointer(frame[20]), (frame[21],), np.int64),
        )
        image_bytes, result_bytes, block = frame[22], frame[23], frame[24]
        for first in range(0, images, block):
            count = min(block, images - first)
            sources = carray(pointer(batch + first * image_bytes), (count, image_bytes), np.uint8)
            targets = carray(
                pointer(results + first * result_bytes), (count, result_bytes), np.uint8
            )
            for i in range(len(steps)):
                step = steps[i]
                code = step.opcode
                if code <= DEPTHWISE or code >= TILED:
                    linear(tag, step, tables, work, count)
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


_walk = _walker(DIGEST)


@cache
def walker(tier: Tier) -> Walk:
    """The function for a tier, compiled or read from Numba's cache.

    It is called without Numba's dispatcher, which takes longer to look at a tag than a small
    network takes to run.

    Raises:
        AssertionError: the cache holds code of other sources.
    """
    frame = np.zeros(_FRAME, np.int64)
    frame[-1] = 1
    dispatcher: Any = _walk
    digest = dispatcher(Tag(tier), frame.ctypes.data, 0, 0, 0)
    assert digest == DIGEST, "kernels in the cache are not those of this package; delete the cache"
    for signature, compiled in dispatcher.overloads.items():
        if signature[0].tier is tier:
            return compiled.entry_point
    raise AssertionError(f"a defect: nothing was compiled for {tier}")


class Worker:
    """A program with the memory of one thread, and staging for one block of images.

    ``images`` uint8 [block, bytes of an image] and ``results`` uint8 [block, bytes of results] may
    be used by the caller between two calls.
    """

    def __init__(self, program: Program) -> None:
        """Allocate, and collect the addresses."""
        self.program = program
        self._walk = walker(program.tier)
        self._tag = Tag(program.tier)
        self.images = np.zeros((program.block, program.image_bytes), np.uint8)
        self.results = np.zeros((program.block, program.result_bytes), np.uint8)
        self._arrays = (program.steps, *program.tables, *program.workspace())
        pairs = [(array.ctypes.data, array.size) for array in self._arrays]
        sizes = (program.image_bytes, program.result_bytes, program.block)
        self._frame = np.array([*np.ravel(pairs), *sizes], np.int64)
        assert self._frame.size == _FRAME
        self._address = self._frame.ctypes.data
        self._staging = (self.images.ctypes.data, self.results.ctypes.data)

    def run_staged(self, count: int) -> None:
        """Results of the first images of ``self.images`` to ``self.results``."""
        self._walk(self._tag, self._address, *self._staging, count)

    def run(self, batch: npt.NDArray[np.uint8], results: npt.NDArray[np.uint8]) -> None:
        """Results of any number of images; both arrays are contiguous."""
        assert batch.flags.c_contiguous and results.flags.c_contiguous
        assert batch.shape == (len(results), self.program.image_bytes)
        assert results.shape[1] == self.program.result_bytes
        self._walk(self._tag, self._address, batch.ctypes.data, results.ctypes.data, len(batch))
