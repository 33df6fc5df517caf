"""Random and constructed last layers, whose logits are compared with every input of a box."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge.graph import (
    Conv2D,
    DType,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Operator,
    Padding,
    Quantization,
    Requantization,
    Reshape,
    Softmax,
    Tensor,
    Weights,
)
from cactus_edge.semantics import Rounding

FORMS = ("fully-connected", "pointwise", "whole", "reshaped", "softmax")


@dataclass(frozen=True)
class Options:
    """What a last layer is like; ``special`` names a construction, or is empty."""

    dtype: DType = DType.INT8
    form: str = "fully-connected"
    rounding: Rounding | None = None
    per_channel: bool = False
    special: str = ""
    classes: int = 4
    inputs: int = 2


SPECIALS = (
    "",
    "saturated",
    "saturated-low",
    "equal-rows",
    "ties",
    "zero-weights",
    "far-multipliers",
    "coarse",
    "narrow-clamp",
    "zero-multiplier",
    "almost-one",
)


def parameters(
    rng: np.random.Generator, rounding: Rounding, factors: np.ndarray
) -> tuple[Int64Array, Int64Array]:
    """Multipliers and shifts near real factors in (0, 1)."""
    multipliers: list[int] = []
    shifts: list[int] = []
    for factor in factors.tolist():
        mantissa, exponent = np.frexp(factor)
        bits = {Rounding.FLOAT32: 24, Rounding.FLOAT64: 53}.get(rounding, 31)
        multiplier = min(int(mantissa * 2**bits), 2**bits - 1)
        shift = -int(exponent) + (
            0 if rounding in (Rounding.DOUBLE_HALF_AWAY, Rounding.DOUBLE_HALF_UP) else bits
        )
        multipliers.append(multiplier)
        shifts.append(shift)
    return np.array(multipliers, np.int64), np.array(shifts, np.int64)


def last_layer_graph(rng: np.random.Generator, options: Options) -> Graph:
    """One layer on the graph's input, with its multipliers, and what follows it."""
    classes, inputs = options.classes, options.inputs
    special = options.special
    weights = rng.integers(-127, 128, (classes, inputs))
    bias = rng.integers(-3000, 3001, classes)
    zero_point = int(rng.integers(-128, 128))
    factors = _factors(rng, options)
    lower, upper = options.dtype.range
    target = int(rng.integers(-40, 41))
    if special == "saturated":
        bias = rng.integers(0, 8000, classes) + int(300 / factors.min() / 2)
    elif special == "saturated-low":
        bias = rng.integers(-8000, 0, classes) - int(300 / factors.min() / 2)
    elif special == "equal-rows":
        weights[:], bias[:] = weights[0], bias[0]
    elif special == "ties":
        weights[:], bias[:] = weights[0], bias[0]
        bias += rng.integers(-2, 3, classes)
    elif special == "zero-weights":
        weights[rng.random(classes) < 0.6] = 0
    rounding = rng.choice(list(Rounding), classes)
    if options.rounding is not None:
        rounding[:] = options.rounding
    elif not options.per_channel:
        rounding[:] = rounding[0]
    pairs = [parameters(rng, Rounding(int(r)), factors[i : i + 1]) for i, r in enumerate(rounding)]
    multiplier, shift = (np.concatenate([pair[k] for pair in pairs]) for k in (0, 1))
    if special == "zero-multiplier":
        zeroed = rounding < Rounding.FLOAT32
        multiplier[zeroed & (rng.random(classes) < 0.5)] = 0
    clamp = None
    if special == "narrow-clamp":
        clamp = (max(lower, target), min(upper, target + int(rng.integers(0, 16))))
    return assemble(
        options,
        weights,
        bias,
        zero_point,
        target,
        clamp,
        Requantization(rounding, multiplier, shift),
    )


def _factors(rng: np.random.Generator, options: Options) -> np.ndarray:
    """Real factors; of wide logits such that they have hundreds of levels or more."""
    size = options.classes if options.per_channel else 1
    if options.dtype is DType.INT8:
        factors = 2.0 ** rng.uniform(-9, -4, size)
    else:
        factors = 2.0 ** rng.uniform(-3, -0.05, size)
    if options.special == "far-multipliers":
        factors = factors * 2.0 ** rng.uniform(-10, 0, size)
    elif options.special == "coarse":
        factors = factors * 2.0**-5
    elif options.special == "almost-one":
        factors = np.full(size, 1 - 2.0**-20)
    return np.broadcast_to(factors, options.classes).copy()


def assemble(
    options: Options,
    weights: np.ndarray,
    bias: np.ndarray,
    zero_point: int,
    target: int,
    clamp: tuple[int, int] | None,
    requantization: Requantization,
) -> Graph:
    """The graph of a form around one matrix."""
    classes, inputs = weights.shape
    source = Quantization.of(2.0**-4, zero_point)
    result = Quantization.of(2.0**-3, target)
    form = options.form
    shape = {"pointwise": (1, 1, 1, inputs), "whole": (1, inputs, 1, 1)}.get(form, (1, inputs))
    flat = form in ("fully-connected", "reshaped", "softmax")
    output = (1, classes) if flat else (1, 1, 1, classes)
    common = {
        "name": "logits",
        "inputs": (0,),
        "output": 1,
        "bias": bias.astype(np.int32),
        "clamp": clamp,
        "requantization": requantization,
    }
    layer: Linear
    if flat:
        layer = FullyConnected(weights=Weights(weights), **common)
    else:
        kernel = (classes, *shape[1:])
        padding = Padding.SAME if form == "pointwise" else Padding.VALID
        layer = Conv2D(weights=Weights(weights.reshape(kernel)), padding=padding, **common)
    tensors = [
        Tensor("input", shape, DType.INT8, source),
        Tensor("logits", output, options.dtype, result),
    ]
    operators: list[Operator] = [layer]
    if form in ("reshaped", "whole"):
        tensors.append(Tensor("flat", (1, 1, classes), options.dtype, result))
        operators.append(Reshape(name="flat", inputs=(1,), output=2))
    elif form == "softmax":
        tensors.append(Tensor("share", output, DType.INT8, Quantization.of(1 / 256, -128)))
        operators.append(Softmax(name="share", inputs=(1,), output=2))
    return Graph(tuple(tensors), tuple(operators), 0, len(tensors) - 1)
