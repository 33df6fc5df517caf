"""Signal to noise of deployed integers against the float network, layer by layer.

A ratio is ``10 log10(sum of squares of the float values / sum of squares of the difference)``, in
decibels, over all samples and elements. ``whole`` takes each layer's values after everything before
it was rounded too; ``own`` feeds the float layer with the deployed input, so that only the layer's
own rounding and pruning are left. A layer without ReLU is deployed with one constant added to all
of its outputs, which later biases take away; the constant is taken away here as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from cactus_edge import profiles
from cactus_edge.errors import DataError, UnsupportedModelError, counted
from cactus_edge.graph import DepthwiseConv2D, Graph, Int64Array, Linear, Tensor
from cactus_edge.lowering.stages import (
    INPUT,
    Branch,
    Flatten,
    FloatArray,
    Layer,
    Pool,
    Stage,
    Sum,
    linear,
    output_of,
    pooled,
    spread,
)
from cactus_edge.runtime import Session


class LayerSignal(msgspec.Struct, frozen=True):
    """A layer with weights, or a sum; ratios in decibels, None where nothing differs.

    Attributes:
        name: of the layer.
        elements: of its output.
        whole: of its output, with all that came before.
        own: of its output, from the deployed input.
        bits: width of the weights, 0 for a sum.
        sparsity: share of deployed weights that are zero.
        weights: ratio of the deployed weights themselves.
        shared: whether all output channels have one weight scale.
        by_channel: what ``weights`` would be with a scale for each channel, where they share one.
    """

    name: str
    elements: int
    whole: float | None
    own: float | None
    bits: int = 0
    sparsity: float = 0.0
    weights: float | None = None
    shared: bool = False
    by_channel: float | None = None


class Signals(msgspec.Struct, frozen=True):
    """All layers, and how many samples both networks decide right, and alike."""

    samples: int
    float_correct: int
    correct: int
    alike: int
    layers: tuple[LayerSignal, ...]


@dataclass(frozen=True, eq=False)
class _Deployed:
    """Deployed values [samples, elements] by tensor name, dequantized, in the graph's order."""

    graph: Graph
    values: Mapping[str, FloatArray]
    tensors: Mapping[str, Tensor]


def signals(
    stages: Sequence[Stage], graph: Graph, stored: Int64Array, real: FloatArray, labels: Int64Array
) -> Signals:
    """Compare a float network with a model that was made of it.

    Args:
        stages: the float network, with the names of the model's tensors.
        graph: the model.
        stored: int64 [samples, *input shape], what the model takes.
        real: float64 [samples, C, H, W] or [samples, F], what the float network takes.
        labels: int64 [samples].

    Raises:
        DataError: the model has not the layers of the float network.
        UnsupportedModelError: the model's logits are not its last integers.
    """
    deployed = _run(graph, stored)
    operators = {op.name: op for op in graph.core if isinstance(op, Linear)}
    sources = {stage.source for stage in stages if isinstance(stage, Branch | Sum)}
    exact = real
    seen = real  # what the deployed integers say in the float network's order
    kept = {INPUT: (exact, seen)}
    rows: list[LayerSignal] = []
    spatial: tuple[int, ...] = ()  # of the image that a matrix reads flattened
    for stage in stages:
        before = seen
        match stage:
            case Flatten():
                spatial = exact.shape[1:]
                exact, seen = (x.reshape(len(x), -1) for x in (exact, seen))
            case Branch():
                exact, seen = kept[stage.source]
            case Pool():
                exact, seen = pooled(stage, exact), pooled(stage, seen)
            case Layer() | Sum():
                other = kept[stage.source] if isinstance(stage, Sum) else (exact, seen)
                exact = _computed(stage, exact, other[0])
                alone = _computed(stage, before, other[1])
                seen = _found(deployed, stage, alone)
                row = LayerSignal(
                    stage.name, exact[0].size, _ratio(exact, seen), _ratio(alone, seen)
                )
                if isinstance(stage, Layer):
                    row = _weighted(row, _arranged(stage, spatial), operators.get(stage.name))
                    spatial = ()
                rows.append(row)
        if output_of(stage) in sources:
            kept[output_of(stage)] = exact, seen
    floats = exact.reshape(len(exact), -1).argmax(axis=1)
    integers = _logits(graph, stored).argmax(axis=1)
    return Signals(
        samples=len(labels),
        float_correct=int((floats == labels).sum()),
        correct=int((integers == labels).sum()),
        alike=int((floats == integers).sum()),
        layers=tuple(rows),
    )


def _run(graph: Graph, stored: Int64Array) -> _Deployed:
    resolved = profiles.resolve(graph, profiles.DEFAULT)
    wanted = [op.output for op in resolved.core]
    found = Session(resolved, tensors=wanted, whole=True).run_tensors(stored)
    values: dict[str, FloatArray] = {}
    tensors: dict[str, Tensor] = {}
    for index in wanted:
        tensor = resolved.tensors[index]
        if tensor.quantization is None:
            raise UnsupportedModelError(f"tensor '{tensor.name}' has no scale to compare at")
        levels = found[index].astype(np.float64).reshape(len(stored), -1) - tensor.zero_point
        values[tensor.name] = levels * float(tensor.quantization.scale)
        tensors[tensor.name] = tensor
    return _Deployed(resolved, values, tensors)


def _logits(graph: Graph, stored: Int64Array) -> Int64Array:
    resolved = profiles.resolve(graph, profiles.DEFAULT)
    return Session(resolved, whole=True).run(stored).astype(np.int64).reshape(len(stored), -1)


def _computed(stage: Layer | Sum, x: FloatArray, other: FloatArray) -> FloatArray:
    """A float layer or sum with its ReLU."""
    if isinstance(stage, Layer):
        result = linear(stage, x, stage.weight) + spread(stage, stage.bias)
    else:
        result = x + other
    return result.clip(0, stage.ceiling) if stage.relu else result


def _found(deployed: _Deployed, stage: Layer | Sum, like: FloatArray) -> FloatArray:
    """The deployed output of a stage in the float network's order, without its constant."""
    name = output_of(stage)
    if name not in deployed.values:
        raise DataError(
            f"the model has no tensor '{name}', which the float network has; it was made of "
            f"another network. Its tensors: {', '.join(deployed.values)}"
        )
    values, shape = deployed.values[name], deployed.tensors[name].shape
    if like[0].size != values.shape[1]:
        raise DataError(
            f"layer '{name}' has {counted(values.shape[1], 'output')} in the model and "
            f"{like[0].size} in the float network; it was made of another network, or "
            "its channels were removed"
        )
    if like.ndim == 4:
        values = values.reshape(len(values), *shape[1:]).transpose(0, 3, 1, 2)
    values = values.reshape(like.shape)
    return values if stage.relu else values - (values - like).mean()


def _ratio(signal: FloatArray, found: FloatArray) -> float | None:
    """Decibels; None where nothing differs."""
    noise = float(np.square(signal - found).sum())
    power = float(np.square(signal).sum())
    if noise == 0:
        return None
    return 10 * math.log10(max(power, np.finfo(float).tiny) / noise)


def _arranged(layer: Layer, spatial: tuple[int, ...]) -> FloatArray:
    """Float weights [channels, weights of each] in the order of the integer graph."""
    weight = layer.weight
    if layer.convolution:
        weight = weight.transpose(0, 2, 3, 1)
    elif len(spatial) == 3:
        weight = weight.reshape(-1, *spatial).transpose(0, 2, 3, 1)
    return weight.reshape(len(weight), -1)


def _weighted(row: LayerSignal, real: FloatArray, op: Linear | None) -> LayerSignal:
    """With what the layer's weights have become."""
    if op is None or op.weights.values.size != real.size or op.weights.scale.size == 0:
        return row
    scales = np.broadcast_to(op.weights.scale.astype(np.float64), op.channels)
    largest = np.abs(real).max(axis=1, keepdims=True)
    limit = 2 ** (op.weights.bits - 1) - 1
    step = np.where(largest > 0, largest / limit, 1.0)
    shared = op.weights.scale.size == 1 and op.channels > 1
    return msgspec.structs.replace(
        row,
        bits=op.weights.bits,
        sparsity=1 - np.count_nonzero(op.weights.values) / op.weights.values.size,
        weights=_ratio(real, _by_channel(op) * scales[:, None]),
        shared=shared,
        by_channel=_ratio(real, _rounded(real, step)) if shared else None,
    )


def _rounded(values: FloatArray, step: FloatArray) -> FloatArray:
    return np.rint(values / step) * step


def _by_channel(op: Linear) -> FloatArray:
    """Integer weights [channels, weights of each]."""
    values = op.weights.values.astype(np.float64)
    if isinstance(op, DepthwiseConv2D):
        return values.reshape(-1, op.channels).T
    return values.reshape(op.channels, -1)
