"""How much a model asks for: multiplications and bytes of weights, dense and without the zeros."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge.graph import Graph, Linear


@dataclass(frozen=True)
class Work:
    """Of one image.

    Attributes:
        multiplications: of all weights, zeros included.
        useful_multiplications: of the weights that are not zero.
        weights: in all linear layers.
        nonzero_weights: of these.
        weight_bytes: as dense bytes or, at up to 4 bits, nibbles.
        bits: the narrowest weights.
        sparsity: the fraction of weights that are zero.
    """

    multiplications: int
    useful_multiplications: int
    weights: int
    nonzero_weights: int
    weight_bytes: int
    bits: int
    sparsity: float


def work(graph: Graph) -> Work:
    """Count over all linear layers."""
    layers = [op for op in graph.core if isinstance(op, Linear)]
    total = useful = weights = nonzero = size = 0
    for op in layers:
        values = op.weights.values
        pixels = graph.tensors[op.output].size // op.channels
        kept = int(np.count_nonzero(values))
        # A depthwise weight, like any other, is used once for each output pixel.
        total += values.size * pixels
        useful += kept * pixels
        weights += values.size
        nonzero += kept
        size += (values.size + 1) // 2 if op.weights.bits <= 4 else values.size
    bits = min((op.weights.bits for op in layers), default=8)
    sparsity = 1 - nonzero / weights if weights else 0.0
    return Work(total, useful, weights, nonzero, size, bits, sparsity)
