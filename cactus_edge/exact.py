"""Sums of int64 arrays that never wrap around."""

from __future__ import annotations

import numpy as np

from cactus_edge.graph import Int64Array

_LOW = (1 << 32) - 1
_PRODUCT = 1 << 62


def total(values: Int64Array) -> int:
    """The exact sum of any int64 array of less than 2**31 elements."""
    return (int((values >> 32).sum()) << 32) + int((values & _LOW).sum())


def dot(a: Int64Array, b: Int64Array) -> int:
    """The exact sum of the products of two int64 arrays of one shape.

    Fast where every product fits int64, and still right where one does not.
    """
    a, b = a.reshape(-1), b.reshape(-1)
    if largest(a) * largest(b) < _PRODUCT:
        return total(a * b)
    used = np.flatnonzero(a)
    return sum(x * y for x, y in zip(a[used].tolist(), b[used].tolist(), strict=True))


def largest(values: Int64Array) -> int:
    """The greatest magnitude, also where it is that of -2**63."""
    return max(-int(values.min(initial=0)), int(values.max(initial=0)))
