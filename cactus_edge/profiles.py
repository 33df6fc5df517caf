"""Rounding profiles: which arithmetic each runtime uses, and the integers that follow from it.

The file format does not say how an accumulator is rounded; each runtime decides by itself, by
operator, by scale granularity, sometimes by shape. ``profile_table`` holds what was measured, and
``resolve(graph, profile)`` writes the integers of one profile into every operator.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cactus_edge import scales, tables
from cactus_edge.errors import InvalidGraphError
from cactus_edge.graph import (
    Add,
    AddRequantization,
    Conv2D,
    DepthwiseConv2D,
    DType,
    FullyConnected,
    Graph,
    Linear,
    Operator,
    Padding,
    Pool2D,
    Requantization,
    Tensor,
    window_geometry,
)
from cactus_edge.lookups import (
    QUANTIZE_VECTOR,
    Arithmetic,
    early_shift_agrees,
    int16_early_shift_agrees,
)
from cactus_edge.operators import TABLED, Function, Lookup, Mean, Pair, Rows, Unary
from cactus_edge.profile_table import DEFAULT, PROFILES, Method, Profile, profile_of
from cactus_edge.semantics import AddRounding

__all__ = ["DEFAULT", "PROFILES", "Profile", "resolve", "uncovered"]


def methods(graph: Graph, op: Linear, profile: Profile) -> tuple[tuple[int, Method], ...]:
    """Runs of output channels with their method: ``(end, method)``, ends ascending.

    None at all where the profile does not cover int16 activations.
    """
    per_channel = int(op.weights.per_channel)
    channels = op.channels
    if graph.tensors[op.inputs[0]].dtype is DType.INT16:
        if profile.int16 is None:
            return ()
        place = per_channel if isinstance(op, (FullyConnected, Rows)) else 2
        return ((channels, profile.int16[place]),)
    packed = op.weights.bits <= 4
    fallback = PROFILES[profile.packed] if profile.packed else None
    depth = op.weights.values[0].size
    vector = graph.tensors[op.output].size == channels >= 4 and depth >= 8
    if isinstance(op, (FullyConnected, Rows)):
        if fallback and packed and (depth % 2 or not profile.packed_fully_connected):
            return methods(graph, op, fallback)
        if profile.vector and vector:
            return ((channels, profile.vector[per_channel]),)
        return ((channels, profile.fully_connected[per_channel]),)
    if fallback and packed:
        return methods(graph, op, fallback)
    if profile.one_channel and channels == 1:
        return ((channels, profile.one_channel),)
    if isinstance(op, DepthwiseConv2D):
        vector_end = 8 * (channels // 8)
        if profile.depthwise_vector and vector_end:
            return ((vector_end, profile.depthwise_vector), (channels, profile.depthwise))
        return ((channels, profile.depthwise),)
    if profile.convolution_vector and vector:
        return ((channels, profile.convolution_vector),)
    return ((channels, profile.convolution[per_channel]),)


def factor(graph: Graph, op: Linear, method: Method) -> list[tuple[int, int]]:
    """``(multiplier, shift)`` of each channel's scale, one entry where the scale is per-tensor."""
    inputs = _scale(graph.tensors[op.inputs[0]], op)
    output = _scale(graph.tensors[op.output], op)
    pairs: list[tuple[int, int]] = []
    for channel, bits in enumerate(op.weights.scale_bits.tolist()):
        try:
            weight = scales.decode_float32(bits)
            real = scales.effective(method.scale, inputs, weight, output)
            if method.reduced:
                pairs.append(scales.reduced_parameters(real))
            else:
                pairs.append(scales.parameters(method.rounding, real))
        except InvalidGraphError as error:
            raise InvalidGraphError(f"{op.kind} '{op.name}', channel {channel}: {error}") from None
    if len(pairs) not in (1, op.channels):
        raise InvalidGraphError(
            f"{op.kind} '{op.name}': {len(pairs)} weight scales for {op.channels} channels"
        )
    return pairs


def _scale(tensor: Tensor, op: Operator) -> scales.Binary:
    if tensor.quantization is None:
        raise InvalidGraphError(f"{op.kind} '{op.name}': tensor '{tensor.name}' has no scale")
    try:
        return scales.decode_float32(tensor.quantization.scale_bits)
    except InvalidGraphError as error:
        raise InvalidGraphError(f"{op.kind} '{op.name}': tensor '{tensor.name}': {error}") from None


def requantization(graph: Graph, op: Linear, profile: Profile) -> Requantization:
    """The integers of ``op`` under ``profile``.

    Raises:
        InvalidGraphError: a scale is missing or unusable, or a factor is outside [2**-31, 1).
    """
    rounding = np.zeros(op.channels, np.int64)
    multiplier, shift = rounding.copy(), rounding.copy()
    if isinstance(op, Mean):
        return _mean(graph, op, profile)
    start = 0
    for end, method in methods(graph, op, profile):
        pairs = np.array(factor(graph, op, method), np.int64)
        pairs = np.broadcast_to(pairs, (op.channels, 2))
        rounding[start:end] = int(method.rounding)
        multiplier[start:end] = pairs[start:end, 0]
        shift[start:end] = pairs[start:end, 1]
        start = end
    return Requantization(rounding, multiplier, shift)


def _mean(graph: Graph, op: Mean, profile: Profile) -> Requantization:
    """Of a MEAN, whose division is folded into the factor."""
    if profile.mean is None or (op.keeps and not profile.mean_keeps):
        which = "" if profile.mean is None else ", where it keeps its dimensions,"
        raise InvalidGraphError(
            f"MEAN '{op.name}': how {profile.summary} rounds it{which} is not described; an "
            "AVERAGE_POOL_2D over the whole input is covered"
        )
    source, target = (_scale(graph.tensors[index], op) for index in (op.inputs[0], op.output))
    _, height, width, _ = op.weights.values.shape
    rounding = profile.mean.rounding
    try:
        multiplier, shift = scales.mean_parameters(rounding, source, target, height * width)
    except InvalidGraphError as error:
        raise InvalidGraphError(f"MEAN '{op.name}': {error}") from None
    return Requantization.uniform(rounding, multiplier, shift, op.channels)


def add_requantization(graph: Graph, op: Add, rounding: AddRounding) -> AddRequantization:
    """The integers of an ADD.

    Raises:
        InvalidGraphError: a scale is missing or unusable, or a factor does not fit.
    """
    a, b = (_scale(graph.tensors[index], op) for index in op.inputs)
    try:
        integers = scales.add_parameters(rounding, a, b, _scale(graph.tensors[op.output], op))
    except InvalidGraphError as error:
        raise InvalidGraphError(f"ADD '{op.name}': {error}") from None
    return AddRequantization(rounding, integers)


def resolve(graph: Graph, name: str = DEFAULT) -> Graph:
    """``graph`` with the integers of the named profile in every operator that has none yet.

    Raises:
        UsageError: no such profile.
        InvalidGraphError: the profile does not cover the graph, or a scale is unusable.
    """
    profile = profile_of(name)

    def resolved(op: Operator) -> Operator:
        if _touches_int16(graph, op):
            return _int16(graph, op, profile)
        if profile.needs_covering_windows and isinstance(op, Conv2D):
            _require_covering_windows(graph, op, profile)
        if isinstance(op, Linear) and op.requantization is None:
            return replace(op, requantization=requantization(graph, op, profile))
        if isinstance(op, Add) and op.requantization is None:
            chosen = add_requantization(graph, op, profile.add)
            ends = [graph.tensors[index] for index in op.inputs]
            least = [end.dtype.range[0] - end.zero_point for end in ends]
            if profile.add_early_shift and not early_shift_agrees(chosen.integers, *least):
                raise InvalidGraphError(_by_position(op, profile))
            return replace(op, requantization=chosen)
        if isinstance(op, TABLED) and op.table is None:
            return _tabled(graph, op, profile)
        return op

    operators = tuple(resolved(op) for op in graph.operators)
    if all(new is old for new, old in zip(operators, graph.operators, strict=True)):
        return graph
    return replace(graph, operators=operators)


def _touches_int16(graph: Graph, op: Operator) -> bool:
    """Whether an operator that computes has int16 activations."""
    if not isinstance(op, (Linear, Add, Lookup, Pool2D)):
        return False
    ends = op.inputs if isinstance(op, Linear) else (*op.inputs, op.output)
    return any(graph.tensors[index].dtype is DType.INT16 for index in ends)


def _int16(graph: Graph, op: Operator, profile: Profile) -> Operator:
    """``op``, which ``_touches_int16``, with the integers of a profile."""
    given = graph.tensors[op.inputs[0]].quantization is None
    if given or (not isinstance(op, Pool2D) and is_resolved(replace(graph, operators=(op,)))):
        return op
    if profile.int16 is None:
        raise InvalidGraphError(
            f"{op.kind} '{op.name}': how {profile.summary} computes int16 activations was not "
            "measured"
        )
    if isinstance(op, Linear):
        return replace(op, requantization=requantization(graph, op, profile))
    if isinstance(op, Add):
        chosen = add_requantization(graph, op, AddRounding.INT16)
        builtin = PROFILES[profile.packed] if profile.packed else profile  # no delegate takes int16
        if builtin.add_early_shift and not int16_early_shift_agrees(chosen.integers):
            raise InvalidGraphError(
                f"ADD '{op.name}': {profile.summary} shifts int16 operands before it multiplies, "
                f"which profile '{profile.name}' does not cover; equal input scales avoid that"
            )
        return replace(op, requantization=chosen)
    if isinstance(op, Pool2D):
        return op
    assert isinstance(op, Lookup)
    if graph.tensors[op.inputs[0]].dtype is not DType.INT16 and not profile.widens:
        raise InvalidGraphError(
            f"{op.kind} '{op.name}': {profile.summary} does not take it from int8 to int16"
        )
    micro = profile.arithmetic is Arithmetic.MICRO
    return tables.resolved(graph, op, Arithmetic.MICRO if micro else Arithmetic.TFLITE)


def _tabled(graph: Graph, op: Lookup | Pair, profile: Profile) -> Operator:
    """``op`` with the table of a profile."""
    if not tables.rescales(graph, op):
        return tables.resolved(graph, op, Arithmetic.TFLITE)
    types = {graph.tensors[index].dtype for index in (*op.inputs, op.output)}
    if len(types) > 1 and profile.packed:  # no delegate takes QUANTIZE from int8 to uint8 or back
        profile = PROFILES[profile.packed]
    if profile.arithmetic is None:
        raise InvalidGraphError(
            f"{op.kind} '{op.name}': how {profile.summary} computes it was not measured"
        )
    if profile.add_early_shift and tables.depends_on_position(graph, op):
        raise InvalidGraphError(_by_position(op, profile))
    found = tables.resolved(graph, op, profile.arithmetic)
    half_up = profile.arithmetic is Arithmetic.TFLITE_HALF_UP
    if half_up and isinstance(op, Unary) and op.function is Function.QUANTIZE:
        return _in_vectors(graph, op, found, profile)
    return found


def _in_vectors(graph: Graph, op: Unary, vectors: Operator, profile: Profile) -> Operator:
    """QUANTIZE, the elements behind the last whole vector of which are rounded half away."""
    size = graph.tensors[op.output].size
    if size % QUANTIZE_VECTOR == 0:
        return vectors
    rest = tables.resolved(graph, op, Arithmetic.TFLITE)
    assert isinstance(vectors, Lookup) and isinstance(rest, Lookup)
    assert vectors.table is not None and rest.table is not None
    if size > QUANTIZE_VECTOR and not np.array_equal(vectors.table, rest.table):
        raise InvalidGraphError(_by_position(op, profile, "a multiple of 16 elements avoids"))
    return rest


def _by_position(op: Operator, profile: Profile, way: str = "equal input scales avoid") -> str:
    return (
        f"{op.kind} '{op.name}': {profile.summary} rounds it by an element's position, which "
        f"profile '{profile.name}' does not cover; {way} that"
    )


def _require_covering_windows(graph: Graph, op: Conv2D, profile: Profile) -> None:
    """Raise InvalidGraphError where ``Profile.needs_covering_windows`` is not met."""
    kernel, source = op.weights.values.shape[1:3], graph.tensors[op.inputs[0]].shape
    builtin = op.requantization is not None or op.weights.bits <= 4
    if builtin or op.padding is Padding.VALID or kernel == (1, 1):
        return
    for axis in (0, 1):
        extent, stride, dilation = source[1 + axis], op.stride[axis], op.dilation[axis]
        output, _, _ = window_geometry(extent, kernel[axis], stride, dilation, op.padding)
        if (output - 1) * stride + (kernel[axis] - 1) * dilation + 1 < extent:
            raise InvalidGraphError(
                f"{op.kind} '{op.name}': {profile.summary} computes SAME padding wrongly where "
                "windows leave out input elements; write a PAD and VALID instead"
            )


def _unmeasured(graph: Graph, profile: Profile) -> str:
    """Why nothing is claimed about a graph that could be resolved, or an empty string."""
    if not profile.packed_unmeasured:
        return ""
    for op in graph.core:
        if not isinstance(op, FullyConnected) or op.requantization is not None:
            continue
        if op.weights.bits <= 4 and op.weights.values.shape[1] % 2 == 0:
            return (
                f"FULLY_CONNECTED '{op.name}': which kernel {profile.summary} uses for int4 "
                "weights was not measured; a 1x1 CONV_2D is covered"
            )
    return ""


def uncovered(graph: Graph) -> dict[str, str]:
    """Profiles that do not cover the graph, with the reason."""
    reasons: dict[str, str] = {}
    for name, profile in PROFILES.items():
        try:
            resolve(graph, name)
        except InvalidGraphError as error:
            reasons[name] = str(error)
            continue
        if reason := _unmeasured(graph, profile):
            reasons[name] = reason
    return reasons


def is_resolved(graph: Graph) -> bool:
    """Whether every operator that rescales carries its integers."""
    rescaling = [op for op in graph.core if isinstance(op, (Linear, Add))]
    tabled = [op for op in graph.core if isinstance(op, TABLED)]
    return all(op.requantization for op in rescaling) and all(op.table is not None for op in tabled)
