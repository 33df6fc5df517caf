"""What a model holds, layer by layer: shapes, widths, zeros, headroom, agreement of runtimes."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from cactus_edge import universal
from cactus_edge.constraints import ACCUMULATOR_LIMIT, accumulator_bounds
from cactus_edge.graph import Conv2D, Graph, Linear, Operator

__all__ = ["Analysis", "LayerAnalysis", "analyze"]


class LayerAnalysis(msgspec.Struct, frozen=True):
    """One operator. Fields that only weighted layers have are 0 elsewhere.

    ``macs`` counts multiply-accumulates of a dense execution; ``accumulator`` is the proved largest
    magnitude; ``disagreeing`` are channels on which rounding profiles differ.
    """

    index: int
    kind: str
    name: str
    output_shape: tuple[int, ...]
    bits: int = 0
    weights: int = 0
    sparsity: float = 0.0
    macs: int = 0
    accumulator: int = 0
    disagreeing: int = 0


class Analysis(msgspec.Struct, frozen=True):
    """A whole model; ``accumulator_limit`` is what every accumulator is proved to stay below."""

    sha256: str
    fingerprint: str
    bytes: int
    universal: bool
    weights: int
    sparsity: float
    macs: int
    accumulator_limit: int
    metadata: dict[str, str]
    layers: tuple[LayerAnalysis, ...]


def analyze(graph: Graph, data: bytes) -> Analysis:
    """Describe a model that was read from ``data``."""
    disagreeing = {entry.name: len(entry.disagreeing) for entry in universal.agreement(graph)}
    layers = tuple(
        _layer(graph, index, op, disagreeing.get(op.name, 0))
        for index, op in enumerate(graph.operators)
    )
    weights = sum(layer.weights for layer in layers)
    zeros = sum(layer.weights * layer.sparsity for layer in layers)
    return Analysis(
        sha256=hashlib.sha256(data).hexdigest(),
        fingerprint=graph.fingerprint(),
        bytes=len(data),
        universal=not any(disagreeing.values()),
        weights=weights,
        sparsity=zeros / max(weights, 1),
        macs=sum(layer.macs for layer in layers),
        accumulator_limit=ACCUMULATOR_LIMIT,
        metadata={name: value.decode("utf-8", "replace") for name, value in graph.metadata},
        layers=layers,
    )


def _layer(graph: Graph, index: int, op: Operator, disagreeing: int) -> LayerAnalysis:
    shape = graph.tensors[op.output].shape
    if not isinstance(op, Linear):
        return LayerAnalysis(index, op.kind, op.name, shape, disagreeing=disagreeing)
    values = op.weights.values
    lower, upper = accumulator_bounds(graph, op)
    positions = int(np.prod(shape[1:-1])) if isinstance(op, Conv2D) else 1
    return LayerAnalysis(
        index,
        op.kind,
        op.name,
        shape,
        bits=op.weights.bits,
        weights=values.size,
        sparsity=1 - np.count_nonzero(values) / values.size,
        macs=positions * values.size,
        accumulator=int(max(-lower.min(), upper.max())),
        disagreeing=disagreeing,
    )
