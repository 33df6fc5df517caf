"""Scales of a finished model moved to where every rounding profile agrees.

Each layer with weights keeps its input, its output and, as well as its width allows, its real
weights: they are quantized anew for a scale nearby at which all profiles step at the same
accumulators (see ``snap``), and so is the bias. Channels on which all agree already stay as they
are. The layer of the logits gets the least zero point, and its bias takes the difference over, so
that logits keep their stored integers but for rounding. What goes below its zero point elsewhere,
or has no weights (an ADD of two scales, a table), mostly cannot be moved and is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cactus_edge import decision, files, flatbuffer, inputs, universal
from cactus_edge.constraints import validate
from cactus_edge.datasets import Dataset
from cactus_edge.errors import InvalidGraphError
from cactus_edge.graph import Activation, DepthwiseConv2D, Graph, Int8Array, Linear, Weights
from cactus_edge.operators import Mean
from cactus_edge.runtime import Session
from cactus_edge.snap import snap

__all__ = ["MovedLayer", "Universalized", "make_universal", "universalize"]

ScaleBits = npt.NDArray[np.uint32]
FloatArray = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]
_LARGEST_BIAS = 2**31 - 1
_BATCH = 500


class MovedLayer(msgspec.Struct, frozen=True):
    """A layer on which profiles disagreed.

    Attributes:
        name: of the operator.
        kind: of the operator.
        channels: that it has.
        moved: channels whose scale was moved, or 1 of 1 where they share one.
        median_change: of the moved scales, relative.
        largest_change: of the moved scales, relative.
        weights_changed: share of the layer's stored weights that are other integers now.
        remaining: channels on which profiles still disagree.
    """

    name: str
    kind: str
    channels: int
    moved: int
    median_change: float
    largest_change: float
    weights_changed: float
    remaining: int


class Universalized(msgspec.Struct, frozen=True):
    """What was moved, and what it cost.

    Attributes:
        universal: whether all profiles agree now.
        layers: those on which they did not agree before.
        samples: of the comparison; 0 without data.
        correct_before: samples that the model classified correctly, under the default profile.
        correct_after: the same of the new model.
        decisions_changed: samples on which the two models decide differently.
        bytes: of the new file.
        sha256: of the new file.
    """

    universal: bool
    layers: tuple[MovedLayer, ...]
    samples: int = 0
    correct_before: int = 0
    correct_after: int = 0
    decisions_changed: int = 0
    bytes: int = 0
    sha256: str = ""


def universalize(
    graph: Graph, progress: Progress | None = None
) -> tuple[Graph, tuple[MovedLayer, ...]]:
    """The graph with moved scales, and a report of every layer on which profiles disagreed.

    Args:
        graph: as read from a file.
        progress: called with (operators done, operators in all).

    Raises:
        InvalidGraphError: the graph breaks a constraint.
    """
    given, operators = graph, list(graph.operators)
    layers: list[MovedLayer] = []
    for index, op in enumerate(given.operators):
        if progress:
            progress(index, len(given.operators))
        if not isinstance(op, Linear) or isinstance(op, Mean) or op.requantization is not None:
            continue
        bad = list(universal.disagreeing_channels(graph, op))
        if not bad:
            continue
        levels = 0
        if op.output == graph.logits and op.activation is Activation.NONE and op.clamp is None:
            graph, levels = _lowest(graph)
        moved, change = _moved(graph, op, bad, levels)
        operators[index] = moved
        left = universal.disagreeing_channels(graph, moved)
        changed = moved.weights.values != op.weights.values
        shifts = change[change != 0]
        layers.append(
            MovedLayer(
                name=op.name,
                kind=op.kind,
                channels=op.channels,
                moved=int(shifts.size),
                median_change=float(np.median(shifts)) if shifts.size else 0.0,
                largest_change=float(shifts.max(initial=0.0)),
                weights_changed=float(changed.mean()),
                remaining=len(left),
            )
        )
    if progress:
        progress(len(operators), len(operators))
    result = replace(graph, operators=tuple(operators))
    validate(result)
    known = {layer.name for layer in layers}
    for entry in universal.agreement(result):
        if entry.disagreeing and entry.name not in known:
            kind = next(op.kind for op in result.core if op.name == entry.name)
            count = len(entry.disagreeing)
            layers.append(MovedLayer(entry.name, kind, entry.channels, 0, 0.0, 0.0, 0.0, count))
    return result, tuple(layers)


def make_universal(
    model: Path,
    output: Path,
    data: Dataset | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Universalized:
    """Write a ``.tflite`` with moved scales, and compare both on samples.

    Raises:
        OutputError: ``output`` exists, or cannot be written.
        UnsupportedModelError: the model cannot be read.
    """
    files.refuse_existing(output, force)
    graph, _ = flatbuffer.load(model)
    moved, layers = universalize(graph, progress)
    content = flatbuffer.save(moved, output, force)
    report = Universalized(
        universal=universal.is_universal(moved),
        layers=layers,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    if data is None:
        return report
    before, after = (_decisions(g, data) for g in (graph, moved))
    return msgspec.structs.replace(
        report,
        samples=len(data.labels),
        correct_before=int((before == data.labels).sum()),
        correct_after=int((after == data.labels).sum()),
        decisions_changed=int((before != after).sum()),
    )


def _decisions(graph: Graph, data: Dataset) -> npt.NDArray[np.int64]:
    session = Session(graph)
    found: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(data.labels), _BATCH):
        stored = inputs.stored(graph, data.images[start : start + _BATCH])
        logits = session.run(stored).reshape(len(stored), -1).astype(np.int64)
        found.append(decision.predict(logits))
    return np.concatenate(found)


def _lowest(graph: Graph) -> tuple[Graph, int]:
    """The graph with the least zero point for its logits, and by how many levels that is less.

    Where each level begins is proved for outputs that do not go below their zero point (``snap``).
    """
    tensor = graph.tensors[graph.logits]
    quantization = tensor.quantization
    if quantization is None:
        return graph, 0
    least = tensor.dtype.range[0]
    lowered = replace(tensor, quantization=replace(quantization, zero_point=least))
    tensors = tuple(lowered if t is tensor else t for t in graph.tensors)
    return replace(graph, tensors=tensors), quantization.zero_point - least


def _moved(graph: Graph, op: Linear, bad: list[int], levels: int) -> tuple[Linear, FloatArray]:
    """``op`` with other scales for its ``bad`` channels, and the relative change of each scale.

    ``levels`` are added to all outputs, by way of the biases.
    """
    bad = list(range(op.channels)) if levels else bad
    old = op.weights.scale.astype(np.float64)
    source, target = (_scale(graph, index) for index in (op.inputs[0], op.output))
    rows = _by_channel(op, op.weights.values).astype(np.float64)
    limit = 2 ** (op.weights.bits - 1) - 1
    whole = old.size == 1
    real = rows * old[:, None]
    real_bias = op.bias * source * old + levels * target

    def made(scale_bits: ScaleBits, channels: list[int] | None) -> tuple[Graph, Linear]:
        chosen = slice(None) if channels is None else channels
        scale = scale_bits.view(np.float32).astype(np.float64)
        values = np.clip(np.rint(real[chosen] / scale[:, None]), -limit, limit).astype(np.int8)
        bias = np.clip(np.rint(real_bias[chosen] / (source * scale)), -_LARGEST_BIAS, _LARGEST_BIAS)
        weights = Weights(_as_stored(op, values), op.weights.bits, scale_bits)
        changed = replace(op, weights=weights, bias=bias.astype(np.int32))
        return graph, changed

    def subset(scale_bits: ScaleBits, channels: list[int] | None) -> tuple[Graph, Linear]:
        return made(scale_bits, bad if channels is None else [bad[i] for i in channels])

    largest = np.abs(real).max(1)
    floor = (largest.max(keepdims=True) if whole else largest) / (limit + 0.499)
    if whole:
        snapped = snap(made, old, floor, source / target)
        scale_bits = snapped.scale_bits
    else:
        snapped = snap(subset, old[bad], floor[bad], source / target)
        scale_bits = op.weights.scale_bits.copy()
        scale_bits[bad] = snapped.scale_bits
    try:
        _, moved = made(scale_bits, None)
        validate(Graph(graph.tensors, (moved,), op.inputs[0], op.output))
    except InvalidGraphError:
        if levels:  # the biases have to take the zero point over
            raise
        return op, np.zeros(old.size)
    change = np.abs(moved.weights.scale.astype(np.float64) / old - 1)
    # What did not move keeps its integers, whatever rounding would make of them.
    kept = np.flatnonzero(change == 0)
    if not (whole or levels):
        values, bias = _by_channel(op, moved.weights.values).copy(), moved.bias.copy()
        values[kept], bias[kept] = rows[kept].astype(np.int8), op.bias[kept]
        weights = Weights(_as_stored(op, values), op.weights.bits, scale_bits)
        moved = replace(moved, weights=weights, bias=bias)
    return moved, change


def _scale(graph: Graph, tensor: int) -> float:
    quantization = graph.tensors[tensor].quantization
    if quantization is None:
        raise InvalidGraphError(f"tensor '{graph.tensors[tensor].name}' has no scale")
    return float(quantization.scale)


def _by_channel(op: Linear, values: Int8Array) -> Int8Array:
    """Weights as [out, inputs of a channel]."""
    if isinstance(op, DepthwiseConv2D):
        return values.reshape(-1, values.shape[-1]).T
    return values.reshape(values.shape[0], -1)


def _as_stored(op: Linear, rows: Int8Array) -> Int8Array:
    """The inverse of ``_by_channel``, for any number of channels."""
    shape = op.weights.values.shape
    if isinstance(op, DepthwiseConv2D):
        return np.ascontiguousarray(rows.T).reshape(*shape[:-1], len(rows))
    return rows.reshape(len(rows), *shape[1:])
