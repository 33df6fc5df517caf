"""How a batch is divided into blocks and among threads."""

from __future__ import annotations

import os

_BLOCK_BYTES = 1 << 20
"""A block is made as large as this many bytes of activations allow."""
_SMALLEST_BLOCK = 8
_LARGEST_BLOCK = 64
_PIECE_BLOCKS = 4
"""A thread takes at most this many blocks at a time, so that all of them end together."""
_GRAIN = 16
"""Rows of a batch below which it is not divided among threads: fewer make slower tiles."""


def block_of(row_bytes: int) -> int:
    """Images or boxes of so many bytes of activations that are computed together."""
    return max(_SMALLEST_BLOCK, min(_LARGEST_BLOCK, _BLOCK_BYTES // row_bytes))


def available_threads() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pieces(count: int, block: int, threads: int) -> list[slice]:
    """Consecutive slices that cover a batch, at least one for each thread if possible."""
    grain = min(_GRAIN, block)
    size = -(-count // (threads * grain)) * grain
    size = max(grain, min(size, block * _PIECE_BLOCKS))
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
