"""Copies (input, results, PAD, RESHAPE, moves), ADD, tables and the pools."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cactus_edge import semantics
from cactus_edge.kernels.arithmetic import add_bytes
from cactus_edge.kernels.jit import kernel
from cactus_edge.kernels.rows import Tables, Workspace
from cactus_edge.kernels.steps import AVERAGE, Step

ByteArray = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]

_average, _clamp = semantics.average, semantics.clamp


@kernel
def copy_runs(
    step: Step, integers: Int64Array, source: ByteArray, target: ByteArray, image: int
) -> None:
    """Copy the runs of one image; ``flip`` turns int8 into bytes and back."""
    source_base = step.source + image * step.source_image
    target_base = step.target + image * step.target_image
    flip = np.uint8(step.flip)
    for tap in range(step.tap_count):
        entry = step.taps + 3 * tap
        length = integers[entry + 2]
        read = source_base + integers[entry]
        write = target_base + integers[entry + 1]
        a, b = source[read : read + length], target[write : write + length]
        for i in range(length):
            b[i] = a[i] ^ flip


@kernel
def add(
    step: Step, tables: Tables, work: Workspace, images: int, part: int = 0, parts: int = 1
) -> None:
    """A part of an ADD; each image has ``height`` rows of ``channels`` bytes."""
    six = tables.integers[step.rounding : step.rounding + 6]
    size = step.channels
    rows = images * step.height
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        image, y = divmod(row, step.height)
        a = step.source + image * step.source_image + y * step.source_row
        b = step.other + image * step.other_image + y * step.other_row
        c = step.target + image * step.target_image + y * step.target_row
        add_bytes(
            step,
            work.activations[a : a + size],
            work.activations[b : b + size],
            six,
            work.activations[c : c + size],
        )


@kernel
def lookup(step: Step, tables: Tables, work: Workspace, images: int) -> None:
    """A table of one input; each image has ``height`` rows of ``channels`` bytes."""
    for row in range(images * step.height):
        image, y = divmod(row, step.height)
        source = step.source + image * step.source_image + y * step.source_row
        target = step.target + image * step.target_image + y * step.target_row
        kind = (y * step.channels) % step.kinds
        for i in range(step.channels):
            place = step.weights + 256 * kind + np.int64(work.activations[source + i])
            work.activations[target + i] = np.uint8(tables.weights[place])
            kind += 1
            if kind == step.kinds:
                kind = 0


@kernel
def lookup_interval(
    step: Step, tables: Tables, low: Workspace, high: Workspace, images: int
) -> None:
    """The least and the greatest entry between both ends, for tables that rise and fall."""
    for row in range(images * step.height):
        image, y = divmod(row, step.height)
        source = step.source + image * step.source_image + y * step.source_row
        target = step.target + image * step.target_image + y * step.target_row
        kind = (y * step.channels) % step.kinds
        for i in range(step.channels):
            begin = step.weights + 256 * kind
            least, most = np.uint8(255), np.uint8(0)
            first, last = low.activations[source + i], high.activations[source + i]
            for byte in range(np.int64(first), np.int64(last) + 1):
                entry = np.uint8(tables.weights[begin + byte])
                least, most = min(least, entry), max(most, entry)
            low.activations[target + i], high.activations[target + i] = least, most
            kind += 1
            if kind == step.kinds:
                kind = 0


@kernel
def pair(step: Step, tables: Tables, work: Workspace, images: int) -> None:
    """A table of two inputs, of which the second may repeat along a row."""
    for row in range(images * step.height):
        image, y = divmod(row, step.height)
        a = step.source + image * step.source_image + y * step.source_row
        b = step.other + image * step.other_image + y * step.other_row
        target = step.target + image * step.target_image + y * step.target_row
        for i in range(step.channels):
            x = np.int64(work.activations[a + i])
            z = np.int64(work.activations[b + i % step.other_width])
            place = step.weights + 256 * x + z
            work.activations[target + i] = np.uint8(tables.weights[place])


@kernel
def pair_interval(step: Step, tables: Tables, low: Workspace, high: Workspace, images: int) -> None:
    """The least and the greatest of a box's corners: the table is monotone in each input."""
    for row in range(images * step.height):
        image, y = divmod(row, step.height)
        a = step.source + image * step.source_image + y * step.source_row
        b = step.other + image * step.other_image + y * step.other_row
        target = step.target + image * step.target_image + y * step.target_row
        for i in range(step.channels):
            j = b + i % step.other_width
            first = step.weights + 256 * np.int64(low.activations[a + i])
            last = step.weights + 256 * np.int64(high.activations[a + i])
            left, right = np.int64(low.activations[j]), np.int64(high.activations[j])
            p, q = np.uint8(tables.weights[first + left]), np.uint8(tables.weights[first + right])
            r, s = np.uint8(tables.weights[last + left]), np.uint8(tables.weights[last + right])
            low.activations[target + i] = min(min(p, q), min(r, s))
            high.activations[target + i] = max(max(p, q), max(r, s))


@kernel
def pool(
    step: Step, tables: Tables, work: Workspace, images: int, part: int = 0, parts: int = 1
) -> None:
    """A part of an AVERAGE_POOL_2D or MAX_POOL_2D, over the pixels that lie inside the input."""
    geometry = tables.integers[step.pool : step.pool + 8]
    channels = step.channels
    rows = images * step.height
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        image, y = divmod(row, step.height)
        source = step.source + image * step.source_image
        begin = step.target + image * step.target_image + y * step.target_row
        top = y * geometry[2] - geometry[4]
        first_row, last_row = max(top, 0), min(top + geometry[0], geometry[6])
        for x in range(step.width):
            left = x * geometry[3] - geometry[5]
            first, last = max(left, 0), min(left + geometry[1], geometry[7])
            target = begin + x * channels
            stored = work.activations[target : target + channels]
            window = (first_row, last_row, first, last)
            if step.opcode == AVERAGE:
                _average_window(step, work, source, window, stored)
            else:
                _maximum_window(step, work, source, window, stored)


@kernel
def _average_window(
    step: Step,
    work: Workspace,
    source: int,
    window: tuple[int, int, int, int],
    stored: ByteArray,
) -> None:
    channels = step.channels
    sums = work.accumulators[:channels]
    sums[:] = 0
    for y in range(window[0], window[1]):
        for x in range(window[2], window[3]):
            begin = source + y * step.source_row + x * channels
            values = work.activations[begin : begin + channels]
            for i in range(channels):
                sums[i] += np.int32(values[i])
    count = (window[1] - window[0]) * (window[3] - window[2])
    # The mean is rounded as the mean of the stored integers, which for int8 are byte - 128.
    offset = step.source_zero
    for i in range(channels):
        mean = _average(np.int64(sums[i]) - offset * count, count) + offset  # pyright: ignore
        stored[i] = np.uint8(_clamp(mean, step.lower, step.upper))


@kernel
def _maximum_window(
    step: Step,
    work: Workspace,
    source: int,
    window: tuple[int, int, int, int],
    stored: ByteArray,
) -> None:
    channels = step.channels
    stored[:] = 0
    for y in range(window[0], window[1]):
        for x in range(window[2], window[3]):
            begin = source + y * step.source_row + x * channels
            values = work.activations[begin : begin + channels]
            for i in range(channels):
                stored[i] = max(stored[i], values[i])
    for i in range(channels):
        stored[i] = np.uint8(_clamp(np.int64(stored[i]), step.lower, step.upper))  # pyright: ignore
