"""Where each buffer lies in the one static arena.

Greedy by size, as TFLite Micro plans: buffers in order of decreasing size, each at the lowest
offset at which it overlaps no placed buffer that is alive at the same time. Ties go to the buffer
that comes first, so the plan is a function of the graph alone.

Source: TFLite Micro ``greedy_memory_planner.cc``; Pisarchyk and Lee, arXiv:2001.03288.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 4


@dataclass(frozen=True)
class Buffer:
    """``size`` bytes that are needed from operator ``first`` to operator ``last``, inclusive."""

    size: int
    first: int
    last: int


def plan(buffers: Sequence[Buffer]) -> tuple[list[int], int]:
    """Offsets, one for each buffer and multiples of 4, and the size of the arena in bytes."""
    order = sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, i))
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for index in order:
        buffer = buffers[index]
        offset = 0
        for other in sorted(placed, key=lambda i: offsets[i]):
            neighbour = buffers[other]
            if neighbour.last < buffer.first or buffer.last < neighbour.first:
                continue
            if offset + buffer.size <= offsets[other]:
                break
            offset = max(offset, aligned(offsets[other] + neighbour.size))
        offsets[index] = offset
        placed.append(index)
    ends = [offset + buffer.size for offset, buffer in zip(offsets, buffers, strict=True)]
    return offsets, aligned(max(ends, default=0))


def aligned(size: int) -> int:
    """``size`` rounded up to the alignment of buffers."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
