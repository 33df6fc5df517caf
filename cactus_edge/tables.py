"""From a graph's scales to the tables of ``operators.Lookup`` and ``operators.Pair``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cactus_edge import lookups, scales
from cactus_edge.errors import InvalidGraphError
from cactus_edge.graph import Activation, Graph, Int64Array, Quantization, Tensor
from cactus_edge.lookups import Arithmetic
from cactus_edge.operators import Combination, Function, Lookup, Pair, Unary, WithConstant
from cactus_edge.semantics import AddRounding

_RANGES: dict[Function | Activation, tuple[int | None, int | None]] = {
    Function.RELU: (0, None),
    Function.RELU6: (0, 6),
    Function.RELU_N1_TO_1: (-1, 1),
    Activation.NONE: (None, None),
    Activation.RELU: (0, None),
    Activation.RELU6: (0, 6),
}
# What runtimes prescribe for the output, as (steps of a real 1, zero point less the least value).
_FIXED = {
    Function.LOGISTIC: (256, 0, lookups.logistic),
    Function.TANH: (128, 128, lookups.tanh),
}


def resolved(graph: Graph, op: Lookup | Pair, arithmetic: Arithmetic) -> Lookup | Pair:
    """``op`` with its table.

    Raises:
        InvalidGraphError: scales that the arithmetic does not take, or a table that it leaves open.
    """
    try:
        if isinstance(op, Pair):
            return replace(op, table=_pair(graph, op, arithmetic))
        if isinstance(op, Unary):
            return replace(op, table=_unary(graph, op, arithmetic)[None])
        assert isinstance(op, WithConstant)
        return replace(op, table=_with_constant(graph, op, arithmetic))
    except InvalidGraphError as error:
        raise InvalidGraphError(f"{op.kind} '{op.name}': {error}") from None


def rescales(graph: Graph, op: Lookup | Pair) -> bool:
    """Whether any rounding is left: not in QUANTIZE and RELU between tensors of one scale.

    Their factor is 1 there, which every arithmetic multiplies by exactly.
    """
    if not isinstance(op, Unary):
        return True
    source, target = (graph.tensors[i].quantization for i in (op.inputs[0], op.output))
    if source is None or target is None:
        return True
    if op.function is Function.QUANTIZE:
        return source.scale_bits != target.scale_bits
    return op.function not in (Function.RELU, Function.RELU6) or source != target


def depends_on_position(graph: Graph, op: Lookup | Pair) -> bool:
    """Whether ``lookups.early_shift_agrees`` fails: an ADD that LiteRT rounds by position.

    Raises:
        InvalidGraphError: a scale is missing or unusable.
    """
    if not isinstance(op, WithConstant) or op.combination is not Combination.ADD:
        return False
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    ends = [_scale(q) for q in (source.quantization, op.quantization, target.quantization)]
    integers = scales.add_parameters(AddRounding.DOUBLE_HALF_AWAY, ends[0], ends[1], ends[2])
    least = source.dtype.range[0] - source.zero_point, -128 - op.quantization.zero_point
    return not lookups.early_shift_agrees(integers, *least)


def _scale(quantization: Quantization | None) -> scales.Binary:
    if quantization is None:
        raise InvalidGraphError("a tensor has no scale")
    return scales.decode_float32(quantization.scale_bits)


def _levels(tensor: Tensor) -> Int64Array:
    """Every storable value less the zero point."""
    least, most = tensor.dtype.range
    return np.arange(least, most + 1, dtype=np.int64) - tensor.zero_point


def _stored(
    values: Int64Array, target: Tensor, limits: tuple[int | None, int | None]
) -> Int64Array:
    """With the zero point, within the type and within real limits as the runtime stores them."""
    least, most = target.dtype.range
    scale = _scale(target.quantization)
    low, high = (
        end if real is None else lookups.bound(real, scale, target.zero_point)
        for real, end in zip(limits, (least, most), strict=True)
    )
    return np.clip(values + target.zero_point, max(low, least), min(high, most))


def _unary(graph: Graph, op: Unary, arithmetic: Arithmetic) -> Int64Array:
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    x, a, b = _levels(source), _scale(source.quantization), _scale(target.quantization)
    match op.function:
        case Function.QUANTIZE:
            return _stored(lookups.requantize(x, a, b, arithmetic), target, (None, None))
        case Function.LEAKY_RELU:
            alpha = scales.decode_float32(op.alpha_bits)
            return _stored(lookups.leaky_relu(x, alpha, a, b, arithmetic), target, (None, None))
        case Function.HARD_SWISH:
            return _stored(lookups.hard_swish(x, a, b), target, (None, None))
        case Function.LOGISTIC | Function.TANH:
            steps, _, function = _FIXED[op.function]
            values = lookups.transcendental(x, a, steps, function)
            return _stored(values, target, (None, None))
        case Function.RELU6 if arithmetic is Arithmetic.MICRO:
            clamped = _stored(x, source, _RANGES[Function.RELU6])
            return np.clip(clamped, *target.dtype.range)
        case Function.RELU_N1_TO_1 if arithmetic is Arithmetic.MICRO:
            raise InvalidGraphError("TFLite Micro has no such operator")
        case _:
            return _stored(lookups.relu(x, a, b, arithmetic), target, _RANGES[op.function])


def fixed_output(op: Unary) -> Quantization | None:
    """The quantization that runtimes ask of a function's int8 output, where they ask for one."""
    if op.function not in _FIXED:
        return None
    steps, zero, _ = _FIXED[op.function]
    return Quantization.of(1 / steps, zero - 128)  # float: exact


def _combined(
    op: Pair | WithConstant,
    values: tuple[Int64Array, Int64Array],
    sources: tuple[scales.Binary, scales.Binary],
    target: Tensor,
    arithmetic: Arithmetic,
) -> Int64Array:
    out = _scale(target.quantization)
    if op.combination is Combination.MUL:
        found = lookups.product(*values, sources, out, arithmetic)
    else:
        sign = 1 if op.combination is Combination.ADD else -1
        found = lookups.total(*values, sources, out, arithmetic, sign)
    return _stored(found, target, _RANGES[op.activation])


def _pair(graph: Graph, op: Pair, arithmetic: Arithmetic) -> Int64Array:
    a, b = (graph.tensors[index] for index in op.inputs)
    values = _levels(a)[:, None], _levels(b)[None, :]
    sources = _scale(a.quantization), _scale(b.quantization)
    return _combined(op, values, sources, graph.tensors[op.output], arithmetic)


def _with_constant(graph: Graph, op: WithConstant, arithmetic: Arithmetic) -> Int64Array:
    source = graph.tensors[op.inputs[0]]
    values = op.constant.astype(np.int64).reshape(-1, 1) - op.quantization.zero_point
    given = (_levels(source)[None, :], _scale(source.quantization))
    constant = (values, _scale(op.quantization))
    (a, scale_a), (b, scale_b) = (constant, given) if op.first else (given, constant)
    return _combined(op, (a, b), (scale_a, scale_b), graph.tensors[op.output], arithmetic)
