"""Rounding profiles: which arithmetic each runtime uses, and the integers that follow from it.

The file format does not say how an accumulator is rounded; each runtime decides by itself, by
operator, by scale granularity, sometimes by shape. ``PROFILES`` is the measured table, and
``resolve(graph, profile)`` writes the integers of one profile into every operator.

Measured for tflite-runtime 2.14, LiteRT (ai-edge-litert) 1.4 to 2.3 and tflite-micro on x86_64 and
emulated aarch64, by sweeping accumulators across every rounding boundary; the tests repeat it for
every runtime that is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cactus_edge import scales, tables
from cactus_edge.errors import InvalidGraphError, UsageError, meant
from cactus_edge.graph import (
    Add,
    AddRequantization,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Linear,
    Operator,
    Padding,
    Requantization,
    Tensor,
    window_geometry,
)
from cactus_edge.lookups import Arithmetic, early_shift_agrees
from cactus_edge.operators import TABLED, Lookup, Mean, Pair, Rows
from cactus_edge.scales import ScaleArithmetic
from cactus_edge.semantics import AddRounding, Rounding


@dataclass(frozen=True)
class Method:
    """A rounding and the arithmetic that forms its factor."""

    rounding: Rounding
    scale: ScaleArithmetic = ScaleArithmetic.FLOAT64


_DOUBLE = Method(Rounding.DOUBLE_HALF_AWAY)
_DOUBLE_PRODUCT = Method(Rounding.DOUBLE_HALF_AWAY, ScaleArithmetic.FLOAT32_PRODUCT)
_NEON = Method(Rounding.DOUBLE_HALF_UP)
_NEON_PRODUCT = Method(Rounding.DOUBLE_HALF_UP, ScaleArithmetic.FLOAT32_PRODUCT)
_SINGLE = Method(Rounding.SINGLE)
_SINGLE_PRODUCT = Method(Rounding.SINGLE, ScaleArithmetic.FLOAT32_PRODUCT)
_FLOAT32 = Method(Rounding.FLOAT32, ScaleArithmetic.FLOAT32)
_FLOAT32_REASSOCIATED = Method(Rounding.FLOAT32, ScaleArithmetic.FLOAT32_REASSOCIATED)
_RNDNU = Method(Rounding.SINGLE, ScaleArithmetic.FLOAT32)
_FLOAT64 = Method(Rounding.FLOAT64)


@dataclass(frozen=True)
class Profile:
    """One runtime's arithmetic. Pairs are (per-tensor, per-channel).

    ``depthwise_vector``: the first ``8 * floor(channels / 8)`` channels of a depthwise layer.
    ``vector``: FULLY_CONNECTED at batch 1 with at least 4 outputs and 16 inputs.
    ``one_channel``: convolutions with a single output channel.
    ``packed``: the profile that applies to int4 weights, where a delegate leaves them alone.
    ``packed_fully_connected``: except that the delegate takes int4 FULLY_CONNECTED with an even
    number of inputs. ``packed_unmeasured``: that was not measured; nothing is claimed about models
    with such a layer.
    ``add_early_shift``: ADD follows ``semantics.add_early_shift`` on most elements. It was measured
    on x86_64; on aarch64 it is assumed, which refuses some models and never accepts a wrong one.
    ``needs_covering_windows``: SAME convolutions larger than 1x1 whose windows leave out input
    elements are computed wrongly (tflite-runtime 2.14's XNNPACK, LiteRT's up to 2.1.0, the last
    that was measured on aarch64), so they are refused.
    ``arithmetic``: of ``operators.Lookup`` and ``Pair``; ``mean``: of MEAN. None where that was not
    measured, and such models are refused.
    """

    name: str
    summary: str
    fully_connected: tuple[Method, Method]
    convolution: tuple[Method, Method]
    depthwise: Method
    add: AddRounding = AddRounding.DOUBLE_HALF_AWAY
    depthwise_vector: Method | None = None
    vector: Method | None = None
    one_channel: Method | None = None
    packed: str | None = None
    packed_fully_connected: bool = False
    packed_unmeasured: bool = False
    add_early_shift: bool = False
    needs_covering_windows: bool = False
    arithmetic: Arithmetic | None = None
    mean: Method | None = None


_TABLE = (
    Profile(
        "tflite-micro",
        "TFLite Micro, and CMSIS-NN in its default build",
        (_DOUBLE, _DOUBLE),
        (_DOUBLE, _DOUBLE),
        _DOUBLE,
        arithmetic=Arithmetic.MICRO,
        mean=_DOUBLE,
    ),
    Profile(
        "tflite-reference",
        "tflite-runtime 2.14, BUILTIN_REF, every CPU",
        (_DOUBLE_PRODUCT, _DOUBLE),
        (_DOUBLE, _DOUBLE),
        _DOUBLE,
        arithmetic=Arithmetic.TFLITE,
        mean=_DOUBLE,
    ),
    Profile(
        "tflite-x86",
        "tflite-runtime 2.14, default and BUILTIN_WITHOUT_DEFAULT_DELEGATES, x86_64",
        (_NEON_PRODUCT, _NEON),
        (_NEON, _NEON),
        _DOUBLE,
        arithmetic=Arithmetic.TFLITE,
    ),
    Profile(
        "tflite-arm",
        "tflite-runtime 2.14, default and BUILTIN_WITHOUT_DEFAULT_DELEGATES, aarch64",
        (_DOUBLE_PRODUCT, _DOUBLE),
        (_DOUBLE, _DOUBLE),
        _DOUBLE,
        depthwise_vector=_NEON,
        vector=_NEON,
    ),
    Profile(
        "tflite-xnnpack-x86",
        "tflite-runtime 2.14 with the XNNPACK delegate asked for, x86_64",
        (_FLOAT32, _NEON),
        (_FLOAT32, _FLOAT32),
        _FLOAT32,
        add=AddRounding.FIXED_POINT,
        needs_covering_windows=True,
        packed="tflite-x86",
        arithmetic=Arithmetic.XNNPACK,
        mean=_FLOAT32,
    ),
    Profile(
        "tflite-xnnpack-arm",
        "tflite-runtime 2.14 with the XNNPACK delegate asked for, aarch64",
        (_RNDNU, _DOUBLE),
        (_RNDNU, _FLOAT32_REASSOCIATED),
        _FLOAT32_REASSOCIATED,
        add=AddRounding.FIXED_POINT,
        one_channel=_RNDNU,
        needs_covering_windows=True,
        packed="tflite-arm",
    ),
    Profile(
        "litert-reference",
        "LiteRT, BUILTIN_REF, every CPU",
        (_FLOAT64, _FLOAT64),
        (_DOUBLE, _DOUBLE),
        _DOUBLE,
        arithmetic=Arithmetic.TFLITE,
        mean=_DOUBLE,
    ),
    Profile(
        "litert-x86",
        "LiteRT, BUILTIN_WITHOUT_DEFAULT_DELEGATES, x86_64",
        (_NEON_PRODUCT, _NEON),
        (_NEON, _NEON),
        _DOUBLE,
        depthwise_vector=_NEON,
        add_early_shift=True,
        arithmetic=Arithmetic.TFLITE_HALF_UP,
    ),
    Profile(
        "litert-arm",
        "LiteRT, BUILTIN_WITHOUT_DEFAULT_DELEGATES, aarch64",
        (_SINGLE_PRODUCT, _SINGLE),
        (_SINGLE, _SINGLE),
        _DOUBLE,
        depthwise_vector=_NEON,
        vector=_NEON,
        add_early_shift=True,
    ),
    Profile(
        "litert-xnnpack-x86",
        "LiteRT 2.2 and later, default (XNNPACK), x86_64",
        (_FLOAT32, _FLOAT32),
        (_FLOAT32, _FLOAT32),
        _FLOAT32,
        add=AddRounding.FIXED_POINT,
        packed="litert-x86",
        packed_fully_connected=True,
        arithmetic=Arithmetic.XNNPACK,
    ),
    Profile(
        "litert-xnnpack-arm",
        "LiteRT, default (XNNPACK), aarch64",
        (_FLOAT32, _FLOAT32),
        (_FLOAT32, _FLOAT32),
        _FLOAT32,
        add=AddRounding.FIXED_POINT,
        needs_covering_windows=True,
        packed="litert-arm",
        packed_fully_connected=True,
        packed_unmeasured=True,
    ),
    Profile(
        "single-rounding",
        "CMSIS-NN built with CMSIS_NN_USE_SINGLE_ROUNDING",
        (_SINGLE, _SINGLE),
        (_SINGLE, _SINGLE),
        _SINGLE,
        add=AddRounding.SINGLE,
    ),
)
PROFILES: dict[str, Profile] = {profile.name: profile for profile in _TABLE}
DEFAULT = "tflite-micro"


def profile_of(name: str) -> Profile:
    """The profile of this name.

    Raises:
        UsageError: no such profile; the message lists the names.
    """
    if name not in PROFILES:
        known = ", ".join(PROFILES)
        raise UsageError(f"no rounding profile '{name}'{meant(name, PROFILES)} known: {known}")
    return PROFILES[name]


def methods(op: Linear, profile: Profile) -> tuple[tuple[int, Method], ...]:
    """Runs of output channels with their method: ``(end, method)``, ends ascending."""
    per_channel = int(op.weights.per_channel)
    channels = op.channels
    packed = op.weights.bits <= 4
    fallback = PROFILES[profile.packed] if profile.packed else None
    if isinstance(op, (FullyConnected, Rows)):
        depth = op.weights.values.shape[-1]
        if fallback and packed and (depth % 2 or not profile.packed_fully_connected):
            return methods(op, fallback)
        if isinstance(op, FullyConnected) and profile.vector and channels >= 4 and depth >= 16:
            return ((channels, profile.vector),)
        return ((channels, profile.fully_connected[per_channel]),)
    if fallback and packed:
        return methods(op, fallback)
    if profile.one_channel and channels == 1:
        return ((channels, profile.one_channel),)
    if isinstance(op, DepthwiseConv2D):
        vector_end = 8 * (channels // 8)
        if profile.depthwise_vector and vector_end:
            return ((vector_end, profile.depthwise_vector), (channels, profile.depthwise))
        return ((channels, profile.depthwise),)
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
    for end, method in methods(op, profile):
        pairs = np.array(factor(graph, op, method), np.int64)
        pairs = np.broadcast_to(pairs, (op.channels, 2))
        rounding[start:end] = int(method.rounding)
        multiplier[start:end] = pairs[start:end, 0]
        shift[start:end] = pairs[start:end, 1]
        start = end
    return Requantization(rounding, multiplier, shift)


def _mean(graph: Graph, op: Mean, profile: Profile) -> Requantization:
    """Of a MEAN, whose division is folded into the factor."""
    if profile.mean is None:
        raise InvalidGraphError(
            f"MEAN '{op.name}': how {profile.summary} rounds it is not described; an "
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


def _tabled(graph: Graph, op: Lookup | Pair, profile: Profile) -> Operator:
    """``op`` with the table of a profile."""
    if not tables.rescales(graph, op):
        return tables.resolved(graph, op, Arithmetic.TFLITE)
    if profile.arithmetic is None:
        raise InvalidGraphError(
            f"{op.kind} '{op.name}': how {profile.summary} computes it was not measured"
        )
    if profile.add_early_shift and tables.depends_on_position(graph, op):
        raise InvalidGraphError(_by_position(op, profile))
    return tables.resolved(graph, op, profile.arithmetic)


def _by_position(op: Operator, profile: Profile) -> str:
    return (
        f"ADD '{op.name}': {profile.summary} rounds it by an element's position, which "
        f"profile '{profile.name}' does not cover; equal input scales avoid that"
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
