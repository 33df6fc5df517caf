"""A model operator by operator, each in a form that every rounding profile computes alike.

Stored integers stay what they were, but for rounding, and where sums of a coarser scale saturate. A
layer whose outputs go below their zero point has no universal scale, because halves are rounded
differently there; so its tensor is declared to have the least zero point, and an *offset* of levels
stands for 0. What reads it takes the offset away through its bias. Where zeros are padded, added or
looked up, a depthwise 1x1 layer that copies, and therefore rounds nothing, gives 0 the zero point
again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cactus_edge import universal
from cactus_edge.errors import InvalidGraphError
from cactus_edge.graph import (
    Activation,
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    DType,
    Graph,
    Linear,
    MaxPool2D,
    Operator,
    Padding,
    Pool2D,
    Quantization,
    Reshape,
    Tensor,
    Weights,
    window_geometry,
)
from cactus_edge.operators import Function, Lookup, Mean, Move, StridedSlice, Transpose, Unary
from cactus_edge.universalize import sums
from cactus_edge.universalize.layer import Anew, FloatArray, ScaleBits, scale

_COPIED = 63
"""Weights of layers that copy and average: pairs of their products with bytes fit 16 bits, in which
ONNX Runtime adds them on x86 without VNNI."""
_ACTIVATIONS = {
    Function.QUANTIZE: Activation.NONE,
    Function.RELU: Activation.RELU,
    Function.RELU6: Activation.RELU6,
}
_LARGEST_SUM = 1 << 18
"""Of the weights of a mean, such that its accumulators stay far below their limit."""


@dataclass(frozen=True, eq=False)
class Change:
    """One operator that is computed in another way.

    ``scale_change`` float64 [channels], or [1] where they share a scale, is relative;
    ``weights_changed`` a share; ``added`` the names of operators around it; ``scale_bits`` the
    scales of its weights, None where it has none.
    """

    name: str
    kind: str
    channels: int
    scale_change: FloatArray
    weights_changed: float = 0.0
    added: tuple[str, ...] = ()
    scale_bits: ScaleBits | None = None


class Rewriter:
    """``graph`` and ``changes`` are the result of ``run``.

    ``selected`` says by name which operators may change; ``known`` are scales of weights that were
    found before. With ``even_pools``, averages over an even number of elements become layers: all
    profiles compute them alike, but ONNX Runtime rounds their ties to even.
    """

    def __init__(
        self,
        graph: Graph,
        selected: Callable[[str], bool] = lambda _: True,
        known: Mapping[str, ScaleBits] | None = None,
        *,
        even_pools: bool = False,
    ) -> None:
        """Keep the parts."""
        self._given, self._selected, self._known = graph, selected, known or {}
        self._even_pools = even_pools
        self._plan = sums.plan(graph, selected)
        self._tensors, self._operators = list(graph.tensors), list[Operator]()
        self._offsets: dict[int, int] = {}  # levels that stand for 0, by tensor
        self._copies: dict[int, int] = {}
        self._added: list[str] = []
        self._readers: dict[int, list[Operator]] = {}
        for op in graph.operators:
            for index in op.inputs:
                self._readers.setdefault(index, []).append(op)
        self.changes: list[Change] = []

    @property
    def graph(self) -> Graph:
        """What is there so far."""
        return replace(self._given, tensors=tuple(self._tensors), operators=tuple(self._operators))

    def run(self, progress: Callable[[int, int], None] | None = None) -> Graph:
        """The rewritten graph."""
        count = len(self._given.operators)
        for done, op in enumerate(self._given.operators):
            if progress:
                progress(done, count)
            self._operator(op)
        if progress:
            progress(count, count)
        return self.graph

    def _operator(self, op: Operator) -> None:
        match op:
            case Mean() | Unary() if self._moves(op):
                self._as_layer(op)
            case AveragePool2D() if self._even_pools and self._has_ties(op):
                self._as_layer(op)
            case Linear() if sums.is_layer(self._given, op) and not isinstance(op, Mean):
                self._linear(op)
            case Add():
                self._sum(op)
            case Pool2D() | Reshape() | Move():
                self._passed(op)
            case _:
                reads_zero = op in self._given.core
                inputs = tuple(self._plain(i) if reads_zero else i for i in op.inputs)
                self._operators.append(replace(op, inputs=inputs))
                if len(op.inputs) == 1 and not isinstance(op, (Linear, Lookup)) and reads_zero:
                    self._like(op.output, inputs[0])  # PAD

    def _moves(self, op: Mean | Unary) -> bool:
        alone = replace(self._given, operators=(op,), input=op.inputs[0], output=op.output)
        movable = sums.is_layer(self._given, op) and self._selected(op.name)
        return movable and not universal.is_universal(alone)

    def _has_ties(self, op: AveragePool2D) -> bool:
        """Whether all windows of a pool have one even size, and its activation a layer's form."""
        even = op.window[0] * op.window[1] % 2 == 0
        plain = op.clamp is None and op.activation is not Activation.RELU6
        whole = op.padding is Padding.VALID and plain and self._selected(op.name)
        return even and whole and self._given.tensors[op.output].dtype is DType.INT8

    def _like(self, tensor: int, source: int) -> None:
        """A tensor has the quantization of what it is made of, and its offset."""
        quantization = self._tensors[source].quantization
        self._tensors[tensor] = replace(self._tensors[tensor], quantization=quantization)
        self._offsets[tensor] = self._offsets.get(source, 0)

    def _passed(self, op: Operator) -> None:
        """What moves, compares or averages stored integers does so whatever stands for 0."""
        free = isinstance(op, (MaxPool2D, AveragePool2D)) and op.activation is Activation.NONE
        free = free and op.clamp is None  # pyright: ignore[reportAttributeAccessIssue]
        free |= isinstance(op, (Reshape, Transpose, StridedSlice))
        inputs = op.inputs if free else tuple(self._plain(index) for index in op.inputs)
        self._operators.append(replace(op, inputs=inputs))
        self._like(op.output, inputs[0])

    # ---------------------------------------------------------------------------------- layers
    def _linear(self, op: Linear, kind: str = "") -> None:
        """A layer: as it is where all agree, else with moved scales, and an offset if need be."""
        source, given = self._source(op), self._given
        target = given.tensors[op.output]
        assert target.quantization is not None
        bits = self._plan.scales.get(op.output, target.quantization.scale_bits)
        real = op.bias * scale(given, op.inputs[0]) * op.weights.scale.astype(np.float64)
        quantization = target.quantization
        if bits != quantization.scale_bits:
            quantization = sums.lowered(target, bits)
        least = target.dtype.range[0]
        limited = op.activation is not Activation.NONE or op.clamp is not None
        absorbed = self._offsets.get(source, 0)
        moved = replace(op, inputs=(source,))
        self._tensors[op.output] = replace(target, quantization=quantization)
        kept = Anew(self.graph, moved, real, absorbed).kept()
        if self._selected(op.name) and universal.disagreeing_channels(self.graph, kept):
            levels = 0 if limited else quantization.zero_point - least
            if levels:
                lowest = replace(quantization, zero_point=least)
                self._tensors[op.output] = replace(target, quantization=lowest)
                real = real + levels * float(quantization.scale)
            try:
                found = self._found(moved, real, absorbed)
                self._offsets[op.output] = levels
            except InvalidGraphError:
                self._tensors[op.output] = replace(target, quantization=quantization)
                found = kept
        else:
            found = kept
        self._operators.append(found)
        self._changed(op, found, kind)

    def _found(self, op: Linear, real: FloatArray, absorbed: int) -> Linear:
        """With moved scales."""
        known = self._known.get(op.name)
        fits = known is not None and known.size == op.weights.scale_bits.size
        return Anew(self.graph, op, real, absorbed).moved(known if fits else None)

    def _source(self, op: Linear) -> int:
        """What a layer reads: with an offset where its bias can take it away."""
        source = op.inputs[0]
        if not self._offsets.get(source):
            return source
        vector = len(self._tensors[source].shape) != 4 and len(self._readers[source]) > 1
        shared = vector and any(self._reads_zero(reader) for reader in self._readers[source])
        return self._plain(source) if shared or self._reads_zero(op) else source

    def _reads_zero(self, op: Operator) -> bool:
        """Whether an operator has to know which integer stands for 0."""
        if isinstance(op, Linear) and sums.is_layer(self._given, op):
            if not isinstance(op, Conv2D) or op.padding is Padding.VALID:
                return False
            extents, kernel = self._tensors[op.inputs[0]].shape[1:3], op.weights.values.shape[1:3]
            steps = zip(extents, kernel, op.stride, op.dilation, strict=True)
            return any(any(window_geometry(*step, op.padding)[1:]) for step in steps)
        return op in self._given.core and not isinstance(op, (Reshape, Transpose, StridedSlice))

    def _as_layer(self, op: Mean | AveragePool2D | Unary) -> None:
        """An average as a pool or a layer of equal weights, a function as a layer of factor 1."""
        channels = self._given.tensors[op.inputs[0]].shape[3]
        window, stride, activation = (1, 1), (1, 1), Activation.NONE
        if isinstance(op, Mean):
            _, height, width, _ = op.weights.values.shape
            window = stride = (height, width)
            if self._is_pool(op, height * width):
                pool = AveragePool2D(
                    name=op.name, inputs=op.inputs, output=op.output, window=window, stride=stride
                )
                self._passed(pool)
                self._changed(op, pool)
                return
        elif isinstance(op, AveragePool2D):
            window, stride, activation = op.window, op.stride, op.activation
        else:
            activation = _ACTIVATIONS[op.function]
        count = window[0] * window[1]
        level = max(1, min(_COPIED, _LARGEST_SUM // count))
        layer = DepthwiseConv2D(
            name=op.name, inputs=op.inputs, output=op.output, stride=stride, activation=activation,
            weights=_equal((1, *window, channels), level, 1 / (level * count)),
            bias=np.zeros(channels, np.int32),
        )  # fmt: skip
        self._linear(layer, op.kind)

    def _is_pool(self, op: Mean, count: int) -> bool:
        """Whether AVERAGE_POOL_2D, which rescales nothing, says the same as a MEAN."""
        source, target = (self._given.tensors[i].quantization for i in (op.inputs[0], op.output))
        here = self._tensors[op.inputs[0]].quantization
        same = source == target and source and here and here.scale_bits == source.scale_bits
        ties = self._even_pools and count % 2 == 0
        return bool(same) and op.output not in self._plan.scales and not ties

    # ------------------------------------------------------------------------------------ sums
    def _sum(self, op: Add) -> None:
        bits = self._plan.operands.get(op.name)
        target = self._tensors[op.output]
        inputs = tuple(
            self._plain(i) if bits is None else self._scaled(op, i, bits) for i in op.inputs
        )
        if op.output in self._plan.scales:
            lowered = sums.lowered(target, self._plan.scales[op.output])
            target = replace(target, quantization=lowered)
        self._tensors[op.output] = target
        moved = replace(op, inputs=inputs)
        self._operators.append(moved)
        self._changed(op, moved)

    def _scaled(self, op: Add, tensor: int, bits: int) -> int:
        """A tensor's values at another scale, 0 being the zero point."""
        quantization = self._tensors[tensor].quantization
        assert quantization is not None
        if quantization.scale_bits == bits:
            return self._plain(tensor)
        least = self._tensors[tensor].dtype.range[0]
        absorbed = self._offsets.get(tensor, 0)
        below = (absorbed + quantization.zero_point - least) * float(quantization.scale)
        target = Quantization(bits, least)
        levels = int(np.ceil(below / float(target.scale)))
        name = f"{op.name}/operand_{op.inputs.index(tensor)}"
        draft = self._pixelwise(tensor, name, target)
        real = np.full(draft.channels, levels * float(target.scale))
        self._operators.append(self._found(draft, real, absorbed))
        self._offsets[draft.output] = levels
        return self._plain(self._vector(draft.output, tensor, name))

    # ---------------------------------------------------------------------------- added layers
    def _plain(self, tensor: int) -> int:
        """A tensor of the same values, whose zero point stands for 0."""
        offset = self._offsets.get(tensor, 0)
        if not offset:
            return tensor
        if tensor not in self._copies:
            quantization = self._tensors[tensor].quantization
            assert quantization is not None
            centre = replace(quantization, zero_point=quantization.zero_point + offset)
            name = f"{self._tensors[tensor].name}/centred"
            draft = self._pixelwise(tensor, name, centre)
            bias = np.full(draft.channels, -_COPIED * offset, np.int32)
            self._operators.append(replace(draft, bias=bias))
            self._copies[tensor] = self._vector(draft.output, tensor, name)
        return self._copies[tensor]

    def _pixelwise(self, tensor: int, name: str, target: Quantization) -> DepthwiseConv2D:
        """A depthwise 1x1 layer of factor 1, not yet among the operators."""
        shape = self._tensors[tensor].shape
        source = tensor
        if len(shape) != 4:
            shape = (1, 1, 1, self._tensors[tensor].size)
            source = self._reshaped(tensor, f"{name}/pixel", shape)
        self._added.append(name)
        output = self._tensor(name, shape, tensor, target)
        weights = _equal((1, 1, 1, shape[3]), _COPIED, 1 / _COPIED)
        bias = np.zeros(shape[3], np.int32)
        return DepthwiseConv2D(
            name=name, inputs=(source,), output=output, weights=weights, bias=bias
        )

    def _vector(self, tensor: int, like: int, name: str) -> int:
        """``tensor`` in the shape of another one."""
        shape = self._tensors[like].shape
        if self._tensors[tensor].shape == shape:
            return tensor
        return self._reshaped(tensor, f"{name}/vector", shape)

    def _tensor(
        self, name: str, shape: tuple[int, ...], like: int, target: Quantization | None = None
    ) -> int:
        given: Tensor = self._tensors[like]
        quantization = target or given.quantization
        self._tensors.append(replace(given, name=name, shape=shape, quantization=quantization))
        return len(self._tensors) - 1

    def _reshaped(self, tensor: int, name: str, shape: tuple[int, ...]) -> int:
        output = self._tensor(name, shape, tensor)
        self._operators.append(Reshape(name=name, inputs=(tensor,), output=output))
        self._like(output, tensor)
        return output

    def _changed(self, op: Operator, made: Operator, kind: str = "") -> None:
        """Note what is another operator now."""
        added, self._added = tuple(self._added), []
        kind = kind or op.kind
        if not (isinstance(op, Linear) and isinstance(made, Linear)):
            scales = [self._tensors[i].quantization for i in (*made.inputs, made.output)]
            before = [self._given.tensors[i].quantization for i in (*op.inputs, op.output)]
            if added or scales != before or op.kind != made.kind:
                pairs = zip(scales, before, strict=True)
                change = [float(a.scale) / float(b.scale) - 1 for a, b in pairs if a and b]
                self.changes.append(Change(op.name, kind, 1, np.abs(change), 0.0, added))
            return
        old, new = (v.weights.scale.astype(np.float64) for v in (op, made))
        change = np.abs(new / old - 1)
        values = made.weights.values != op.weights.values
        ends = [(g[op.output].quantization) for g in (self._given.tensors, self._tensors)]
        if change.any() or added or ends[0] != ends[1] or kind != op.kind:
            self.changes.append(
                Change(
                    op.name,
                    kind,
                    op.channels,
                    change,
                    float(values.mean()),
                    added,
                    made.weights.scale_bits,
                )  # fmt: skip
            )


def _equal(shape: tuple[int, ...], level: int, real: float) -> Weights:
    """Equal weights, with a scale for each channel."""
    bits = np.full(shape[3], np.float32(real)).view(np.uint32)
    return Weights(np.full(shape, level, np.int8), 8, bits)
