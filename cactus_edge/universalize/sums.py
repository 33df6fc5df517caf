"""The scales at which every profile adds alike, and which tensors have to take them.

Two operands of one scale add their integers; with an output scale of ``p / q`` times theirs, ``p``
odd, no sum is a half, so that every arithmetic rounds it to the same integer. Operands take the
coarser of their scales, and the sum the next larger of these ratios. Where a scale has been settled
(by another sum, a table, the model's input) it stays, and a layer rescales the operand. A sum whose
coarser scale would raise the factor of a layer that reads it to 1 is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import gcd

import numpy as np

from cactus_edge import universal
from cactus_edge.graph import (
    Activation,
    Add,
    DType,
    Graph,
    Linear,
    Operator,
    Pad,
    Pool2D,
    Quantization,
    Reshape,
    Tensor,
)
from cactus_edge.operators import Concatenation, Function, Lookup, Mean, Move, Pair, Unary

_RATIOS = sorted(
    p / q for q in range(1, 13) for p in range(1, 4 * q, 2) if gcd(p, q) == 1 and 2 * p >= q
)
_TRIALS = 16
_ROOM = 1 - 1e-3
"""An operand may lose so much of its range: less than a level."""
_LARGEST_FACTOR = 1 - 2**-20
"""Of a layer, which has to stay below 1 in whatever precision a runtime forms it."""
_AS_LAYERS = (Function.QUANTIZE, Function.RELU, Function.RELU6)


@dataclass
class Plan:
    """Scales as float32 patterns: ``scales`` by tensor, ``operands`` by the name of a sum."""

    scales: dict[int, int] = field(default_factory=dict)
    operands: dict[str, int] = field(default_factory=dict)


def is_layer(graph: Graph, op: Operator) -> bool:
    """Whether ``op`` is computed as a layer whose weights can be moved.

    Besides layers and MEAN: QUANTIZE, RELU and RELU6 from int8 to int8 of [1, h, w, channels].
    """
    ends = [graph.tensors[index] for index in (op.inputs[0], op.output)]
    if any(end.dtype is not DType.INT8 or end.quantization is None for end in ends):
        return False
    if isinstance(op, Linear):
        return op.requantization is None
    if not isinstance(op, Unary) or op.function not in _AS_LAYERS:
        return False
    return op.table is None and len(ends[0].shape) == 4


def lowered(tensor: Tensor, scale_bits: int) -> Quantization:
    """Another scale, and the zero point that leaves room for what lies below it."""
    assert tensor.quantization is not None
    least = tensor.dtype.range[0]
    quantization = Quantization(scale_bits, least)
    below = (tensor.zero_point - least) * float(tensor.quantization.scale)
    return replace(quantization, zero_point=least + round(below / float(quantization.scale)))


def plan(graph: Graph, selected: Callable[[str], bool]) -> Plan:
    """Scales for the sums on which profiles disagree."""
    return _Planner(graph).planned(selected)


def _largest_scale(op: Linear) -> float:
    """Of the weights; those of a MEAN are divided by their number."""
    count = op.weights.values[0, :, :, 0].size if isinstance(op, Mean) else 1
    return float(op.weights.scale.max()) / count


class _Planner:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._group = list(range(len(graph.tensors)))
        self._producers = {op.output: op for op in graph.core}
        self._readers = [index for op in graph.operators for index in op.inputs]
        settled: set[int] = {graph.core_input}
        for op in graph.core:
            ends = (*op.inputs, op.output)
            if isinstance(op, (Pool2D, Pad, Reshape, Move)):
                for index in op.inputs:
                    self._join(index, op.output)
            tabled = isinstance(op, (Lookup, Pair)) and not is_layer(graph, op)
            if tabled or isinstance(op, Concatenation):
                settled |= {*ends}
            clamped = getattr(op, "clamp", None) is not None
            limited = getattr(op, "activation", None) is Activation.RELU6
            # What stores a 6 may be another integer in each runtime at another scale.
            if clamped or limited or isinstance(op, Unary) and op.function is Function.RELU6:
                settled |= {*ends} if isinstance(op, Pool2D) else {op.output}
            if isinstance(op, Linear) and not is_layer(graph, op):
                settled.add(op.output)
        self._settled = {self._of(index) for index in settled}
        self._plan = Plan()

    def _of(self, tensor: int) -> int:
        while self._group[tensor] != tensor:
            tensor = self._group[tensor]
        return tensor

    def _join(self, a: int, b: int) -> None:
        self._group[self._of(b)] = self._of(a)

    def _scale(self, tensor: int) -> int:
        given = self._graph.tensors[tensor].quantization
        assert given is not None
        return self._plan.scales.get(tensor, given.scale_bits)

    def _settle(self, tensor: int, scale_bits: int) -> None:
        root = self._of(tensor)
        self._settled.add(root)
        for index in range(len(self._group)):
            if self._of(index) == root:
                self._plan.scales[index] = scale_bits

    def planned(self, selected: Callable[[str], bool]) -> Plan:
        """See ``plan``."""
        sums = [op for op in self._graph.core if isinstance(op, Add) and not op.requantization]
        sums = [op for op in sums if self._graph.tensors[op.output].dtype is DType.INT8]
        chosen = [op for op in sums if selected(op.name)]
        bad = [op for op in chosen if not universal.sum_agrees(self._graph, op)]
        for op in sums:
            if op not in bad:
                self._settled |= {self._of(index) for index in (*op.inputs, op.output)}
        for op in bad:
            self._sum(op)
        return self._plan

    def _sum(self, op: Add) -> None:
        free = [index for index in op.inputs if self._of(index) not in self._settled]
        fixed = [index for index in op.inputs if self._of(index) in self._settled]
        free = [index for index in free if is_layer(self._graph, self._maker(index))]
        fixed += [index for index in op.inputs if index not in free and index not in fixed]
        wanted = max(_real(self._scale(index)) for index in op.inputs)
        out, out_settled = _real(self._scale(op.output)), self._of(op.output) in self._settled
        for summand, total in _pairs(wanted, out, out_settled):
            kept = [i for i in fixed if _real(self._scale(i)) == summand]
            if not all(i in kept or self._rescalable(i) for i in fixed):
                continue
            moved = {self._of(index): summand for index in free}
            moved |= {} if out_settled else {self._of(op.output): total}
            if not self._readable(moved) or not self._agree(op, _bits(summand), _bits(total)):
                continue
            for index in free:
                self._settle(index, _bits(summand))
            self._plan.operands[op.name] = _bits(summand)
            self._settle(op.output, self._scale(op.output) if out_settled else _bits(total))
            return

    def _readable(self, moved: dict[int, float]) -> bool:
        """Whether layers can read these groups of tensors at these scales."""

        def real(tensor: int) -> float:
            return moved.get(self._of(tensor)) or _real(self._scale(tensor))

        readers = (op for op in self._graph.core if isinstance(op, Linear))
        return all(
            real(op.inputs[0]) * _largest_scale(op) < _LARGEST_FACTOR * real(op.output)
            for op in readers
            if self._of(op.inputs[0]) in moved and op.requantization is None
        )

    def _maker(self, tensor: int) -> Operator:
        """What computes the first tensor of a tensor's group."""
        op = self._producers[tensor]
        while isinstance(op, (Pool2D, Pad, Reshape, Move)):
            op = self._producers[op.inputs[0]]
        return op

    def _rescalable(self, tensor: int) -> bool:
        """A RESHAPE around a layer must be the only reader, see ``flatbuffer.storable``."""
        vector = len(self._graph.tensors[tensor].shape) != 4
        return not vector or self._readers.count(tensor) == 1

    def _agree(self, op: Add, summand: int, total: int) -> bool:
        ends = (*op.inputs, op.output)
        tensors = list(self._graph.tensors)
        for index, bits in zip(ends, (summand, summand, total), strict=True):
            tensors[index] = replace(tensors[index], quantization=lowered(tensors[index], bits))
        return universal.sum_agrees(Graph(tuple(tensors), (op,), op.inputs[0], op.output), op)


def _pairs(wanted: float, out: float, settled: bool) -> list[tuple[float, float]]:
    """(scale of both operands, of the sum) to be tried, the finest first."""
    if settled:
        ratios = [r for r in reversed(_RATIOS) if out / r >= wanted * _ROOM]
        return [(float(np.float32(out / r)), out) for r in ratios[:_TRIALS]]
    ratios = [r for r in _RATIOS if r * wanted >= out * _ROOM]
    return [(wanted, float(np.float32(wanted * r))) for r in ratios[:_TRIALS]]


def _real(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))
