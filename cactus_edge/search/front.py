"""Pareto fronts: the points that no other beats."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, ...]
"""Objectives, each of them the better the smaller."""


def dominates(one: Point, other: Point) -> bool:
    """Whether ``one`` is nowhere larger than ``other`` and somewhere smaller."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def front(points: Sequence[Point]) -> list[int]:
    """Indices, ascending, of the points that no other dominates; of equal points all."""
    return [
        index
        for index, point in enumerate(points)
        if not any(dominates(other, point) for other in points)
    ]
