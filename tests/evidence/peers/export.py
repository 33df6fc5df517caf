"""The float network that a verifier of real arithmetic is given: dequantized, nothing else.

Weights are ``integer * scale``, biases ``integer * input scale * weight scale``; a fused RELU stays
a ReLU. There is no rounding and no clamp. Shapes are PyTorch's: images channels first, no batch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.graph import (
    Activation,
    Add,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    Pad,
    Reshape,
    window_geometry,
)

FloatArray = npt.NDArray[np.float64]
Borders = tuple[tuple[int, int], tuple[int, int]]
"""Zeros (before, after) along height and width."""


@dataclass
class Exported:
    """``nodes`` in execution order, as JSON; ``arrays`` hold each node's weights and bias."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)


def scale(graph: Graph, tensor: int) -> float:
    """The activation's scale."""
    quantization = graph.tensors[tensor].quantization
    assert quantization is not None
    return float(quantization.scale)


def real(graph: Graph, stored: Int64Array, *, channels_first: bool = True) -> FloatArray:
    """Stored inputs [n, ...] as the real numbers they stand for."""
    values = (stored - graph.tensors[graph.core_input].zero_point) * scale(graph, graph.core_input)
    return np.moveaxis(values, -1, 1) if values.ndim == 4 and channels_first else values


def export(graph: Graph) -> Exported:
    """The dequantized network up to the logits.

    Raises:
        UnsupportedModelError: an operator that is not written here.
    """
    found = Exported()
    padded: dict[int, tuple[int, Borders]] = {}
    images: dict[int, tuple[int, ...]] = {
        i: tensor.shape[1:] for i, tensor in enumerate(graph.tensors) if len(tensor.shape) == 4
    }
    for op in graph.core:
        match op:
            case Pad():
                padded[op.output] = (op.inputs[0], (op.paddings[1], op.paddings[2]))
            case Reshape() if len(graph.tensors[op.output].shape) == 2:
                if op.inputs[0] in images:
                    images[op.output] = images[op.inputs[0]]
                found.nodes.append({"kind": "flatten", "inputs": op.inputs, "output": op.output})
            case Add():
                relu = op.activation is Activation.RELU
                node = {"kind": "add", "inputs": op.inputs, "output": op.output, "relu": relu}
                found.nodes.append(node)
            case Conv2D():
                _convolution(graph, op, padded, found)
            case FullyConnected():
                _dense(graph, op, images.get(op.inputs[0]), found)
            case _:
                raise UnsupportedModelError(f"{op.kind} '{op.name}' has no float form here")
    return found


def _add(
    graph: Graph, op: Linear, weights: FloatArray, node: dict[str, Any], found: Exported
) -> None:
    """``weights`` [out, ...] are the integers in PyTorch's layout."""
    if op.activation is Activation.RELU6:
        raise UnsupportedModelError(f"{op.kind} '{op.name}': RELU6 has no float form here")
    node["name"] = f"node{op.output}"
    node["output"] = op.output
    node["relu"] = op.activation is Activation.RELU
    weight_scale = np.broadcast_to(op.weights.scale.astype(np.float64), op.bias.shape)
    spread = weight_scale.reshape(-1, *(1 for _ in weights.shape[1:]))
    bias = op.bias * weight_scale * scale(graph, op.inputs[0])
    found.arrays[f"{node['name']}.weight"] = (weights * spread).astype(np.float32)
    found.arrays[f"{node['name']}.bias"] = bias.astype(np.float32)
    found.nodes.append(node)


def _dense(
    graph: Graph, op: FullyConnected, image: tuple[int, ...] | None, found: Exported
) -> None:
    weights = op.weights.values.astype(np.float64)
    if image is not None:  # flattened height, width, channels; PyTorch flattens channels first
        weights = weights.reshape(-1, *image).transpose(0, 3, 1, 2).reshape(len(weights), -1)
    node = {"kind": "dense", "inputs": op.inputs}
    _add(graph, op, weights, node, found)


def _convolution(
    graph: Graph, op: Conv2D, padded: Mapping[int, tuple[int, Borders]], found: Exported
) -> None:
    depthwise = isinstance(op, DepthwiseConv2D)
    values = op.weights.values.astype(np.float64)
    weights = values.transpose(3, 0, 1, 2) if depthwise else values.transpose(0, 3, 1, 2)
    if op.dilation != (1, 1):
        raise UnsupportedModelError(f"{op.kind} '{op.name}': dilation has no float form here")
    source, outer = padded.get(op.inputs[0], (op.inputs[0], ((0, 0), (0, 0))))
    shape = graph.tensors[op.inputs[0]].shape
    padding: list[int] = []
    for axis in (0, 1):
        kernel, stride = weights.shape[2 + axis], op.stride[axis]
        _, before, after = window_geometry(shape[1 + axis], kernel, stride, 1, op.padding)
        before, after = before + outer[axis][0], after + outer[axis][1]
        # Verifiers know symmetric padding only: taps of weight 0 make up the difference.
        taps = [(0, 0)] * 4
        taps[2 + axis] = (max(after - before, 0), max(before - after, 0))
        weights = np.pad(weights, taps)
        padding.append(max(before, after))
    groups = graph.tensors[op.inputs[0]].shape[3] if depthwise else 1
    node = {
        "kind": "convolution",
        "inputs": (source,),
        "stride": op.stride,
        "padding": padding,
        "groups": groups,
    }
    _add(graph, op, weights, node, found)


def encode(graph: Graph, lower: FloatArray, upper: FloatArray, labels: Int64Array) -> bytes:
    """Network and boxes [n, ...] of real inputs, channels first, as the bytes of an ``.npz``."""
    exported = export(graph)
    head = {"nodes": exported.nodes, "input": graph.core_input, "output": graph.logits}
    stream = io.BytesIO()
    np.savez(
        stream,
        head=np.frombuffer(json.dumps(head).encode(), np.uint8),
        lower=lower.astype(np.float32),
        upper=upper.astype(np.float32),
        labels=labels,
        **exported.arrays,
    )
    return stream.getvalue()
