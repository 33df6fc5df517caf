"""The one function that Python calls: a whole graph on a batch, block by block.

It takes addresses. To unpack a dozen arrays costs Numba some microseconds for each call, which is
as long as a small network takes. ``Worker`` owns the arrays behind the addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from cactus_edge import semantics
from cactus_edge.kernels.elementwise import add, copy_runs, lookup, pair, pool
from cactus_edge.kernels.jit import entry, kernel, pointer, source_digest
from cactus_edge.kernels.linear import linear
from cactus_edge.kernels.program import Program
from cactus_edge.kernels.rows import Tables, Workspace
from cactus_edge.kernels.simd.tags import Tag
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.kernels.steps import (
    ADD,
    COPY,
    DEPTHWISE,
    LOAD,
    LOOKUP,
    PAIR,
    STEP,
    STORE,
    TILED,
    Step,
)
from cactus_edge.kernels.team import (
    STOP,
    await_run,
    await_step,
    begin,
    claim,
    complete,
    images_of,
    parts_of,
)

ByteArray = npt.NDArray[np.uint8]
Steps = npt.NDArray[np.void]
Walk = Callable[[Tag, int, int, int, int], int]

DIGEST = source_digest(semantics)
_FRAME = 27


@kernel
def _operate(
    tag: Tag,
    step: Step,
    tables: Tables,
    work: Workspace,
    sources: ByteArray,
    targets: ByteArray,
    part: int,
    parts: int,
) -> None:
    """A part of a step for a block of images; copies and tables have one part."""
    code, count = step.opcode, len(sources)
    if code <= DEPTHWISE or code >= TILED:
        linear(tag, step, tables, work, count, part, parts)
    elif code == ADD:
        add(step, tables, work, count, part, parts)
    elif code == LOAD:
        for i in range(count):
            copy_runs(step, tables.integers, sources[i], work.activations, i)
    elif code == STORE:
        for i in range(count):
            copy_runs(step, tables.integers, work.activations, targets[i], i)
    elif code == COPY:
        for i in range(count):
            copy_runs(step, tables.integers, work.activations, work.activations, i)
    elif code == LOOKUP:
        lookup(step, tables, work, count)
    elif code == PAIR:
        pair(step, tables, work, count)
    else:
        pool(step, tables, work, count, part, parts)


@kernel
def _walk_block(
    tag: Tag,
    steps: Steps,
    tables: Tables,
    work: Workspace,
    sources: ByteArray,
    targets: ByteArray,
    team: int,
    member: int,
    generation: int,
) -> None:
    """All steps for a block of images, or what this thread of a team gets of each."""
    for i in range(len(steps)):
        step = steps[i]
        part, parts = 0, 1
        if team != 0:
            parts = parts_of(team, i)
            if member > 0:
                if parts == 1:
                    continue
                await_step(team, len(steps), i - 1, generation)
            part = claim(team, len(steps), i, member, generation)
        done = 0
        while part >= 0:
            _operate(tag, step, tables, work, sources, targets, part, parts)
            done += 1
            part = claim(team, len(steps), i, member, generation) if team != 0 else -1
        if team != 0:
            complete(team, len(steps), i, done)
            if member == 0:
                await_step(team, len(steps), i, generation)


def _walker(digest: int) -> Walk:
    @entry
    def run(tag: Tag, frame_: int, batch: int, results: int, images: int) -> int:
        """Run a program on images, or help the leader of a team until there is no more work.

        Args:
            tag: of the tier whose instructions are used.
            frame_: address of int64 [27]: address and length of each array, see ``Worker``; then
                the bytes of an image, the bytes of its results, and how many images are computed
                together; address of the team's words, or 0; and which member of it this thread is,
                0 for the leader.
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
        team, member = frame[25], frame[26]
        first, generation = 0, 0
        while member > 0 or first < images:
            if member > 0:
                generation = await_run(team, member, generation)
                if generation == STOP:
                    break
                count = images_of(team)
            else:
                count = min(block, images - first)
                if team != 0:
                    generation = begin(team, count)
            # A helper neither loads nor stores; of these arrays it reads the length.
            source = pointer(batch + first * image_bytes)
            target = pointer(results + first * result_bytes)
            sources = carray(source, (count, image_bytes), np.uint8)
            targets = carray(target, (count, result_bytes), np.uint8)
            _walk_block(tag, steps, tables, work, sources, targets, team, member, generation)
            first += count
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
    frame[24] = 1
    dispatcher: Any = _walk
    digest = dispatcher(Tag(tier), frame.ctypes.data, 0, 0, 0)
    assert digest == DIGEST, "kernels in the cache are not those of this package; delete the cache"
    for signature, compiled in dispatcher.overloads.items():
        if signature[0].tier is tier:
            return compiled.entry_point
    raise AssertionError(f"a defect: nothing was compiled for {tier}")


def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where no folder could be written."""
    cache: Any = getattr(_walk, "_cache", None)
    folder = getattr(cache, "cache_path", None)
    return None if folder is None else Path(folder)


class Frame:
    """The arrays of one thread and their addresses, as compiled code takes them.

    Args:
        program: what is run.
        work: the thread's memory.
        team: words of ``team.words``, where threads share a run.
        member: which of the team's threads this is, 0 for the leader.
        steps: some of the program's steps, all of them if None.
    """

    def __init__(
        self,
        program: Program,
        work: Workspace,
        team: npt.NDArray[np.int64] | None = None,
        member: int = 0,
        steps: Steps | None = None,
    ) -> None:
        """Collect the addresses."""
        self._walk = walker(program.tier)
        self._tag = Tag(program.tier)
        self._arrays = (program.steps if steps is None else steps, *program.tables, *work)
        self._team = team
        pairs = [(array.ctypes.data, array.size) for array in self._arrays]
        sizes = (program.image_bytes, program.result_bytes, program.block)
        membership = (0 if team is None else team.ctypes.data, member)
        self._frame = np.array([*np.ravel(pairs), *sizes, *membership], np.int64)
        assert self._frame.size == _FRAME
        self._address = self._frame.ctypes.data

        self.run = partial(self._walk, self._tag, self._address)
        """(batch, results, count): run images between two addresses; a helper returns when there
        was no work for a while. Not a method: that alone would take as long as a small layer."""


def check_batch(
    program: Program, batch: npt.NDArray[np.uint8], results: npt.NDArray[np.uint8]
) -> None:
    """Refuse arrays that compiled code would read or write past their ends."""
    assert batch.flags.c_contiguous and results.flags.c_contiguous
    assert batch.shape == (len(results), program.image_bytes)
    assert results.shape[1] == program.result_bytes


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
        self._thread = Frame(program, program.workspace())
        staging = self.images.ctypes.data, self.results.ctypes.data
        self.run_staged: Callable[[int], object] = partial(self._thread.run, *staging)
        """Results of the first images, so many, of ``images`` to ``results``."""

    def run(self, batch: npt.NDArray[np.uint8], results: npt.NDArray[np.uint8]) -> None:
        """Results of any number of images; both arrays are contiguous."""
        check_batch(self.program, batch, results)
        self._thread.run(batch.ctypes.data, results.ctypes.data, len(batch))

    def close(self) -> None:
        """Nothing to do; for ``threads.ParallelWorker``, in whose place this one stands."""
