"""Layer by layer, the integer graph against the fake-quantized float network.

Each float layer is fed the integer graph's own input to that layer, so errors do not add up: what
is left is the rounding of the bias and of the last bit, one step at most. A wrong permutation,
padding or scale shows as a large difference in the layer where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cactus_edge.errors import ToolError
from cactus_edge.execute import execute_all
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.lowering.stages import FloatArray, linear, spread

if TYPE_CHECKING:
    from cactus_edge.lowering.assembly import Shadow


class LayerDifference(msgspec.Struct, frozen=True):
    """``largest`` difference in output steps, and the ``share`` of elements that differ at all."""

    layer: str
    largest: int
    share: float


def shadow_check(
    graph: Graph, shadows: Sequence[Shadow], images: FloatArray
) -> list[LayerDifference]:
    """Compare every weighted layer on ``images`` [N, C, H, W] or [N, F] in [0, 1].

    Raises:
        ToolError: a layer differs by more than one step.
    """
    pixels = images.transpose(0, 2, 3, 1) if images.ndim == 4 else images
    stored = np.rint(pixels * 255).astype(np.int64) - 128
    values = execute_all(graph, stored)
    differences = [_compare(graph, shadow, values) for shadow in shadows]
    worst = max(differences, key=lambda d: d.largest)
    if worst.largest > 1:
        raise ToolError(
            f"layer '{worst.layer}': the integer graph differs from the fake-quantized network by "
            f"{worst.largest} steps; this is a defect of the conversion, please report it"
        )
    return differences


def _compare(graph: Graph, shadow: Shadow, values: dict[int, Int64Array]) -> LayerDifference:
    source, target = graph.tensors[shadow.source], graph.tensors[shadow.target]
    assert source.quantization is not None
    assert target.quantization is not None
    layer = shadow.layer
    levels = values[shadow.source] - source.zero_point - shadow.offset
    real = levels * float(source.quantization.scale)
    if layer.convolution:
        output = linear(layer, real.transpose(0, 3, 1, 2), layer.weight)
        output = (output + spread(layer, layer.bias)).transpose(0, 2, 3, 1)
    else:
        # Behind a flatten the integers are NHWC, the float weights NCHW.
        flat = _channels_first(graph, shadow, real.reshape(len(real), -1))
        output = linear(layer, flat, layer.weight) + layer.bias
    output = output + shadow.shift
    if layer.relu:
        output = np.maximum(output, 0)
    steps = np.rint(output / float(target.quantization.scale)) + target.zero_point
    expected = steps.clip(*target.dtype.range).astype(np.int64)
    difference = np.abs(expected.reshape(len(expected), -1) - _flat(values[shadow.target]))
    return LayerDifference(layer.name, int(difference.max()), float((difference > 0).mean()))


def _flat(array: Int64Array) -> Int64Array:
    return array.reshape(len(array), -1)


def _channels_first(graph: Graph, shadow: Shadow, flat: FloatArray) -> FloatArray:
    """Undo NHWC when the tensor was an image before RESHAPEs led to it."""
    tensor = shadow.source
    producers = {op.output: op for op in graph.core}
    while tensor in producers and producers[tensor].kind == "RESHAPE":
        tensor = producers[tensor].inputs[0]
    shape = graph.tensors[tensor].shape
    if len(shape) != 4:
        return flat
    return flat.reshape(-1, *shape[1:]).transpose(0, 3, 1, 2).reshape(len(flat), -1)
