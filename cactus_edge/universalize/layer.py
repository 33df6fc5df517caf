"""One layer with weights, quantized anew for scales at which all rounding profiles agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cactus_edge import universal
from cactus_edge.constraints import validate
from cactus_edge.errors import InvalidGraphError
from cactus_edge.graph import DepthwiseConv2D, Graph, Int8Array, Linear, Weights
from cactus_edge.snap import snap

ScaleBits = npt.NDArray[np.uint32]
FloatArray = npt.NDArray[np.float64]
_LARGEST_BIAS = 2**31 - 1


class Anew:
    """The real weights and biases of a layer, for any weight scales.

    ``graph`` holds the tensors that ``op`` reads and writes; ``real_bias`` float64 [out] is what
    its biases stand for; ``absorbed`` levels of the input are taken away by them. Channels whose
    scale stays keep their integer weights.
    """

    def __init__(self, graph: Graph, op: Linear, real_bias: FloatArray, absorbed: int = 0) -> None:
        """Keep the parts."""
        self._graph, self._op, self._absorbed = graph, op, absorbed
        self._old = op.weights.scale.astype(np.float64)
        self._rows = by_channel(op, op.weights.values)
        self._real = self._rows.astype(np.float64) * self._old[:, None]
        self._bias = real_bias
        self._source, self._target = (scale(graph, index) for index in (op.inputs[0], op.output))
        self._limit = 2 ** (op.weights.bits - 1) - 1

    def made(
        self, scale_bits: ScaleBits, channels: list[int] | None = None
    ) -> tuple[Graph, Linear]:
        """The layer for these scales; with ``channels``, these alone, one scale each."""
        chosen = slice(None) if channels is None else channels
        scales = scale_bits.view(np.float32).astype(np.float64)
        limits = -self._limit, self._limit
        values = np.clip(np.rint(self._real[chosen] / scales[:, None]), *limits).astype(np.int8)
        if channels is None:
            stays = (scales == self._old)[:, None]
            values = np.where(stays, self._rows, values)
        bias = np.rint(self._bias[chosen] / (self._source * scales))
        bias = bias - self._absorbed * values.sum(1, dtype=np.int64)
        bias = np.clip(bias, -_LARGEST_BIAS, _LARGEST_BIAS).astype(np.int32)
        weights = Weights(as_stored(self._op, values), self._op.weights.bits, scale_bits)
        return self._graph, replace(self._op, weights=weights, bias=bias)

    def kept(self) -> Linear:
        """The layer with the scales that it has."""
        return self.made(self._op.weights.scale_bits)[1]

    def moved(self, known: ScaleBits | None = None) -> Linear:
        """The layer with other scales for the channels on which profiles disagree.

        ``known`` are scales that were found before. A channel without a universal scale nearby
        keeps its own.

        Raises:
            InvalidGraphError: a bias or an accumulator leaves its range.
        """
        old, bits = self._old, self._op.weights.scale_bits
        bad = list(universal.disagreeing_channels(*self.made(bits)))
        if known is not None:
            bits = known
        elif bad:
            largest = np.abs(self._real).max(1)
            whole = old.size == 1
            floor = (largest.max(keepdims=True) if whole else largest) / (self._limit + 0.499)
            ratio = self._source / self._target
            if whole:
                bits = snap(self.made, old, floor, ratio).scale_bits
            else:

                def subset(
                    scale_bits: ScaleBits, channels: list[int] | None
                ) -> tuple[Graph, Linear]:
                    return self.made(
                        scale_bits, bad if channels is None else [bad[i] for i in channels]
                    )

                bits = bits.copy()
                bits[bad] = snap(subset, old[bad], floor[bad], ratio).scale_bits
        _, found = self.made(bits)
        validate(Graph(self._graph.tensors, (found,), found.inputs[0], found.output))
        return found


def scale(graph: Graph, tensor: int) -> float:
    """A tensor's scale.

    Raises:
        InvalidGraphError: it has none.
    """
    quantization = graph.tensors[tensor].quantization
    if quantization is None:
        raise InvalidGraphError(f"tensor '{graph.tensors[tensor].name}' has no scale")
    return float(quantization.scale)


def by_channel(op: Linear, values: Int8Array) -> Int8Array:
    """Weights as [out, inputs of a channel]."""
    if isinstance(op, DepthwiseConv2D):
        return values.reshape(-1, values.shape[-1]).T
    return values.reshape(values.shape[0], -1)


def as_stored(op: Linear, rows: Int8Array) -> Int8Array:
    """The inverse of ``by_channel``, for any number of channels."""
    shape = op.weights.values.shape
    if isinstance(op, DepthwiseConv2D):
        return np.ascontiguousarray(rows.T).reshape(*shape[:-1], len(rows))
    return rows.reshape(len(rows), *shape[1:])
