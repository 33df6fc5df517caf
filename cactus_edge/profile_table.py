"""The measured table of rounding profiles: which method each runtime uses for which operator.

Measured for tflite-runtime 2.14, LiteRT (ai-edge-litert) 1.4 to 2.3 and tflite-micro on x86_64 and
emulated aarch64, by sweeping accumulators across every rounding boundary; the tests repeat it for
every runtime that is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

from cactus_edge.errors import UsageError, meant
from cactus_edge.lookups import Arithmetic
from cactus_edge.scales import ScaleArithmetic
from cactus_edge.semantics import AddRounding, Rounding


@dataclass(frozen=True)
class Method:
    """A rounding and the arithmetic that forms its factor; ``reduced``: to 15 bits."""

    rounding: Rounding
    scale: ScaleArithmetic = ScaleArithmetic.FLOAT64
    reduced: bool = False


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
_REDUCED = Method(Rounding.SINGLE, reduced=True)
_REDUCED_PRODUCT = Method(Rounding.SINGLE, ScaleArithmetic.FLOAT32_PRODUCT, reduced=True)


@dataclass(frozen=True)
class Profile:
    """One runtime's arithmetic. Pairs are (per-tensor, per-channel).

    ``depthwise_vector``: the first ``8 * floor(channels / 8)`` channels of a depthwise layer.
    ``vector``: FULLY_CONNECTED of one row, with at least 4 outputs and 8 inputs.
    ``convolution_vector``: convolutions whose output is one pixel, with at least 4 channels of at
    least 8 weights: the same product of a matrix and a vector.
    ``one_channel``: convolutions with a single output channel.
    ``packed``: the profile that applies to int4 weights, where a delegate leaves them alone, and to
    QUANTIZE from one type to another.
    ``packed_fully_connected``: except that the delegate takes int4 FULLY_CONNECTED with an even
    number of inputs. ``packed_unmeasured``: that was not measured; nothing is claimed about models
    with such a layer.
    ``add_early_shift``: ADD follows ``semantics.add_early_shift`` on most elements. It was measured
    on x86_64; on aarch64 it is assumed, which refuses some models and never accepts a wrong one.
    ``needs_covering_windows``: SAME convolutions larger than 1x1 whose windows leave out input
    elements are computed wrongly (tflite-runtime 2.14's XNNPACK, LiteRT's up to 2.1.0, the last
    that was measured on aarch64), so they are refused.
    ``arithmetic``: of ``operators.Lookup`` and ``Pair``; ``mean``: of MEAN; ``int16``: of layers
    with int16 activations, as (per-tensor and per-channel FULLY_CONNECTED, convolutions). None
    where that was not measured, and such models are refused. ``mean_keeps``: whether ``mean`` is
    also that of a MEAN that keeps its dimensions. ``widens``: whether QUANTIZE takes int8 to int16.
    """

    name: str
    summary: str
    fully_connected: tuple[Method, Method]
    convolution: tuple[Method, Method]
    depthwise: Method
    add: AddRounding = AddRounding.DOUBLE_HALF_AWAY
    depthwise_vector: Method | None = None
    vector: tuple[Method, Method] | None = None
    convolution_vector: Method | None = None
    one_channel: Method | None = None
    packed: str | None = None
    packed_fully_connected: bool = False
    packed_unmeasured: bool = False
    add_early_shift: bool = False
    needs_covering_windows: bool = False
    arithmetic: Arithmetic | None = None
    mean: Method | None = None
    mean_keeps: bool = True
    int16: tuple[Method, Method, Method] | None = None
    widens: bool = False


_TABLE = (
    Profile(
        "tflite-micro",
        "TFLite Micro, and CMSIS-NN in its default build",
        (_DOUBLE, _DOUBLE),
        (_DOUBLE, _DOUBLE),
        _DOUBLE,
        arithmetic=Arithmetic.MICRO,
        mean=_DOUBLE,
        int16=(_REDUCED, _REDUCED, _REDUCED),
        widens=True,
    ),
    Profile(
        "tflite-reference",
        "tflite-runtime 2.14, BUILTIN_REF, every CPU",
        (_DOUBLE_PRODUCT, _DOUBLE),
        (_DOUBLE, _DOUBLE),
        _DOUBLE,
        arithmetic=Arithmetic.TFLITE,
        mean=_DOUBLE,
        int16=(_REDUCED_PRODUCT, _REDUCED, _REDUCED),
    ),
    Profile(
        "tflite-x86",
        "tflite-runtime 2.14, default and BUILTIN_WITHOUT_DEFAULT_DELEGATES, x86_64",
        (_NEON_PRODUCT, _NEON),
        (_NEON, _NEON),
        _DOUBLE,
        arithmetic=Arithmetic.TFLITE,
        int16=(_REDUCED_PRODUCT, _REDUCED, _REDUCED),
        mean=_DOUBLE,
        mean_keeps=False,
    ),
    Profile(
        "tflite-arm",
        "tflite-runtime 2.14, default and BUILTIN_WITHOUT_DEFAULT_DELEGATES, aarch64",
        (_DOUBLE_PRODUCT, _DOUBLE),
        (_DOUBLE, _DOUBLE),
        _DOUBLE,
        depthwise_vector=_NEON,
        vector=(_NEON_PRODUCT, _NEON),
        convolution_vector=_NEON,
        arithmetic=Arithmetic.TFLITE_HALF_UP,
        mean=_DOUBLE,
        mean_keeps=False,
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
        int16=(_REDUCED_PRODUCT, _REDUCED, _REDUCED),
    ),
    Profile(
        "tflite-xnnpack-arm",
        "tflite-runtime 2.14 with the XNNPACK delegate asked for, aarch64",
        (_RNDNU, _DOUBLE),
        (_RNDNU, _FLOAT32_REASSOCIATED),
        _FLOAT32_REASSOCIATED,
        add=AddRounding.FIXED_POINT,
        vector=(_RNDNU, _NEON),
        one_channel=_RNDNU,
        needs_covering_windows=True,
        packed="tflite-arm",
        arithmetic=Arithmetic.XNNPACK_ARM,
        mean=_RNDNU,
    ),
    Profile(
        "litert-reference",
        "LiteRT, BUILTIN_REF, every CPU",
        (_FLOAT64, _FLOAT64),
        (_DOUBLE, _DOUBLE),
        _DOUBLE,
        arithmetic=Arithmetic.TFLITE,
        mean=_DOUBLE,
        int16=(_FLOAT64, _FLOAT64, _REDUCED),
        widens=True,
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
        int16=(_FLOAT64, _FLOAT64, _REDUCED),
        widens=True,
        mean=_DOUBLE,
        mean_keeps=False,
    ),
    Profile(
        "litert-arm",
        "LiteRT, BUILTIN_WITHOUT_DEFAULT_DELEGATES, aarch64",
        (_SINGLE_PRODUCT, _SINGLE),
        (_SINGLE, _SINGLE),
        _DOUBLE,
        depthwise_vector=_NEON,
        vector=(_NEON_PRODUCT, _NEON),
        convolution_vector=_NEON,
        add_early_shift=True,
        arithmetic=Arithmetic.TFLITE_HALF_UP,
        mean=_DOUBLE,
        mean_keeps=False,
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
        int16=(_FLOAT64, _FLOAT64, _REDUCED),
        widens=True,
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
        arithmetic=Arithmetic.XNNPACK_ARM,
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
