"""What packing a graph collects: tables, and the scratch memory that steps demand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_edge.graph import Int8Array, Int64Array
from cactus_edge.kernels.rows import Tables

_ALIGNMENT = 64
_SLACK = 256
"""Tiles load whole registers, behind the last weight too."""


class Layout(StrEnum):
    """How the weights of linear layers are stored; ``AUTO`` chooses for each layer."""

    AUTO = "auto"
    DENSE = "dense"
    SPARSE = "sparse"
    BLOCKS = "blocks"
    BITMASK = "bitmask"
    SKIPPING = "skipping"


@dataclass(frozen=True)
class Demand:
    """Scratch elements that a step needs, see ``rows.Workspace``."""

    patches: int = 0
    accumulators: int = 0
    values: int = 0
    rows: int = 0

    def union(self, other: Demand) -> Demand:
        """What serves both."""
        return Demand(
            max(self.patches, other.patches),
            max(self.accumulators, other.accumulators),
            max(self.values, other.values),
            max(self.rows, other.rows),
        )


@dataclass
class TableBuilder:
    """Collects the arrays of ``Tables``; each method returns the offset of what it appended."""

    _weights: list[Int8Array] = field(default_factory=list)
    _indices: list[npt.NDArray[np.uint16]] = field(default_factory=list)
    _integers: list[Int64Array] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=lambda: [0, 0, 0])

    def weights(self, values: Int8Array) -> int:
        """Append int8 values at a cache line of their own."""
        flat = values.reshape(-1)
        padded = np.zeros(-(-flat.size // _ALIGNMENT) * _ALIGNMENT, np.int8)
        padded[: flat.size] = flat
        self._weights.append(padded)
        return self._advance(0, padded.size)

    def bytes(self, values: npt.NDArray[Any]) -> int:
        """Append any values at a cache line of their own, as the bytes that they are."""
        return self.weights(np.ascontiguousarray(values).reshape(-1).view(np.int8))

    def indices(self, values: npt.NDArray[np.uint16]) -> int:
        """Append positions of inputs."""
        self._indices.append(values)
        return self._advance(1, values.size)

    def integers(self, *parts: npt.ArrayLike | Iterable[int]) -> int:
        """Append small tables, one behind the other."""
        flat = np.concatenate([np.asarray(part, np.int64).reshape(-1) for part in parts])
        self._integers.append(flat)
        return self._advance(2, flat.size)

    def copy_runs(self, source: Int64Array, target: Int64Array) -> dict[str, int]:
        """A step's fields for copying elements at one set of offsets to another."""
        broken = (np.diff(source) != 1) | (np.diff(target) != 1)
        starts = np.flatnonzero(np.concatenate([[True], broken]))
        lengths = np.diff(np.concatenate([starts, [source.size]]))
        runs = np.stack([source[starts], target[starts], lengths], axis=1)
        return {"taps": self.integers(runs), "tap_count": len(runs)}

    def _advance(self, which: int, size: int) -> int:
        begin = self._sizes[which]
        self._sizes[which] += size
        return begin

    @property
    def size(self) -> int:
        """Bytes of all that was appended."""
        weights, indices, integers = self._sizes
        return weights + 2 * indices + 8 * integers

    def build(self) -> Tables:
        """The arrays."""
        return Tables(
            _aligned([*self._weights, np.zeros(_SLACK, np.int8)]),
            np.concatenate([np.zeros(0, np.uint16), *self._indices]),
            np.concatenate([np.zeros(0, np.int64), *self._integers]),
        )


def _aligned(parts: list[Int8Array]) -> Int8Array:
    """One array behind the other, the first at the start of a cache line."""
    size = sum(part.size for part in parts)
    memory = np.empty(size + _ALIGNMENT, np.int8)
    begin = -memory.ctypes.data % _ALIGNMENT
    aligned = memory[begin : begin + size]
    np.concatenate(parts, out=aligned)
    return aligned
