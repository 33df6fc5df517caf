"""Models that tell rounding profiles apart: one operator each, accumulators where methods differ.

Two methods of rescaling differ on few accumulators, and all of those lie at the steps of the
output. A probe's scales are random, and each channel's bias is an accumulator at which methods of
the table differ, so that an input at the zero point already tells them apart. ADD is probed on the
pairs of operands on which its methods differ, and on random ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cactus_edge import profiles, semantics, universal
from cactus_edge.graph import (
    Add,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Quantization,
    Requantization,
    Tensor,
    Weights,
)
from cactus_edge.profiles import PROFILES, Method
from cactus_edge.semantics import AddRounding

_SEED = 20_112_992
_VARIANTS = 6
_SAMPLES = 8
_CHANNELS = 20  # two vectors of 8, and a rest
_LARGEST_BIAS = 1 << 24


@dataclass(frozen=True, eq=False)
class Probe:
    """``kind`` says what is probed; ``inputs`` are stored integers int64 [n, ...]."""

    kind: str
    graph: Graph
    inputs: Int64Array


def probes() -> Iterator[Probe]:
    """All of them, the same at every call."""
    for number, (kind, make) in enumerate(_MAKERS.items()):
        for variant in range(_VARIANTS):
            rng = np.random.default_rng((_SEED, number, variant))
            yield Probe(kind, *make(rng))


Maker = Callable[[np.random.Generator], tuple[Graph, Int64Array]]


def linear(kind: type[Linear], *, bits: int = 8, channels: int = _CHANNELS, depth: int = 16,
            per_channel: bool = True, side: int = 2) -> Maker:  # fmt: skip
    """Maker of a model with one layer of weights; images have ``side`` x ``side`` pixels."""

    def make(rng: np.random.Generator) -> tuple[Graph, Int64Array]:
        inputs = channels if kind is DepthwiseConv2D else depth
        spatial = () if kind is FullyConnected else (side, side)
        source = Tensor("input", (1, *spatial, inputs), quantization=_quantization(rng, 0.05))
        target = Tensor("output", (1, *spatial, channels), quantization=_quantization(rng, 0.1))
        limit = 2 ** (bits - 1) - 1
        shapes: dict[type[Linear], tuple[int, ...]] = {
            FullyConnected: (channels, inputs),
            Conv2D: (channels, 1, 1, inputs),
            DepthwiseConv2D: (1, 1, 1, channels),
        }
        values = rng.integers(-limit, limit + 1, shapes[kind]).astype(np.int8)
        scales = np.exp(rng.uniform(-11, -7, channels if per_channel else 1)).astype(np.float32)
        weights = Weights(values, bits, scales.view(np.uint32))
        op = kind(name="probe", inputs=(0,), output=1, weights=weights,
                  bias=np.zeros(channels, np.int32))  # fmt: skip
        graph = Graph((source, target), (op,), 0, 1)
        op = replace(op, bias=_critical(rng, graph, op))
        stored = rng.integers(-128, 128, (_SAMPLES, *source.shape[1:]))
        stored[: _SAMPLES // 2] = source.zero_point  # the accumulators are the biases
        return Graph((source, target), (op,), 0, 1), stored

    return make


def _critical(rng: np.random.Generator, graph: Graph, op: Linear) -> Int64Array:
    """For each channel an accumulator at which methods differ, or one at a step of the output."""
    every = {m for p in PROFILES.values() for _, m in profiles.methods(graph, op, p)}
    used = sorted(every, key=repr)
    zero_point, limits = graph.tensors[op.output].zero_point, graph.output_range(op)
    low = np.full(op.channels, -_LARGEST_BIAS)
    found = [_parameters(graph, op, method) for method in used]
    points = np.concatenate(
        [universal.step_points(p, low, -low, zero_point, limits) for p in found]
    )
    values = np.stack([universal.stored(p, points, zero_point, limits) for p in found])
    differing = (values != values[0]).any(axis=0)
    chosen = np.zeros(op.channels, np.int64)
    for channel in range(op.channels):
        places = np.flatnonzero(differing[:, channel])
        places = places if places.size else np.arange(len(points))
        chosen[channel] = points[rng.choice(places), channel]
    return chosen


def _parameters(graph: Graph, op: Linear, method: Method) -> Requantization:
    pairs = np.array(profiles.factor(graph, op, method), np.int64)
    pairs = np.broadcast_to(pairs, (op.channels, 2))
    return Requantization(np.full(op.channels, int(method.rounding)), pairs[:, 0], pairs[:, 1])


def _add(rng: np.random.Generator) -> tuple[Graph, Int64Array]:
    """A + b for the two channels of the input, each with a scale of its own."""
    while True:
        graph = _add_graph(rng)
        pairs = _differing_pairs(graph)
        if len(pairs):
            break
    stored = rng.integers(-128, 128, (_SAMPLES, *graph.tensors[0].shape[1:]))
    half = stored[: _SAMPLES // 2].reshape(-1, 2)
    half[:] = rng.choice(pairs, len(half))
    return graph, stored


def _add_graph(rng: np.random.Generator) -> Graph:
    """Channels are taken apart by 1x1 convolutions that double and halve, exactly everywhere."""
    source = Tensor("input", (1, 16, 16, 2), quantization=Quantization.of(1.0, 0))
    scales = rng.uniform(0.01, 1, 2).astype(np.float32)
    shape = (1, 16, 16, 1)
    ends = [
        Tensor(name, shape, quantization=Quantization.of(scale, 0))
        for name, scale in zip("ab", scales, strict=True)
    ]
    summed = Quantization.of(scales.sum() * rng.uniform(0.4, 1.1), int(rng.integers(-20, 20)))
    taken: list[Conv2D] = []
    for index, scale in enumerate(scales):
        values = np.zeros((1, 1, 1, 2), np.int8)
        values[0, 0, 0, index] = 2
        weights = Weights(values, 8, np.array([scale / np.float32(2)]).view(np.uint32))
        taken.append(
            Conv2D(
                name="ab"[index],
                inputs=(0,),
                output=1 + index,
                weights=weights,
                bias=np.zeros(1, np.int32),
            )
        )
    target = Tensor("output", shape, quantization=summed)
    operators = (*taken, Add(name="probe", inputs=(1, 2), output=3))
    return Graph((source, *ends, target), operators, 0, 3)


def _differing_pairs(graph: Graph) -> Int64Array:
    """Stored operands, int64 [n, 2], of which two methods of the table make different sums."""
    op = graph.operators[-1]
    assert isinstance(op, Add)
    level = np.arange(-128, 128, dtype=np.int64)
    sums: list[Int64Array] = []
    for rounding in set(AddRounding) - {AddRounding.INT16}:
        integers = profiles.add_requantization(graph, op, rounding).integers
        rounded = semantics.ADD[rounding](level[:, None], level[None, :], *integers)
        limits = graph.output_range(op)
        zero_point = graph.tensors[op.output].zero_point
        sums.append(semantics.clamp(rounded + zero_point, *limits))  # pyright: ignore
    stacked = np.stack(sums)
    return np.argwhere((stacked != stacked[0]).any(axis=0)) - 128


def _quantization(rng: np.random.Generator, scale: float) -> Quantization:
    return Quantization.of(scale * rng.uniform(0.5, 2), int(rng.integers(-100, 100)))


_MAKERS: dict[str, Maker] = {
    "FULLY_CONNECTED, one scale": linear(FullyConnected, per_channel=False),
    "FULLY_CONNECTED, one scale, 8 inputs": linear(FullyConnected, per_channel=False, depth=8),
    "FULLY_CONNECTED, channel scales": linear(FullyConnected),
    "FULLY_CONNECTED, channel scales, 8 inputs": linear(FullyConnected, depth=8),
    "FULLY_CONNECTED, int4": linear(FullyConnected, bits=4, per_channel=False),
    "FULLY_CONNECTED, int4, odd": linear(FullyConnected, bits=4, per_channel=False, depth=17),
    "CONV_2D, one scale": linear(Conv2D, per_channel=False),
    "CONV_2D, channel scales": linear(Conv2D),
    "CONV_2D, one channel": linear(Conv2D, channels=1),
    "CONV_2D, int4": linear(Conv2D, bits=4),
    "DEPTHWISE_CONV_2D": linear(DepthwiseConv2D),
    "DEPTHWISE_CONV_2D, 4 channels": linear(DepthwiseConv2D, channels=4),
    "ADD": _add,
    "CONV_2D, one pixel": linear(Conv2D, side=1),
    "CONV_2D, one pixel, one scale": linear(Conv2D, per_channel=False, side=1),
    "CONV_2D, one pixel, int4": linear(Conv2D, bits=4, side=1),
}
