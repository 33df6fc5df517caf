"""What an attack sees of a network: its integers forward, an integer gradient backward.

Forward are the compiled kernels. Backward the gradient passes straight through every rounding and
is stopped, or leaks, where a clamp is active. It is an integer array for each sample times a power
of two, so sums are exact and the same on every machine and in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from cactus_edge.certify import attack_tables, margin
from cactus_edge.certify.attack_tables import Gradient, through_factor
from cactus_edge.execute import windows
from cactus_edge.graph import (
    Activation,
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    MaxPool2D,
    Operator,
    Pad,
    Pool2D,
    Requantization,
    Reshape,
    Stored,
    window_geometry,
)
from cactus_edge.kernels import gradient
from cactus_edge.operators import TABLED, Lookup, Move, Pair
from cactus_edge.runtime import Session
from cactus_edge.semantics import AddRounding, Rounding

Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]
Values = Mapping[int, Stored]
_SHARE_BITS = 10


@dataclass(frozen=True, eq=False)
class _Transpose:
    """A linear layer's transpose on a padded input, as ``kernels.gradient`` takes it."""

    factors: Int32Array
    exponent: int
    bits: int
    weights: Int32Array
    runs: Int64Array
    bases: Int64Array
    depthwise: bool
    gathers: bool
    padded: tuple[int, int, int]
    corner: tuple[int, int]


@dataclass(eq=False)
class Network:
    """A resolved graph, prepared for attacks.

    ``last`` is the operator that makes the logits, ``layer`` its matrix where it has one.
    """

    graph: Graph
    session: Session = field(init=False)
    layer: margin.LastLayer | None = field(init=False)
    last: Operator = field(init=False)

    def __post_init__(self) -> None:
        """Compile the kernels and transpose the layers."""
        graph = self.graph
        self.layer = margin.last_layer(graph)
        self.last = _last_operator(graph)
        self._transposes = {op.output: _transpose(graph, op) for op in _linear(graph)}
        self._gates = {op.output: _gate_table(graph, op) for op in graph.core if _clamps(graph, op)}
        self._gates.pop(self.last.output, None)
        wanted = {graph.logits, *self._gates}
        wanted |= {t for op in graph.core if isinstance(op, MaxPool2D) for t in _ends(op)}
        wanted |= {t for op in graph.core if isinstance(op, TABLED) for t in op.inputs}
        if self.layer is not None:
            wanted.add(self.layer.source)
        wanted.discard(graph.core_input)
        self.session = Session(graph, tensors=sorted(wanted), whole=True)
        self.threads = self.session.threads
        self.session.threads = 1  # an attack divides the samples among the threads

    def forward(self, points: Stored) -> Values:
        """Stored activations that scores and gradients need, by tensor index."""
        return {**self.session.run_tensors(points), self.graph.core_input: points}

    def logits(self, values: Values) -> Int64Array:
        """Stored logits, int64 [samples, classes]."""
        stored = values[self.graph.logits]
        return stored.reshape(len(stored), -1).astype(np.int64)

    def scores(self, values: Values) -> Int64Array:
        """Logits before rounding and clamp, in common units: int64 [samples, classes].

        They are the last layer's accumulators times ``margin.LastLayer.parts``, or the stored
        logits where the last operator is no matrix.
        """
        if self.layer is None:
            return self.logits(values)
        layer = self.layer
        source = values[layer.source]
        x = source.reshape(len(source), -1).astype(np.int64) - layer.zero_point
        return (x @ layer.weights.T + layer.bias) * layer.parts

    def transpose(self, op: Operator, values: Values, outgoing: Gradient) -> list[Gradient]:
        """Gradients with respect to the operator's inputs, one for each."""
        shape = (len(outgoing.values), *self.graph.tensors[op.inputs[0]].shape[1:])
        match op:
            case Linear():
                return [_through_linear(self._transposes[op.output], outgoing, shape)]
            case Add():
                return [through_factor(outgoing, *factor) for factor in _add_factors(op)]
            case Pool2D():
                return [_through_pool(op, values, outgoing, shape)]
            case Pad():
                (top, _), (left, _) = op.paddings[1], op.paddings[2]
                inner = outgoing.values[:, top : top + shape[1], left : left + shape[2]]
                return [replace(outgoing, values=np.ascontiguousarray(inner))]
            case Lookup() | Pair():
                return attack_tables.through_table(self.graph, op, values, outgoing)
            case Move():
                return attack_tables.through_move(self.graph, op, outgoing)
            case _:
                return [replace(outgoing, values=outgoing.values.reshape(shape))]

    def gates(self, op: Operator, values: Values) -> UInt8Array | None:
        """Gate codes of the operator's output, uint8 [samples, elements]; None where all pass."""
        table = self._gates.get(op.output)
        if table is None:
            return None
        stored = values[op.output]
        if stored.dtype.itemsize > 1:
            return _wide_gates(self.graph, op, stored.reshape(len(stored), -1))
        return table[stored.reshape(len(stored), -1).view(np.uint8)]


def transposed(network: Network, values: Values, seeds: Int32Array, leak: int = 0) -> Int32Array:
    """Gradient of ``seeds * scores``, summed over the classes, with respect to the input.

    Args:
        network: gives the graph.
        values: of ``Network.forward``.
        seeds: int32 [samples, classes], weights of the scores, below 2**30 in magnitude.
        leak: quarters of a gradient that an active clamp lets back inside, 0 to 4.

    Returns:
        int32 [samples, *input shape], each sample up to a positive factor.
    """
    graph = network.graph
    shape = graph.tensors[graph.logits].shape[1:]
    start = Gradient(seeds.reshape(-1, *shape).copy(), np.zeros(len(seeds), np.int64))
    gradients: dict[int, Gradient] = {graph.logits: start}
    for op in reversed(graph.core):
        outgoing = gradients.pop(op.output, None)
        if outgoing is None:
            continue
        gates = network.gates(op, values)
        if gates is not None:
            gradient.gate(outgoing.values.reshape(len(seeds), -1), gates, leak)
        for index, incoming in zip(op.inputs, network.transpose(op, values, outgoing), strict=True):
            known = gradients.get(index)
            gradients[index] = incoming if known is None else _sum(known, incoming)
    return gradients[graph.core_input].values


def _ends(op: Operator) -> tuple[int, int]:
    return op.inputs[0], op.output


def _linear(graph: Graph) -> list[Linear]:
    return [op for op in graph.core if isinstance(op, Linear)]


def _last_operator(graph: Graph) -> Operator:
    tensor = graph.logits
    for op in reversed(graph.core):
        if op.output != tensor:
            continue
        if not isinstance(op, Reshape):
            return op
        tensor = op.inputs[0]
    return graph.core[-1]


def _clamps(graph: Graph, op: Operator) -> bool:
    """Whether an output at the end of its range may stand for something beyond it."""
    if isinstance(op, Pool2D):
        return op.clamp is not None or op.activation is not Activation.NONE
    return isinstance(op, (Linear, Add))


def _gate_table(graph: Graph, op: Operator) -> UInt8Array:
    """Gate codes uint8 [256] by the stored byte."""
    lower, upper = graph.output_range(op)
    table = np.full(256, gradient.OPEN, np.uint8)
    table[upper % 256] = gradient.UPPER
    table[lower % 256] = gradient.SHUT if lower == upper else gradient.LOWER
    return table


def _wide_gates(graph: Graph, op: Operator, stored: Stored) -> UInt8Array:
    """Gate codes of int16 activations."""
    lower, upper = graph.output_range(op)
    codes = np.full(stored.shape, gradient.OPEN, np.uint8)
    codes[stored == upper] = gradient.UPPER
    codes[stored == lower] = gradient.SHUT if lower == upper else gradient.LOWER
    return codes


def _through_linear(layer: _Transpose, outgoing: Gradient, shape: tuple[int, ...]) -> Gradient:
    count = shape[0]
    height, width, channels = layer.padded
    values = outgoing.values.reshape(count, -1, layer.factors.size)
    exponents = outgoing.exponents - layer.exponent
    gradient.scale(values, layer.factors, layer.bits, exponents)
    incoming = np.zeros((count, height * width * channels), np.int32)
    add = gradient.gather if layer.gathers else gradient.scatter
    if layer.depthwise:
        add = gradient.scatter_depthwise
    add(values, layer.weights, layer.runs, layer.bases, incoming)
    if incoming.size == np.prod(shape):
        return Gradient(incoming.reshape(shape), exponents)
    top, left = layer.corner
    inner = incoming.reshape(count, height, width, channels)
    inner = inner[:, top : top + shape[1], left : left + shape[2]]
    return Gradient(np.ascontiguousarray(inner), exponents)


def _through_pool(
    op: Pool2D, values: Values, outgoing: Gradient, shape: tuple[int, ...]
) -> Gradient:
    average = isinstance(op, AveragePool2D)
    # Cut to ``BITS``: a maximum may pass one gradient to each element of every window.
    outgoing = through_factor(outgoing, 1, 0)
    flat = outgoing.values.reshape(shape[0], -1, shape[3])
    position = np.arange(shape[1] * shape[2], dtype=np.int64).reshape(1, shape[1], shape[2], 1)
    taps = windows(position, op.window, op.stride, (1, 1), op.padding, fill=-1)
    count = np.sum([where >= 0 for _, where in taps], axis=0).reshape(1, -1, 1)
    incoming = np.zeros((shape[0], shape[1] * shape[2] + 1, shape[3]), np.int32)
    source = None if average else values[op.inputs[0]].reshape(shape[0], -1, shape[3])
    target = None if source is None else values[op.output].reshape(flat.shape)
    for _, where in taps:
        index = where.reshape(-1)
        if source is None:
            share = (flat << _SHARE_BITS) // count.astype(np.int32)
        else:
            share = flat * (source[:, index] == target)
        # Within one tap every output element reads another input element: += loses nothing.
        incoming[:, index] += share
        incoming[:, -1] = 0
    shift = _SHARE_BITS if average else 0
    return Gradient(
        np.ascontiguousarray(incoming[:, :-1]).reshape(shape), outgoing.exponents - shift
    )


def _sum(a: Gradient, b: Gradient) -> Gradient:
    exponents = np.maximum(a.exponents, b.exponents) + 1
    total = np.zeros((), np.int32)
    for part in (a, b):
        shift = np.minimum(exponents - part.exponents, 31).astype(np.int32)
        total = total + (part.values >> shift.reshape(-1, *[1] * (part.values.ndim - 1)))
    return Gradient(total, exponents)


def _cut(numerators: list[int], shifts: list[int]) -> tuple[Int32Array, int]:
    """``numerator * 2**-shift`` as int32 below ``2**BITS`` times a common ``2**-exponent``."""
    top = max(n.bit_length() - s for n, s in zip(numerators, shifts, strict=True))
    exponent = gradient.BITS - top
    scaled = [
        n << (exponent - s) if exponent >= s else n >> (s - exponent)
        for n, s in zip(numerators, shifts, strict=True)
    ]
    return np.array(scaled, np.int32), exponent


def _linear_factors(parameters: Requantization) -> tuple[Int32Array, int]:
    double = (Rounding.DOUBLE_HALF_AWAY, Rounding.DOUBLE_HALF_UP)
    shifts = parameters.shift + np.where(np.isin(parameters.rounding, double), 31, 0)
    return _cut(parameters.multiplier.tolist(), shifts.tolist())


def _add_factors(op: Add) -> list[tuple[int, int]]:
    """For each operand (factor, exponent): how far it moves the sum."""
    assert op.requantization is not None, "graph is not resolved"
    m_a, s_a, m_b, s_b, m_o, s_o = op.requantization.integers
    rounding = op.requantization.rounding
    base = 31 if rounding in (AddRounding.DOUBLE_HALF_AWAY, AddRounding.INT16) else 0
    raised = {AddRounding.FIXED_POINT: 0, AddRounding.INT16: 15}.get(rounding, 20)
    factors: list[tuple[int, int]] = []
    for multiplier, shift in ((m_a, s_a), (m_b, s_b)):
        cut, exponent = _cut([m_o * multiplier << raised], [s_o + shift + 2 * base])
        factors.append((int(cut[0]), exponent))
    return factors


def _transpose(graph: Graph, op: Linear) -> _Transpose:
    assert op.requantization is not None, "graph is not resolved"
    factors, exponent = _linear_factors(op.requantization)
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    weights = op.weights.values.astype(np.int32)
    if isinstance(op, FullyConnected):
        return _Transpose(
            factors=factors,
            exponent=exponent,
            bits=_room(np.abs(weights).sum(axis=0)),
            weights=weights[:, None],
            runs=np.zeros(1, np.int64),
            bases=np.zeros(1, np.int64),
            depthwise=False,
            gathers=False,
            padded=(1, 1, source.size),
            corner=(0, 0),
        )
    assert isinstance(op, Conv2D)
    _, height, width, channels = source.shape
    vertical, horizontal = (
        window_geometry(extent, kernel, stride, dilation, op.padding)
        for extent, kernel, stride, dilation in zip(
            (height, width), weights.shape[1:3], op.stride, op.dilation, strict=True
        )
    )
    padded = (height + sum(vertical[1:]), width + sum(horizontal[1:]), channels)
    row = padded[1] * channels
    out_y, out_x = np.arange(target.shape[1])[:, None], np.arange(target.shape[2])
    tap_y, tap_x = np.arange(weights.shape[1])[:, None], np.arange(weights.shape[2])
    bases = out_y * op.stride[0] * row + out_x * op.stride[1] * channels
    runs = tap_y * op.dilation[0] * row + tap_x * op.dilation[1] * channels
    depthwise = isinstance(op, DepthwiseConv2D)
    if depthwise:
        blocks = weights[0].reshape(runs.size, channels, -1)
        sums = np.abs(blocks).sum(axis=(0, 2))
    else:
        sums = np.abs(weights).sum(axis=(0, 1, 2))
        blocks = weights.reshape(op.channels, runs.size, channels)
        if op.dilation[1] == 1:  # a window's row is one run
            runs = runs[:, :1]
            blocks = weights.reshape(op.channels, runs.size, -1)
    gathers = not depthwise and blocks.shape[2] < min(16, op.channels)
    if gathers:
        blocks = blocks.transpose(1, 2, 0)
    return _Transpose(
        factors=factors,
        exponent=exponent,
        bits=_room(sums),
        weights=np.ascontiguousarray(blocks),
        runs=np.ascontiguousarray(runs.reshape(-1)),
        bases=np.ascontiguousarray(bases.reshape(-1)),
        depthwise=depthwise,
        gathers=gathers,
        padded=padded,
        corner=(vertical[1], horizontal[1]),
    )


def _room(sums: npt.NDArray[np.int32]) -> int:
    """Bits of a factor that is multiplied by weights of these sums of magnitudes."""
    return max(1, min(gradient.BITS, gradient.LARGEST_SUM - int(sums.max()).bit_length()))
