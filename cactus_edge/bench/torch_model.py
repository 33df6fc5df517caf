"""The integers of a graph in torch's quantized operators.

torch is handed in by the caller, since it is one peer among others here. Activations are unsigned
bytes in channels-last memory, weights int8 with a scale for each channel; int4 weights become int8
of the same value. The number of threads and the engine are settings of the whole process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_edge.errors import ToolError
from cactus_edge.flow import Edge, Layer, Pool, Step, Sum, byte_offset, flow
from cactus_edge.graph import Graph

Array = npt.NDArray[np.generic]
Apply = Callable[[dict[int, Any]], Any]


class Network:
    """Packed layers, run one after the other."""

    def __init__(self, torch: ModuleType, graph: Graph, engine: str, threads: int) -> None:
        """Pack.

        Raises:
            ToolError: something has no form in torch, or the engine refuses it.
        """
        self._torch: Any = torch
        self._graph = graph
        torch.set_num_threads(threads)
        torch.backends.quantized.engine = engine
        steps = flow(graph, channels_first=False)
        self._source, self._target = steps.source, steps.target
        try:
            # A peer of today is measured as it is, whatever its later releases will drop.
            with warnings.catch_warnings(action="ignore"):
                self._steps = [(step.target.index, self._apply(step)) for step in steps.steps]
        except RuntimeError as error:
            raise ToolError(f"torch's engine '{engine}' refuses a layer: {error}") from None

    def prepare(self, stored: Array) -> Any:
        """Stored images [n, ...] as a quantized tensor."""
        dtype = self._graph.tensors[self._graph.core_input].dtype
        values = (stored.astype(np.int16) + byte_offset(dtype)).astype(np.uint8)
        tensor = self._torch.from_numpy(values)
        tensor = tensor.permute(0, 3, 1, 2) if len(self._source.shape) == 3 else tensor.flatten(1)
        with warnings.catch_warnings(action="ignore"):
            return self._torch._make_per_tensor_quantized_tensor(
                tensor, self._source.scale, self._source.zero
            )

    def run(self, images: Any) -> Array:
        """Bytes of logits, uint8 [n, classes]."""
        values = {self._source.index: images}
        with self._torch.inference_mode():
            for target, apply in self._steps:
                values[target] = apply(values)
            return values[self._target.index].int_repr().numpy()

    def finish(self, output: Array) -> Array:
        """Bytes of logits, channels first where they have height and width, as stored integers."""
        tensor = self._graph.tensors[self._graph.logits]
        values = np.moveaxis(output, 1, 3) if output.ndim == 4 else output
        values = values.astype(np.int16) - byte_offset(tensor.dtype)
        return values.astype(tensor.dtype.value).reshape(len(output), *tensor.shape[1:])

    def _apply(self, step: Step) -> Apply:
        match step:
            case Layer():
                return self._layer(step)
            case Pool():
                return self._pool(step)
            case Sum():
                return self._sum(step)

    def _layer(self, layer: Layer) -> Apply:
        torch, target = self._torch, layer.target
        relu = _is_relu(layer.limits, target)
        weights = torch._make_per_channel_quantized_tensor(
            torch.from_numpy(layer.weights.copy()),
            torch.from_numpy(layer.scales.astype(np.float64)),
            torch.zeros(len(layer.scales), dtype=torch.int64),
            0,
        )
        # The integers times their scale; torch rounds the quotient back to the same integers.
        bias = torch.from_numpy(
            (layer.bias * layer.scales.astype(np.float64) * layer.source.scale).astype(np.float32)
        )
        ops, index = torch.ops.quantized, layer.source.index
        if layer.weights.ndim == 2:
            packed = ops.linear_prepack(weights, bias)
            run = ops.linear_relu if relu else ops.linear
            if layer.flatten:
                return lambda v: run(
                    v[index].permute(0, 2, 3, 1).flatten(1), packed, target.scale, target.zero
                )
            return lambda v: run(v[index], packed, target.scale, target.zero)
        top, left, bottom, right = layer.pads
        if (top, left) != (bottom, right):
            raise ToolError("torch's quantized convolutions pad both sides alike")
        packed = ops.conv2d_prepack(
            weights.contiguous(memory_format=torch.channels_last),
            bias,
            list(layer.stride),
            [top, left],
            list(layer.dilation),
            layer.groups,
        )
        run = ops.conv2d_relu if relu else ops.conv2d
        if len(target.shape) == 1:
            return lambda v: run(v[index], packed, target.scale, target.zero).flatten(1)
        return lambda v: run(v[index], packed, target.scale, target.zero)

    def _pool(self, pool: Pool) -> Apply:
        functional, index = self._torch.nn.functional, pool.source.index
        top, left, bottom, right = pool.pads
        if (top, left) != (bottom, right):
            raise ToolError("torch's pools pad both sides alike")
        window, stride, pads = list(pool.window), list(pool.stride), [top, left]
        last = 1 if len(pool.target.shape) == 1 else -1  # one pixel loses its height and width
        if pool.average:
            return lambda v: functional.avg_pool2d(
                v[index], window, stride, pads, count_include_pad=False
            ).flatten(last)
        return lambda v: functional.max_pool2d(v[index], window, stride, pads).flatten(last)

    def _sum(self, step: Sum) -> Apply:
        target, ops = step.target, self._torch.ops.quantized
        first, second = (edge.index for edge in step.sources)
        run = ops.add_relu if _is_relu(step.limits, target) else ops.add
        return lambda v: run(v[first], v[second], target.scale, target.zero)


def _is_relu(limits: tuple[int, int] | None, target: Edge) -> bool:
    """Whether a ReLU does what the clamp does.

    Raises:
        ToolError: it does not, and something must.
    """
    if limits is None:
        return False
    if limits == (target.zero, 255):
        return True
    raise ToolError(f"torch has no clamp to {limits[0]} to {limits[1]}")
