"""Dense linear layers: patches of four rows times two output channels at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cactus_edge.kernels.jit import inlined, kernel
from cactus_edge.kernels.rows import (
    Tables,
    Workspace,
    fill_bias,
    gather_row,
    source_of,
    unpack_nibbles,
)
from cactus_edge.kernels.steps import Step

TILE = 4
CHANNELS = 2
"""Packed channels come in multiples of this."""

Int8Array = npt.NDArray[np.int8]
Int16Array = npt.NDArray[np.int16]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@kernel
def dense(step: Step, tables: Tables, work: Workspace, first: int, count: int) -> None:
    """Accumulators of up to ``TILE`` rows, int32 [rows, channels]."""
    pitch, depth = step.channels, step.depth
    live = tables.integers[step.live : step.live + step.live_count]
    for row in range(count):
        start = source_of(step, first + row)
        patch = work.patches[row * depth : (row + 1) * depth]
        gather_row(step, tables.integers, work.activations, start, patch)
        fill_bias(step, tables.integers, work.accumulators[row * pitch : (row + 1) * pitch])
    for pair in range(0, step.live_count, CHANNELS):
        begin = step.weights + pair * depth
        if step.nibbles:
            _unpack_pair(step, tables, work, pair)
            weights = work.values[: 2 * depth]
        else:
            weights = tables.weights[begin : begin + 2 * depth]
        if count == TILE:
            _tile(work.patches, weights, depth, live[pair : pair + 2], work.accumulators, pitch)
        else:
            for row in range(count):
                patch = work.patches[row * depth : (row + 1) * depth]
                a, b = _dot_two(patch, weights, depth)
                work.accumulators[row * pitch + live[pair]] += a
                work.accumulators[row * pitch + live[pair + 1]] += b


@inlined
def _unpack_pair(step: Step, tables: Tables, work: Workspace, pair: int) -> None:
    """Int4 weights of two packed channels into scratch memory [2, depth]."""
    half = step.depth // 2
    for row in range(2):
        begin = step.weights + (pair + row) * half
        values = work.values[row * step.depth : (row + 1) * step.depth]
        unpack_nibbles(tables.weights[begin : begin + half], values)


@inlined
def _tile(
    patches: Int16Array,
    weights: Int8Array,
    depth: int,
    live: Int64Array,
    sums: Int32Array,
    pitch: int,
) -> None:
    """Add the products of four patches with two channels to their accumulators."""
    a, b = patches[:depth], patches[depth : 2 * depth]
    c, d = patches[2 * depth : 3 * depth], patches[3 * depth : 4 * depth]
    u, v = weights[:depth], weights[depth : 2 * depth]
    au = bu = cu = du = av = bv = cv = dv = np.int32(0)
    for i in range(depth):
        # int32 throughout: Numba widens to int64, and LLVM narrows again where it is cast back.
        x, y = np.int32(u[i]), np.int32(v[i])
        au = np.int32(au + np.int32(np.int32(a[i]) * x))
        bu = np.int32(bu + np.int32(np.int32(b[i]) * x))
        cu = np.int32(cu + np.int32(np.int32(c[i]) * x))
        du = np.int32(du + np.int32(np.int32(d[i]) * x))
        av = np.int32(av + np.int32(np.int32(a[i]) * y))
        bv = np.int32(bv + np.int32(np.int32(b[i]) * y))
        cv = np.int32(cv + np.int32(np.int32(c[i]) * y))
        dv = np.int32(dv + np.int32(np.int32(d[i]) * y))
    first, second = live[0], live[1]
    sums[first] += au
    sums[pitch + first] += bu
    sums[2 * pitch + first] += cu
    sums[3 * pitch + first] += du
    sums[second] += av
    sums[pitch + second] += bv
    sums[2 * pitch + second] += cv
    sums[3 * pitch + second] += dv


@inlined
def _dot_two(patch: Int16Array, weights: Int8Array, depth: int) -> tuple[np.int32, np.int32]:
    """The products of one patch with two channels."""
    a, u, v = patch[:depth], weights[:depth], weights[depth : 2 * depth]
    au = av = np.int32(0)
    for i in range(depth):
        au = np.int32(au + np.int32(np.int32(a[i]) * np.int32(u[i])))
        av = np.int32(av + np.int32(np.int32(a[i]) * np.int32(v[i])))
    return au, av
