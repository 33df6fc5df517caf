"""What a graph must satisfy before anything is computed with it.

Each predicate's docstring is the text of the error and the line in ``docs/operators.md``; a
predicate returns the detail of what is broken, or an empty string. ``validate`` runs them all, on
the graph as it is read and, for those about multipliers, on a resolved one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from cactus_edge import constraints_imported, scales
from cactus_edge.errors import InvalidGraphError
from cactus_edge.graph import (
    Activation,
    Add,
    ArgMax,
    Conv2D,
    DepthwiseConv2D,
    Dequantize,
    DType,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Operator,
    Pad,
    Pool2D,
    Quantize,
    Reshape,
    Softmax,
    Tensor,
    sixes,
    window_geometry,
)
from cactus_edge.operators import Lookup, Move, Pair, WithConstant, arity
from cactus_edge.semantics import AddRounding, Rounding

__all__ = ["rules_of", "validate"]

ACCUMULATOR_LIMIT = 1 << 27
WIDE_ACCUMULATOR_LIMIT = 1 << 35
"""With int16 activations, whose accumulators are int64."""

Predicate = Callable[[Graph, Operator], str]
_RULES: list[tuple[tuple[type[Operator], ...], Predicate]] = [*constraints_imported.RULES]


def _rule(*kinds: type[Operator]) -> Callable[[Predicate], Predicate]:
    def register(predicate: Predicate) -> Predicate:
        _RULES.append((kinds, predicate))
        return predicate

    return register


def rules_of(kind: type[Operator]) -> list[str]:
    """The rules that apply to an operator class, as sentences; for the generated manual."""
    return [_sentence(rule) for kinds, rule in _RULES if issubclass(kind, kinds)]


def _sentence(predicate: Predicate) -> str:
    return " ".join((predicate.__doc__ or "").split())


def validate(graph: Graph) -> None:
    """Check every rule.

    Raises:
        InvalidGraphError: the first rule that is broken, with operator, index and detail.
    """
    _check_wiring(graph)
    for tensor in graph.tensors:
        _check_tensor(tensor)
    for index, op in enumerate(graph.operators):
        for kinds, predicate in _RULES:
            if isinstance(op, kinds) and (detail := predicate(graph, op)):
                raise InvalidGraphError(
                    f"operator {index} ({op.kind} '{op.name}'): {_sentence(predicate)} ({detail})"
                )


def _check_wiring(graph: Graph) -> None:
    if not graph.core:
        raise InvalidGraphError("the graph has no operator that computes")
    count = len(graph.tensors)
    known = {graph.input}
    indices = [graph.input, graph.output]
    indices += [i for op in graph.operators for i in (*op.inputs, op.output)]
    if any(not 0 <= index < count for index in indices):
        raise InvalidGraphError(f"a tensor index is outside 0..{count - 1}")
    last = len(graph.operators) - 1
    for index, op in enumerate(graph.operators):
        where = f"operator {index} ({op.kind} '{op.name}')"
        if len(op.inputs) != arity(op):
            raise InvalidGraphError(f"{where}: takes {len(op.inputs)} activations")
        missing = [graph.tensors[i].name for i in op.inputs if i not in known]
        if missing:
            raise InvalidGraphError(f"{where}: input '{missing[0]}' is not computed before it")
        if op.output in known:
            name = graph.tensors[op.output].name
            raise InvalidGraphError(f"{where}: tensor '{name}' is computed twice")
        tail = all(isinstance(o, (Softmax, Dequantize, ArgMax)) for o in graph.operators[index:])
        misplaced = isinstance(op, Quantize) and index > 0
        misplaced |= isinstance(op, Softmax) and not tail
        misplaced |= isinstance(op, (Dequantize, ArgMax)) and index != last
        if misplaced:
            raise InvalidGraphError(f"{where}: only at the edge of the graph")
        known.add(op.output)
    for index, op in enumerate(graph.operators):
        where = f"operator {index} ({op.kind} '{op.name}')"
        if isinstance(op, Softmax) and sum(isinstance(o, Softmax) for o in graph.operators) > 1:
            raise InvalidGraphError(f"{where}: only one SOFTMAX is supported")
    if graph.output not in known or graph.output == graph.input:
        raise InvalidGraphError("the graph's output is not computed")
    core = {graph.core_input} | {op.output for op in graph.core}
    if graph.logits not in core:
        raise InvalidGraphError("the graph's logits are not computed by an integer operator")
    for index in core:
        if graph.tensors[index].dtype is DType.FLOAT32:
            raise InvalidGraphError(
                f"tensor '{graph.tensors[index].name}' is float32; "
                "only a QUANTIZE at the start and a DEQUANTIZE at the end may touch float"
            )
    entry = graph.tensors[graph.core_input]
    if entry.dtype in (DType.INT32, DType.INT64):
        raise InvalidGraphError(
            f"tensor '{entry.name}' is {entry.dtype.value}; the input must be int8, uint8 or int16"
        )


def _check_tensor(tensor: Tensor) -> None:
    if not tensor.shape or tensor.shape[0] != 1 or min(tensor.shape) < 1:
        raise InvalidGraphError(
            f"tensor '{tensor.name}' has shape {list(tensor.shape)}; "
            "every extent must be at least 1 and the batch must be 1"
        )
    if tensor.quantization is None:
        return
    try:
        scales.decode_float32(tensor.quantization.scale_bits)
    except InvalidGraphError as error:
        raise InvalidGraphError(f"tensor '{tensor.name}': {error}") from None
    lower, upper = tensor.dtype.range
    if not lower <= tensor.quantization.zero_point <= upper:
        raise InvalidGraphError(
            f"tensor '{tensor.name}': zero point {tensor.quantization.zero_point} "
            f"is outside {tensor.dtype.value}"
        )


def _tensors(graph: Graph, op: Operator) -> tuple[Tensor, Tensor]:
    return graph.tensors[op.inputs[0]], graph.tensors[op.output]


def _same_shape(expected: tuple[int, ...], tensor: Tensor) -> str:
    if tensor.shape == expected:
        return ""
    return f"output is {list(tensor.shape)}, computed {list(expected)}"


@_rule(Linear)
def weights_fit(graph: Graph, op: Operator) -> str:
    """Weights are symmetric int8, or int2 to int4 values stored as INT4; zero point 0."""
    weights = cast(Linear, op).weights
    if not 2 <= weights.bits <= 8:
        return f"{weights.bits} bits"
    limit = 1 << (weights.bits - 1)
    lowest, highest = int(weights.values.min()), int(weights.values.max())
    if lowest < -limit or highest >= limit:
        return f"values {lowest}..{highest} in {weights.bits} bits"
    return ""


@_rule(Linear)
def bias_fits(graph: Graph, op: Operator) -> str:
    """One int32 bias and one or a single weight scale for each output channel."""
    linear = cast(Linear, op)
    if linear.bias.shape != (linear.channels,):
        return f"bias {list(linear.bias.shape)}, {linear.channels} channels"
    if linear.weights.scale_bits.size not in (0, 1, linear.channels):
        return f"{linear.weights.scale_bits.size} scales, {linear.channels} channels"
    return ""


@_rule(Conv2D)
def convolution_shape(graph: Graph, op: Operator) -> str:
    """Input is [1, height, width, channels]; any stride, dilation, SAME or VALID padding."""
    conv = cast(Conv2D, op)
    source, target = _tensors(graph, op)
    shape = conv.weights.values.shape
    if len(source.shape) != 4 or len(shape) != 4:
        return f"input {list(source.shape)}, weights {list(shape)}"
    if min(*conv.stride, *conv.dilation) < 1:
        return f"stride {conv.stride}, dilation {conv.dilation}"
    if isinstance(op, DepthwiseConv2D):
        if shape[0] != 1 or shape[3] % source.shape[3]:
            return f"weights {list(shape)} on {source.shape[3]} channels"
    elif shape[3] != source.shape[3]:
        return f"weights {list(shape)} on {source.shape[3]} channels"
    extents = tuple(
        window_geometry(
            source.shape[1 + a], shape[1 + a], conv.stride[a], conv.dilation[a], conv.padding
        )[0]
        for a in (0, 1)
    )
    return _same_shape((1, *extents, conv.channels), target)


@_rule(FullyConnected)
def fully_connected_shape(graph: Graph, op: Operator) -> str:
    """Weights are [out, in], ``in`` being the number of elements of the input."""
    source, target = _tensors(graph, op)
    shape = cast(Linear, op).weights.values.shape
    if len(shape) != 2 or source.size != shape[1]:
        return f"weights {list(shape)}, input of {source.size} elements"
    return _same_shape((1, shape[0]), target)


@_rule(Add)
def add_shape(graph: Graph, op: Operator) -> str:
    """Both operands have the output's shape; nothing is broadcast."""
    a, b = (graph.tensors[i].shape for i in op.inputs)
    target = graph.tensors[op.output].shape
    return "" if a == b == target else f"{list(a)} + {list(b)} -> {list(target)}"


@_rule(Pool2D)
def pool_shape(graph: Graph, op: Operator) -> str:
    """Input is [1, height, width, channels]; any window, stride, SAME or VALID padding."""
    pool = cast(Pool2D, op)
    source, target = _tensors(graph, op)
    if len(source.shape) != 4 or min(*pool.window, *pool.stride) < 1:
        return f"input {list(source.shape)}, window {pool.window}, stride {pool.stride}"
    extents = tuple(
        window_geometry(source.shape[1 + a], pool.window[a], pool.stride[a], 1, pool.padding)[0]
        for a in (0, 1)
    )
    return _same_shape((1, *extents, source.shape[3]), target)


@_rule(Pad)
def pad_shape(graph: Graph, op: Operator) -> str:
    """Only height and width of [1, height, width, channels] are padded, with the zero point."""
    paddings = cast(Pad, op).paddings
    source, target = _tensors(graph, op)
    if len(source.shape) != 4 or len(paddings) != 4:
        return f"input {list(source.shape)}, {len(paddings)} pairs"
    if min(min(pair) for pair in paddings) < 0 or paddings[0] != (0, 0) or paddings[3] != (0, 0):
        return f"paddings {paddings}"
    expected = tuple(e + b + a for e, (b, a) in zip(source.shape, paddings, strict=True))
    return _same_shape(expected, target)


@_rule(Reshape)
def reshape_shape(graph: Graph, op: Operator) -> str:
    """Input and output have the same number of elements."""
    source, target = _tensors(graph, op)
    return "" if source.size == target.size else f"{list(source.shape)} -> {list(target.shape)}"


@_rule(Pool2D, Pad, Reshape)
def same_quantization(graph: Graph, op: Operator) -> str:
    """Input and output have one type, scale and zero point."""
    source, target = _tensors(graph, op)
    same = (source.dtype, source.quantization) == (target.dtype, target.quantization)
    return "" if same else f"'{source.name}' and '{target.name}' differ"


@_rule(Linear, Add, Pool2D)
def clamp_fits(graph: Graph, op: Operator) -> str:
    """Fused activations are NONE, RELU and RELU6; the clamp lies in the output's type."""
    lower, upper = graph.output_range(op)
    least, greatest = graph.tensors[op.output].dtype.range
    return "" if least <= lower <= upper <= greatest else f"clamp {lower}..{upper}"


@_rule(Linear, Add, Pool2D, Pair, WithConstant)
def six_is_the_same_everywhere(graph: Graph, op: Operator) -> str:
    """RELU6 only at output scales at which all runtimes round a stored 6 to one integer."""
    fused = cast("Linear | Add | Pool2D | Pair | WithConstant", op)
    clamp = None if isinstance(fused, (Pair, WithConstant)) else fused.clamp
    if fused.activation is not Activation.RELU6 or clamp is not None:
        return ""
    target = graph.tensors[op.output]
    if target.quantization is None:
        return f"'{target.name}' has no scale"
    upper = target.dtype.range[1]
    limits = {min(six, upper) for six in sixes(target)}
    return "" if len(limits) == 1 else f"{min(limits)} or {max(limits)}"


@_rule(Linear)
def accumulator_fits(graph: Graph, op: Operator) -> str:
    """No accumulator can reach 2^27 (XNNPACK's int4 kernels wrap there, int32 at 2^31).

    With int16 activations accumulators are int64, and none can reach 2^35.
    """
    linear = cast(Linear, op)
    source = graph.tensors[op.inputs[0]]
    lower, upper = stored_range(graph, op.inputs[0])
    largest = max(abs(lower - source.zero_point), abs(upper - source.zero_point))
    positive, negative = _signed_sums(linear)
    bound = (positive - negative) * largest + np.abs(linear.bias.astype(np.int64))
    worst = int(bound.argmax())
    if int(bound[worst]) < accumulator_limit(graph, linear):
        return ""
    return f"channel {worst} may reach {int(bound[worst])}"


@_rule(Linear)
def multiplier_fits(graph: Graph, op: Operator) -> str:
    """Every effective multiplier lies in (0, 1), where requantization is monotone.

    Int16 and int32 logits may also be the accumulators as they are: single rounding, factor 1.
    """
    linear = cast(Linear, op)
    parameters = linear.requantization
    if parameters is None:
        return ""
    if parameters.rounding.shape != (linear.channels,):
        return f"{parameters.rounding.size} multipliers, {linear.channels} channels"
    columns = (v.tolist() for v in (parameters.rounding, parameters.multiplier, parameters.shift))
    wide = graph.tensors[op.output].dtype.is_wide
    for channel, (rounding, multiplier, shift) in enumerate(zip(*columns, strict=True)):
        if not parameters_fit(rounding, multiplier, shift, wide):
            return f"channel {channel}: rounding {rounding}, {multiplier}, shift {shift}"
    return ""


_PARAMETER_RANGES = {
    Rounding.DOUBLE_HALF_AWAY: (0, 1 << 31, 0, 31),
    Rounding.DOUBLE_HALF_UP: (0, 1 << 31, 0, 31),
    Rounding.SINGLE: (0, 1 << 31, 1, 62),
    Rounding.FLOAT32: (1 << 23, 1 << 24, 24, 54),
    Rounding.FLOAT64: (1 << 52, 1 << 53, 53, 84),
}


def parameters_fit(rounding: int, multiplier: int, shift: int, wide: bool) -> bool:
    """Whether a factor may be used; ``wide`` for int16 and int32 outputs."""
    if rounding not in _PARAMETER_RANGES:
        return False
    low, high, least, most = _PARAMETER_RANGES[Rounding(rounding)]
    if not (low <= multiplier < high and least <= shift <= most):
        return False
    is_one = wide and multiplier == 1 << shift
    return rounding != Rounding.SINGLE or multiplier >> shift == 0 or is_one


@_rule(Linear, Add, Pool2D, Pad, Reshape, Lookup, Pair, Move)
def wide_logits_end_the_graph(graph: Graph, op: Operator) -> str:
    """Int32 is for logits alone, of a linear layer that is given its multipliers.

    So is int16 behind a layer that reads int8. Nothing but RESHAPE and DEQUANTIZE reads them.
    """
    target = graph.tensors[op.output]
    if target.dtype is DType.INT64:
        return f"'{target.name}' is int64"
    if isinstance(op, Reshape):
        return ""
    wide = [graph.tensors[i] for i in op.inputs if graph.tensors[i].dtype is DType.INT32]
    wide += [target] if target.dtype is DType.INT32 and not isinstance(op, Linear) else []
    if wide:
        return f"'{wide[0].name}' is {wide[0].dtype.value}"
    narrow = graph.tensors[op.inputs[0]].dtype is not DType.INT16
    if isinstance(op, Linear) and target.dtype.is_wide and narrow and op.requantization is None:
        return f"'{target.name}' is {target.dtype.value}, no multipliers"
    return ""


@_rule(Add)
def add_multipliers_fit(graph: Graph, op: Operator) -> str:
    """The integers of the sum fit its rounding: factors of at least 0 that overflow nowhere."""
    parameters = cast(Add, op).requantization
    if parameters is None:
        return ""
    m_a, s_a, m_b, s_b, m_o, s_o = parameters.integers
    pairs = ((m_a, s_a), (m_b, s_b), (m_o, s_o))
    match parameters.rounding:
        case AddRounding.DOUBLE_HALF_AWAY | AddRounding.INT16:
            fits = all(0 <= m < 1 << 31 and 0 <= s <= 31 for m, s in pairs)
        case AddRounding.SINGLE:
            fits = all(0 <= m < 1 << 31 and 1 <= s <= 62 and m >> s == 0 for m, s in pairs)
        case AddRounding.FIXED_POINT:
            fits = (s_a, s_b, m_o) == (0, 0, 1) and 0 < s_o < 32
            fits = fits and 0 <= m_a < 1 << 31 and 0 <= m_b < 1 << 31
    wide = graph.tensors[op.output].dtype is DType.INT16
    fits = fits and wide == (parameters.rounding is AddRounding.INT16)
    return "" if fits else f"integers {parameters.integers}"


def stored_range(graph: Graph, tensor: int) -> tuple[int, int]:
    """Smallest and largest integer that an activation can hold, from its producer's clamp."""
    producers = {op.output: op for op in graph.core}
    passed: list[Operator] = []
    while isinstance(op := producers.get(tensor), (Pad, Reshape, Pool2D)):
        passed.append(op)
        tensor = op.inputs[0]
    lower, upper = graph.output_range(op) if op else graph.tensors[tensor].dtype.range
    for op in reversed(passed):
        if isinstance(op, Pad):
            zero_point = graph.tensors[op.output].zero_point
            lower, upper = min(lower, zero_point), max(upper, zero_point)
        elif isinstance(op, Pool2D):
            least, greatest = graph.output_range(op)
            lower, upper = max(least, min(lower, greatest)), min(greatest, max(upper, least))
    return lower, upper


def accumulator_limit(graph: Graph, op: Linear) -> int:
    """What every accumulator of a layer is proved to stay below."""
    wide = graph.tensors[op.inputs[0]].dtype is DType.INT16
    return WIDE_ACCUMULATOR_LIMIT if wide else ACCUMULATOR_LIMIT


def _signed_sums(op: Linear) -> tuple[Int64Array, Int64Array]:
    """Sums of the positive and of the negative weights of each channel, int64 [out] each."""
    depthwise, values = isinstance(op, DepthwiseConv2D), op.weights.values
    values = (np.moveaxis(values, 3, 0) if depthwise else values).reshape(op.channels, -1)
    total = values.sum(axis=1, dtype=np.int64)
    positive = np.maximum(values, 0).sum(axis=1, dtype=np.int64)
    return positive, total - positive


def accumulator_bounds(graph: Graph, op: Linear) -> tuple[Int64Array, Int64Array]:
    """Int64 [out] each: least and greatest accumulator over all storable inputs.

    Padding contributes exact zeros, so both ends are taken together with 0 for every tap.
    """
    source = graph.tensors[op.inputs[0]]
    lower, upper = (v - source.zero_point for v in stored_range(graph, op.inputs[0]))
    low, high = min(lower, 0), max(upper, 0)
    positive, negative = _signed_sums(op)
    bias = op.bias.astype(np.int64)
    return positive * low + negative * high + bias, positive * high + negative * low + bias
