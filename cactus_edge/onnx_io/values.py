"""What a tensor of the ONNX graph holds, in terms of the stages that are made.

Reshape, Flatten and Transpose compute nothing: they say where an element is found. So a value is
an array of positions in the output of a stage, and these operators are NumPy's own on that array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.graph import Int64Array
from cactus_edge.lowering.stages import NO_PADS, Pads

LARGEST = 1 << 24


@dataclass(frozen=True, eq=False)
class Value:
    """Elements of one stage's output, for one sample.

    ``source`` names the stage's output, ``index`` int64 [1, ...] are positions in it, channels
    first. ``alone``: one node reads it, and nothing else reads the same stage. ``pads`` are zeros
    around an image that the next window sees.
    """

    source: str
    index: Int64Array
    alone: bool
    pads: Pads = NO_PADS

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, with batch 1."""
        return self.index.shape

    def moved(self, index: Int64Array, alone: bool) -> Value:
        """The same elements elsewhere."""
        return replace(self, index=index, alone=self.alone and alone)

    @property
    def is_plain(self) -> bool:
        """Whether the elements are in the stage's own order."""
        return bool((self.index.ravel() == np.arange(self.index.size)).all())


def plain(source: str, shape: tuple[int, ...], alone: bool) -> Value:
    """All of a stage's output, of ``shape`` without batch."""
    size = math.prod(shape)
    if size > LARGEST:
        raise UnsupportedModelError(
            f"'{source or 'the input'}' has {size} elements for one sample; {LARGEST} is the limit"
        )
    return Value(source, np.arange(size).reshape(1, *shape), alone)
