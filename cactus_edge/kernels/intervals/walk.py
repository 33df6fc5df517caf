"""A whole graph on boxes, block by block: the interval form of ``kernels.walk``.

The program is that of the graph itself, with dense weights. Two workspaces hold lower and upper
ends; what does not decrease in any input (ADD, pools, copies) runs on one after the other, linear
layers and other tables on both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from cactus_edge import semantics
from cactus_edge.graph import DepthwiseConv2D, Graph, Linear, Operator
from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.elementwise import (
    add,
    copy_runs,
    lookup,
    lookup_interval,
    pair_interval,
    pool,
)
from cactus_edge.kernels.intervals.layers import linear_interval
from cactus_edge.kernels.jit import entry, kernel, pointer, source_digest
from cactus_edge.kernels.program import Program, build
from cactus_edge.kernels.rows import Tables, Workspace
from cactus_edge.kernels.simd.emit import wide
from cactus_edge.kernels.simd.interval import narrow_interval, wide_interval
from cactus_edge.kernels.simd.layers import GROUP_FIELDS
from cactus_edge.kernels.simd.tags import Tag
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.kernels.steps import (
    ADD,
    AVERAGE,
    COPY,
    DENSE,
    DEPTHWISE,
    LOAD,
    LOOKUP,
    MAXIMUM,
    PAIR,
    PERMUTED,
    STEP,
    STORE,
    TILED,
    Step,
)

ByteArray = npt.NDArray[np.uint8]
Walk = Callable[[Tag, int, int, int, int, int, int], int]

DIGEST = source_digest(semantics)
_FRAME = 39
_OPCODES = {
    DENSE, DEPTHWISE, ADD, AVERAGE, MAXIMUM, LOAD, STORE, COPY, LOOKUP, PAIR, TILED, PERMUTED
}  # fmt: skip
"""Steps that have an interval form."""
_MOST_WEIGHTS = 0.6
"""Layers with a larger share of weights that are not zero are dense."""
# Time of sparse steps of one chunk and of two, in that of a dense step. Measured on Zen 4: the
# first is 1.6 to 1.8 on AVX-512, AVX-VNNI and AVX2, for layers of 288 to 130,000 dense steps.
_SINGLE, _DUAL = 1.7, 2.4


def build_intervals(graph: Graph, wanted: Sequence[int], block: int, tier: Tier) -> Program:
    """The program that ``IntervalWorker`` runs.

    Args:
        graph: resolved and validated.
        wanted: tensors whose bounds are results.
        block: boxes that are computed together, at least; a tile has no fewer rows.
        tier: of the kernels.
    """
    if tier is Tier.PLAIN:
        return build(graph, wanted, block, Layout.DENSE, tier)
    program = _faster_forms(graph, wanted, max(block, wide(tier).pixels), tier)
    steps = program.steps.copy()
    rows = np.where(steps["small"], narrow_interval(tier).pixels, wide_interval(tier).pixels)
    steps["tile"] = np.where(steps["opcode"] >= TILED, rows, steps["tile"])
    return replace(program, steps=steps)


def _faster_forms(graph: Graph, wanted: Sequence[int], block: int, tier: Tier) -> Program:
    """A program whose layers are dense or sparse, whichever has steps that take less time."""
    dense = build(graph, wanted, block, Layout.DENSE, tier, depthwise_tiles=False)
    candidates = {n: Layout.SPARSE for n, op in enumerate(graph.core) if _has_zeros(op)}
    if not candidates:
        return dense
    sparse = build(graph, wanted, block, candidates, tier, depthwise_tiles=False)
    chosen = {n: form for n, form in candidates.items() if _cost(sparse, n) < _cost(dense, n)}
    if chosen == candidates:
        return sparse
    if not chosen:
        return dense
    return build(graph, wanted, block, chosen, tier, depthwise_tiles=False)


def _has_zeros(op: Operator) -> bool:
    if not isinstance(op, Linear) or isinstance(op, DepthwiseConv2D):
        return False
    return np.count_nonzero(op.weights.values) < _MOST_WEIGHTS * op.weights.values.size


def _cost(program: Program, number: int) -> float:  # float: chooses a form, not what it computes
    """Time of a layer in dense steps, for each row; ``number`` is its position in the core."""
    step = program.steps[program.operators.index(number)]
    integers = program.tables.integers
    if step["opcode"] == TILED:
        steps = integers[step["runs"] + 1 : step["runs"] + 2 * step["run_count"] : 2]
        return float(step["groups"] * steps.sum())  # float: as above
    begin, size = step["group_table"], GROUP_FIELDS * step["groups"]
    table = integers[begin : begin + size].reshape(-1, GROUP_FIELDS)
    return _SINGLE * table[:, 2].sum() + _DUAL * table[:, 4].sum()


@kernel
def _elementwise(step: Step, tables: Tables, low: Workspace, high: Workspace, boxes: int) -> None:
    """Operators that do not decrease: one end, then the other. The rest has rules of its own."""
    if step.opcode == PAIR:
        pair_interval(step, tables, low, high, boxes)
        return
    if step.opcode == LOOKUP and step.monotone == 0:
        lookup_interval(step, tables, low, high, boxes)
        return
    for work in (low, high):
        if step.opcode == LOOKUP:
            lookup(step, tables, work, boxes)
        elif step.opcode == ADD:
            add(step, tables, work, boxes)
        elif step.opcode == COPY:
            for i in range(boxes):
                copy_runs(step, tables.integers, work.activations, work.activations, i)
        else:
            pool(step, tables, work, boxes)


def _walker(digest: int) -> Walk:
    @entry
    def run(
        tag: Tag,
        frame_: int,
        lower: int,
        upper: int,
        lower_results: int,
        upper_results: int,
        boxes: int,
    ) -> int:
        """Run a program on boxes.

        Args:
            tag: of the tier whose instructions are used.
            frame_: address of int64 [39]: address and length of each array, see ``IntervalWorker``;
                then the bytes of an image, the bytes of its results, and how many boxes are
                computed together.
            lower: address of uint8 [boxes, bytes of an image], int8 as it is stored.
            upper: likewise.
            lower_results: address of uint8 [boxes, bytes of results], written.
            upper_results: likewise.
            boxes: how many there are.

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
        low = Workspace(
            carray(pointer(frame[8]), (frame[9],), np.uint8),
            carray(pointer(frame[10]), (frame[11],), np.int16),
            carray(pointer(frame[12]), (frame[13],), np.int32),
            carray(pointer(frame[14]), (frame[15],), np.int8),
            carray(pointer(frame[16]), (frame[17],), np.int32),
            carray(pointer(frame[18]), (frame[19],), np.int64),
            carray(pointer(frame[20]), (frame[21],), np.int64),
        )
        high = Workspace(
            carray(pointer(frame[22]), (frame[23],), np.uint8),
            carray(pointer(frame[24]), (frame[25],), np.int16),
            carray(pointer(frame[26]), (frame[27],), np.int32),
            carray(pointer(frame[28]), (frame[29],), np.int8),
            carray(pointer(frame[30]), (frame[31],), np.int32),
            carray(pointer(frame[32]), (frame[33],), np.int64),
            carray(pointer(frame[34]), (frame[35],), np.int64),
        )
        image_bytes, result_bytes, block = frame[36], frame[37], frame[38]
        for first in range(0, boxes, block):
            count = min(block, boxes - first)
            ends = (count, image_bytes)
            lows = carray(pointer(lower + first * image_bytes), ends, np.uint8)
            highs = carray(pointer(upper + first * image_bytes), ends, np.uint8)
            bounds = (count, result_bytes)
            least = carray(pointer(lower_results + first * result_bytes), bounds, np.uint8)
            most = carray(pointer(upper_results + first * result_bytes), bounds, np.uint8)
            for i in range(len(steps)):
                step = steps[i]
                code = step.opcode
                if code <= DEPTHWISE or code >= TILED:
                    linear_interval(tag, step, tables, low, high, count)
                elif code == LOAD:
                    for j in range(count):
                        copy_runs(step, tables.integers, lows[j], low.activations, j)
                        copy_runs(step, tables.integers, highs[j], high.activations, j)
                elif code == STORE:
                    for j in range(count):
                        copy_runs(step, tables.integers, low.activations, least[j], j)
                        copy_runs(step, tables.integers, high.activations, most[j], j)
                else:
                    _elementwise(step, tables, low, high, count)
        return digest

    return run


_walk = _walker(DIGEST)


@cache
def interval_walker(tier: Tier) -> Walk:
    """The function for a tier, compiled or read from Numba's cache.

    Raises:
        AssertionError: the cache holds code of other sources.
    """
    frame = np.zeros(_FRAME, np.int64)
    frame[-1] = 1
    dispatcher: Any = _walk
    digest = dispatcher(Tag(tier), frame.ctypes.data, 0, 0, 0, 0, 0)
    assert digest == DIGEST, "kernels in the cache are not those of this package; delete the cache"
    return dispatcher


class IntervalWorker:
    """A program with the memory of one thread, twice: for lower and for upper ends."""

    def __init__(self, program: Program) -> None:
        """Allocate, and collect the addresses."""
        assert set(program.steps["opcode"].tolist()) <= _OPCODES, (
            "a kernel without an interval form"
        )
        self.program = program
        self._walk = interval_walker(program.tier)
        self._tag = Tag(program.tier)
        self._arrays = (
            program.steps,
            *program.tables,
            *program.workspace(),
            *program.workspace(),
        )
        pairs = [(array.ctypes.data, array.size) for array in self._arrays]
        sizes = (program.image_bytes, program.result_bytes, program.block)
        self._frame = np.array([*np.ravel(pairs), *sizes], np.int64)
        assert self._frame.size == _FRAME

    def run(self, lower: ByteArray, upper: ByteArray, least: ByteArray, most: ByteArray) -> None:
        """Bounds of any number of boxes; all four arrays are contiguous.

        Args:
            lower: uint8 [boxes, bytes of an image], the lower ends; int8 as it is stored.
            upper: likewise.
            least: uint8 [boxes, bytes of results], the lower bounds, written.
            most: likewise.
        """
        for array, size in (
            (lower, self.program.image_bytes),
            (upper, self.program.image_bytes),
            (least, self.program.result_bytes),
            (most, self.program.result_bytes),
        ):
            assert array.flags.c_contiguous and array.shape == (len(lower), size)
        ends = lower.ctypes.data, upper.ctypes.data
        bounds = least.ctypes.data, most.ctypes.data
        self._walk(self._tag, self._frame.ctypes.data, *ends, *bounds, len(lower))
