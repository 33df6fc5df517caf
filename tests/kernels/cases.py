"""Random cases for kernels: graphs whose weights have patterns, and inputs that reach the ends.

``random_graph`` draws operators, shapes, strides, paddings and dilations. What kernels are
sensitive to besides is drawn here: how zeros are distributed, channels without weights, weights
and inputs at the ends of their ranges, and numbers of channels on both sides of a tile's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cactus_edge import profiles
from cactus_edge.constraints import ACCUMULATOR_LIMIT, validate
from cactus_edge.execute import execute_all
from cactus_edge.graph import (
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Padding,
    Quantization,
    Requantization,
    Tensor,
    Weights,
)
from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.place import core_tensors
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.runtime import Session
from cactus_edge.semantics import Rounding
from tests.graphs import CORE_OPERATORS, random_graph, random_inputs

PROFILES = sorted(profiles.PROFILES)
COUNTS = (1, 2, 7, 70)
"""One image, fewer rows than a tile, an odd rest, and more than one block."""
CHANNELS = (3, 9, 20, 40, 72)
"""Less than a register of any tier, and up to more than one tile of each."""
BITS = tuple(range(2, 9))
PATTERNS = ("scattered", "channels", "inputs", "blocks", "two of four", "single")
WINDOWS = ("CONV_2D", "CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "PAD")
_LARGEST_BIAS = 5000
FILLS = ("random", "lowest", "highest", "ends", "zero")


@dataclass(frozen=True, eq=False)
class Case:
    """A resolved graph and int64 [images, ...] inputs for it."""

    graph: Graph
    inputs: Int64Array

    def expected(self) -> dict[int, Int64Array]:
        """Every integer activation, by the reference."""
        return execute_all(self.graph, self.inputs)


def random_case(seed: int, count: int, profile: str) -> Case:
    """Everything follows from the seed."""
    rng = np.random.default_rng(seed)
    shape = None
    if rng.random() < 0.3:
        height, width = (int(rng.integers(1, 13)) for _ in range(2))
        shape = (1, height, width, int(rng.choice((1, 3, 5, 17, 33))))
    graph = random_graph(
        rng,
        operators=CORE_OPERATORS if rng.random() < 0.4 else WINDOWS,
        shape=shape,
        depth=int(rng.integers(1, 6)),
        channels=int(rng.choice(CHANNELS)),
        bits=BITS,
        sparsity=float(rng.choice((0.0, rng.random(), 1.0), p=(0.4, 0.5, 0.1))),
    )
    operators = tuple(
        _patterned(op, rng) if isinstance(op, Linear) and rng.random() < 0.5 else op
        for op in graph.operators
    )
    graph = profiles.resolve(replace(graph, operators=operators), profile)
    return Case(graph, filled(graph, rng, count))


def filled(graph: Graph, rng: np.random.Generator, count: int) -> Int64Array:
    """Inputs, each image random or at the ends of the range."""
    tensor = graph.tensors[graph.core_input]
    lower, upper = tensor.dtype.range
    x = random_inputs(rng, graph, count)
    for image in x[rng.random(count) < 0.4]:
        match rng.choice(FILLS):
            case "lowest":
                image[...] = lower
            case "highest":
                image[...] = upper
            case "ends":
                image[...] = rng.choice((lower, upper), image.shape)
            case "zero":
                image[...] = tensor.zero_point
            case _:
                pass
    return x


def _patterned(op: Linear, rng: np.random.Generator) -> Linear:
    """``op`` with zeros in one of ``PATTERNS``, and some weights at the ends of their range."""
    values = op.weights.values.copy()
    axis = 3 if isinstance(op, DepthwiseConv2D) else 0
    matrix = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1).copy()
    channels, inputs = matrix.shape
    keep = rng.random()
    match rng.choice(PATTERNS):
        case "channels":
            matrix[rng.random(channels) > keep] = 0
        case "inputs":
            matrix[:, rng.random(inputs) > keep] = 0
        case "blocks":
            grid = rng.random((-(-channels // 8), -(-inputs // 4))) < keep
            matrix *= np.kron(grid, np.ones((8, 4), np.int8)).astype(np.int8)[:channels, :inputs]
        case "two of four":
            order = rng.random((channels, -(-inputs // 4), 4)).argsort(axis=2)
            matrix *= (order < 2).reshape(channels, -1)[:, :inputs].astype(np.int8)
        case "single":
            chosen = rng.integers(0, inputs, channels)
            matrix *= (np.arange(inputs) == chosen[:, None]).astype(np.int8)
        case _:
            matrix[rng.random(matrix.shape) > keep] = 0
    least = -(1 << (op.weights.bits - 1))
    extreme = rng.random(channels) < 0.1
    ends = rng.choice(np.array([least, -least - 1], np.int8), matrix.shape)
    matrix[extreme] = np.where(matrix[extreme] != 0, ends[extreme], 0)
    shape = (values.shape[axis], *np.delete(values.shape, axis))
    values = np.moveaxis(matrix.reshape(shape), 0, axis)
    changed = replace(op.weights, values=np.ascontiguousarray(values))
    return replace(op, weights=changed)


def extreme_case(rng: np.random.Generator, profile_rounding: Rounding, count: int) -> Case:
    """One layer whose accumulators come as near to the proved limit as inputs and bits allow."""
    bits = int(rng.choice(BITS))
    least = -(1 << (bits - 1))
    zero = int(rng.choice((-128, 127, rng.integers(-128, 128))))
    reach = max(127 - zero, zero + 128)
    limit = (ACCUMULATOR_LIMIT - _LARGEST_BIAS - 1) // (reach * -least)
    channels = int(rng.choice((1, 3, 16, 33))) if limit < 1 << 14 else 3
    signs = rng.choice((0, 1), (channels, 1))
    window = int(rng.choice((1, 3)))
    depth = min(limit, 1 << 16) // window**2
    values = np.where(signs, least, -least - 1).astype(np.int8) * np.ones((1, depth), np.int8)
    if rng.random() < 0.5:
        values = np.where(rng.random(values.shape) < 0.1, -least - 1, values).astype(np.int8)
    source = Tensor("x", (1, depth), quantization=Quantization.of(1.0, zero))
    target = Tensor("y", (1, channels))
    common = {
        "name": "layer",
        "inputs": (0,),
        "output": 1,
        "bias": rng.integers(-_LARGEST_BIAS, _LARGEST_BIAS, channels).astype(np.int32),
        "requantization": unit_factors(profile_rounding, channels),
    }
    if window == 1:
        op: Linear = FullyConnected(weights=Weights(values, bits), **common)  # type: ignore
    else:
        shape = (channels, window, window, depth)
        tiled = np.ascontiguousarray(np.broadcast_to(values[:, None, None, :], shape))
        source = replace(source, shape=(1, 4, 3, depth))
        target = replace(target, shape=(1, 4, 3, channels))
        op = Conv2D(weights=Weights(tiled, bits), padding=Padding.SAME, **common)  # type: ignore
    graph = Graph((source, target), (op,), 0, 1)
    validate(graph)
    x = np.full((count, *source.shape[1:]), -128 if zero > 0 else 127, np.int64)
    x[rng.random(x.shape) < 0.01 * rng.random()] = zero
    return Case(graph, x)


def unit_factors(rounding: Rounding, channels: int, halvings: int = 20) -> Requantization:
    """Factors of about 2**-halvings; with 20 the largest accumulators span the output's range."""
    multiplier, shift = {
        Rounding.DOUBLE_HALF_AWAY: ((1 << 30) + 12345, halvings - 1),
        Rounding.DOUBLE_HALF_UP: ((1 << 30) + 12345, halvings - 1),
        Rounding.SINGLE: ((1 << 30) + 12345, halvings + 30),
        Rounding.FLOAT32: ((1 << 23) + 1, halvings + 23),
        Rounding.FLOAT64: ((1 << 52) + 99, halvings + 52),
    }[rounding]
    return Requantization.uniform(rounding, multiplier, shift, channels)


def assert_equal(
    case: Case,
    tier: Tier,
    layout: Layout,
    threads: int,
    expected: dict[int, Int64Array],
    *,
    tensors: Sequence[int] = (),
) -> int:
    """Activations on one tier equal ``expected``; gives the number of elements compared.

    All of them, unless ``tensors`` says which; then a session may leave out channels of the others.
    """
    known = list(tensors) or core_tensors(case.graph)
    session = Session(case.graph, tensors=known, layout=layout, threads=threads, tier=tier.value)
    values = session.run_tensors(case.inputs)
    for tensor in known:
        name = case.graph.tensors[tensor].name
        message = f"tier {tier}, layout {layout}, {threads} threads, tensor '{name}'"
        np.testing.assert_array_equal(values[tensor], expected[tensor], message)
    return sum(values[tensor].size for tensor in known)
