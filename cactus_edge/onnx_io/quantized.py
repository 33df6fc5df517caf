"""QDQ and QLinear ONNX files as integer graphs, where ONNX Runtime's integers are known.

ONNX Runtime fuses DequantizeLinear, an operator and QuantizeLinear. Its fused convolutions and
linear layers compute ``FLOAT32`` with a factor formed from left to right, as the profiles
``litert-xnnpack-*`` do; maxima and what moves elements round nothing. Sums are rounded in float32,
which is known where no sum comes near a half. Those are read, everything else is refused by name.
Unsigned activations become signed ones by 128, which changes no product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cactus_edge.graph import (
    Activation,
    Add,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    MaxPool2D,
    Operator,
    Pad,
    Padding,
    Quantization,
    Reshape,
    Tensor,
    Weights,
    window_geometry,
)
from cactus_edge.lowering.stages import NO_PADS, Pads
from cactus_edge.onnx_io.reading import Array, File, Node, fitting, fold
from cactus_edge.onnx_io.spelled import spelled_out
from cactus_edge.onnx_io.windows import windows


@dataclass(frozen=True, eq=False)
class _Stored:
    """A quantized activation: a tensor of the graph, NHWC or [1, features].

    ``order`` is None, or where each feature of a flattened image is in the tensor.
    """

    tensor: int
    order: Int64Array | None = None


@dataclass(frozen=True, eq=False)
class _Constant:
    """Integers and what they stand for: ``scale`` float32, one for each index of ``axis``."""

    values: Array
    scale: Array
    axis: int


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a QuantizeLinear will make an operator of; ``other`` is the second operand of a sum."""

    node: Node
    source: _Stored
    relu: bool = False
    other: _Stored | None = None


def is_quantized(file: File) -> bool:
    """Whether the file has quantized activations."""
    return any(node.kind == "QuantizeLinear" for node in file.nodes)


def translate(file: File) -> Graph:
    """The integer graph of a QDQ file, without metadata.

    Raises:
        UnsupportedModelError: something whose integers are not known; named, with what to do.
    """
    file = spelled_out(file)
    reader = _Reader(file)
    for node in file.nodes:
        with fitting(node):
            reader.node(node)
    return reader.finish()


def near_halves(tensors: Sequence[Tensor]) -> int:
    """How many of all pairs of two operands have a sum that float32 arithmetic could round wrongly.

    ``tensors`` are both operands and the sum. Scale ratios, products and sums are rounded a few
    times each; eight units of the largest intermediate are more than that.
    """
    one, two, total = (tensor.quantization for tensor in tensors)
    assert one and two and total
    ratios = [float(end.scale) / float(total.scale) for end in (one, two)]
    levels = np.arange(-128, 128)
    terms = [r * (levels - end.zero_point) for r, end in zip(ratios, (one, two), strict=True)]
    sums = terms[0][:, None] + terms[1][None, :]
    largest = 255 * sum(ratios) * 2 + 256
    distance = np.abs(sums - np.floor(sums) - 0.5)
    inside = (sums + total.zero_point > -130) & (sums + total.zero_point < 129)
    return int((inside & (distance < 8 * largest * 2.0**-24)).sum())


class _Reader:
    def __init__(self, file: File) -> None:
        self._file = file
        self._constants: dict[str, Array] = dict(file.constants)
        self._real: dict[str, _Constant | _Stored | _Layer] = {}
        self._stored: dict[str, _Stored] = {}
        self._tensors: list[Tensor] = []
        self._operators: list[Operator] = []

    def node(self, node: Node) -> None:
        """One node."""
        first = node.inputs[0] if node.inputs else ""
        if node.kind == "DequantizeLinear":
            self._dequantize(node)
        elif all(name in self._constants for name in node.inputs if name):
            values = fold(self._file, node, self._constants)
            self._constants.update(zip(node.outputs, values, strict=False))
        elif node.kind == "QuantizeLinear":
            self._quantize(node)
        elif node.kind in ("Conv", "Gemm", "MatMul"):
            source = self._real.get(first)
            if not isinstance(source, _Stored):
                raise node.error("its input is not dequantized", "quantize every activation")
            self._real[node.output] = _Layer(node, source)
        elif node.kind == "Add":
            pair = [self._real.get(name) for name in node.inputs]
            one, two = pair
            if not isinstance(one, _Stored) or not isinstance(two, _Stored):
                raise node.error("only sums of two quantized activations are read")
            self._real[node.output] = _Layer(node, one, other=two)
        elif node.kind == "Relu" and isinstance(layer := self._real.get(first), _Layer):
            self._real[node.output] = replace(layer, relu=True)
        elif node.kind in ("MaxPool", "Flatten", "Reshape"):
            made = self._maximum if node.kind == "MaxPool" else self._flat
            held: Any = self._stored if first in self._stored else self._real
            source = held.get(first)
            if not isinstance(source, _Stored):
                raise node.error("its input is not quantized", "quantize every activation")
            held[node.output] = made(node, source)
        else:
            raise node.error(
                "no profile describes how ONNX Runtime computes it in integers",
                "known are Conv, Gemm, MatMul, Add, Relu, MaxPool, Flatten and Reshape between "
                "DequantizeLinear and QuantizeLinear, QLinearConv, QLinearMatMul, QGemm and "
                "QLinearAdd; import the float original",
            )

    def finish(self) -> Graph:
        """The graph up to the last quantized activation."""
        file = self._file
        last = self._real.get(file.output, self._stored.get(file.output))
        if not isinstance(last, _Stored) or not self._operators:
            raise file.nodes[-1].error("the output is not a quantized activation of a layer")
        if last.order is not None or last.tensor != self._operators[-1].output:
            raise file.nodes[-1].error("the output is a moved image", "logits are one vector")
        return Graph(tuple(self._tensors), tuple(self._operators), 0, last.tensor)

    # Scales.

    def _parameters(self, node: Node) -> tuple[Array, Array]:
        """Scale float32 and zero point of a QuantizeLinear or DequantizeLinear."""
        for position in (1, 2):
            name = node.inputs[position] if position < len(node.inputs) else ""
            if not name or name not in self._constants:
                raise node.error("scale and zero point must be constants, both given")
        scale, zero = (self._constants[node.inputs[i]] for i in (1, 2))
        if scale.dtype != np.float32 or not (np.isfinite(scale) & (scale > 0)).all():
            raise node.error(f"its scale is {scale.dtype}, or not positive")
        return scale, zero

    def _quantization(self, node: Node) -> Quantization:
        scale, zero = self._parameters(node)
        if scale.size != 1 or zero.size != 1 or zero.dtype.name not in ("uint8", "int8"):
            raise node.error("activations have one scale and a zero point of 8 bits")
        return Quantization.of(scale.item(), int(zero.item()) - 128 * (zero.dtype == np.uint8))

    def _dequantize(self, node: Node) -> None:
        first = node.inputs[0]
        if first in self._stored:
            stored = self._stored[first]
            if self._tensors[stored.tensor].quantization != self._quantization(node):
                raise node.error("it dequantizes with another scale than was quantized with")
            self._real[node.output] = stored
            return
        if first not in self._constants:
            raise node.error(f"input '{first}' is neither quantized nor a constant")
        scale, zero = self._parameters(node)
        values = self._constants[first].astype(np.int64)
        shifted = 128 * (zero.dtype == np.uint8)
        if (zero.astype(np.int64) != shifted).any():
            raise node.error("weights have a zero point", "quantize weights symmetrically")
        self._real[node.output] = _Constant(values - shifted, scale.ravel(), node.get("axis", 1))

    def _quantize(self, node: Node) -> None:
        first, quantization = node.inputs[0], self._quantization(node)
        made = self._real.get(first)
        if first == self._file.input:
            if self._tensors:
                raise node.error("the input is quantized twice")
            shape = self._file.shape
            shape = (1, *shape[2:], shape[1]) if len(shape) == 4 else shape
            self._stored[node.output] = self._append(
                Tensor("input", shape, quantization=quantization)
            )
        elif isinstance(made, _Layer):
            make = self._linear if made.other is None else self._sum
            self._stored[node.output] = make(made, node, quantization)
        elif isinstance(made, _Stored):
            if self._tensors[made.tensor].quantization != quantization:
                raise node.error("it changes the scale, which rounds", "keep the scale there")
            self._stored[node.output] = made
        else:
            raise node.error("what it quantizes was not dequantized")

    def _append(self, tensor: Tensor) -> _Stored:
        self._tensors.append(tensor)
        return _Stored(len(self._tensors) - 1)

    # Operators.

    def _constant(self, node: Node, position: int) -> _Constant:
        made = self._real.get(node.inputs[position])
        if not isinstance(made, _Constant):
            raise node.error(
                f"input '{node.inputs[position]}' is not a dequantized constant",
                "quantize weights and biases",
            )
        return made

    def _linear(self, layer: _Layer, target: Node, quantization: Quantization) -> _Stored:
        node, convolution = layer.node, layer.node.kind == "Conv"
        weights = self._constant(node, 1)
        transposed = node.kind == "MatMul" or (node.kind == "Gemm" and not node.get("transB", 0))
        values = weights.values.T if transposed else weights.values
        if values.ndim != (4 if convolution else 2):
            raise node.error(f"weights {list(values.shape)}")
        if {node.get("alpha", 1.0), node.get("beta", 1.0)} != {1.0} or node.get("transA", 0):
            raise node.error("alpha, beta and transA must be left out")
        axis = weights.axis % values.ndim if weights.scale.size > 1 else None
        if axis not in (None, 1 if transposed else 0) or np.abs(values).max() > 128:
            raise node.error("weights are int8 with scales for output channels")
        if values.max() > 127:
            raise node.error("weights reach beyond int8")
        bias = self._bias(layer, weights, len(values))
        bits = weights.scale.astype(np.float32).view(np.uint32)
        activation = Activation.RELU if layer.relu else Activation.NONE
        common: dict[str, Any] = {"name": node.name, "bias": bias, "activation": activation}
        made = self._convolution if convolution else self._dense
        operator, shape = made(layer, values, bits, common)
        self._operators.append(operator)
        return self._append(Tensor(target.output, shape, quantization=quantization))

    def _sum(self, layer: _Layer, target: Node, quantization: Quantization) -> _Stored:
        """ADD, where ONNX Runtime's float32 sums and the profile's round every pair alike."""
        assert layer.other is not None
        ends = [layer.source.tensor, layer.other.tensor]
        shapes = {self._tensors[index].shape for index in ends}
        if len(shapes) > 1 or layer.source.order is not None or layer.other.order is not None:
            raise layer.node.error("its operands are not of one shape, channels last")
        activation = Activation.RELU if layer.relu else Activation.NONE
        operator = Add(
            name=layer.node.name, inputs=(ends[0], ends[1]), output=len(self._tensors),
            activation=activation,
        )  # fmt: skip
        made = self._append(Tensor(target.output, shapes.pop(), quantization=quantization))
        self._operators.append(operator)
        tensors = [self._tensors[index] for index in (*ends, made.tensor)]
        if near := near_halves(tensors):
            raise layer.node.error(
                f"{near} of 65,536 sums come so close to a half that ONNX Runtime's float "
                "arithmetic decides",
                "give both operands one scale and the sum an odd multiple of it, or import the "
                "float original",
            )
        return made

    def _bias(self, layer: _Layer, weights: _Constant, channels: int) -> Int64Array:
        node = layer.node
        if len(node.inputs) < 3 or not node.inputs[2]:
            return np.zeros(channels, np.int64)
        bias, source = self._constant(node, 2), self._tensors[layer.source.tensor].quantization
        assert source is not None
        expected = source.scale * weights.scale.astype(np.float32)
        if bias.values.size != channels or not np.allclose(bias.scale, expected, rtol=1e-6, atol=0):
            raise node.error("its bias is not stored at input scale times weight scale")
        return bias.values.ravel()

    def _convolution(
        self, layer: _Layer, values: Array, bits: Array, common: Mapping[str, Any]
    ) -> tuple[Operator, tuple[int, ...]]:
        node, seen = layer.node, self._tensors[layer.source.tensor]
        if layer.source.order is not None or len(seen.shape) != 4:
            raise node.error("its input is no image")
        channels, groups, out = seen.shape[3], node.get("group", 1), len(values)
        if groups not in (1, channels) or values.shape[1] * groups != channels or out % groups:
            raise node.error(f"{groups} groups on {channels} channels")
        stride, dilation = node.get("strides", (1, 1)), node.get("dilations", (1, 1))
        kernel = (values.shape[2], values.shape[3])
        extents = (seen.shape[1], seen.shape[2])
        pads, sizes = windows(node, extents, kernel, stride, dilation, NO_PADS)
        source, padding = self._padded(layer, pads, kernel, stride, dilation)
        depthwise = groups > 1
        ordered = values.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
        kind = DepthwiseConv2D if depthwise else Conv2D
        operator = kind(
            **common, inputs=(source,), output=len(self._tensors), stride=stride,
            dilation=dilation, padding=padding, weights=Weights(ordered, 8, bits),
        )  # fmt: skip
        return operator, (1, *sizes, out)

    def _padded(
        self,
        layer: _Layer,
        pads: Pads,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        dilation: tuple[int, int],
    ) -> tuple[int, Padding]:
        source = layer.source.tensor
        if pads == NO_PADS:
            return source, Padding.VALID
        seen = self._tensors[source]
        paddings = ((0, 0), *pads, (0, 0))
        shape = tuple(e + sum(pair) for e, pair in zip(seen.shape, paddings, strict=True))
        same = tuple(
            window_geometry(seen.shape[1 + a], kernel[a], stride[a], dilation[a], Padding.SAME)
            for a in (0, 1)
        )
        if all(
            (before, after) == pair for (_, before, after), pair in zip(same, pads, strict=True)
        ):
            return source, Padding.SAME
        name, output = f"{layer.node.name}/pad", len(self._tensors)
        self._operators.append(Pad(name=name, inputs=(source,), output=output, paddings=paddings))
        return self._append(replace(seen, name=name, shape=shape)).tensor, Padding.VALID

    def _dense(
        self, layer: _Layer, values: Array, bits: Array, common: Mapping[str, Any]
    ) -> tuple[Operator, tuple[int, ...]]:
        node, seen = layer.node, self._tensors[layer.source.tensor]
        if len(seen.shape) != 2 or seen.size != values.shape[1]:
            raise node.error(f"weights {list(values.shape)} on {list(seen.shape)}")
        columns = values
        if layer.source.order is not None:
            columns = np.empty_like(values)
            columns[:, layer.source.order] = values
        operator = FullyConnected(
            **common, inputs=(layer.source.tensor,), output=len(self._tensors),
            weights=Weights(columns, 8, bits),
        )  # fmt: skip
        return operator, (1, len(values))

    def _maximum(self, node: Node, source: _Stored) -> _Stored:
        seen, window = self._tensors[source.tensor], node.get("kernel_shape", ())
        stride = node.get("strides", (1, 1))
        plain = len(window) == 2 and len(seen.shape) == 4 and source.order is None
        if not plain or node.get("ceil_mode", 0) or set(node.get("dilations", (1,))) != {1}:
            raise node.error("only 2-D windows without ceil_mode and dilations are read")
        pads, sizes = windows(node, (seen.shape[1], seen.shape[2]), window, stride, (1, 1), NO_PADS)
        if pads != NO_PADS:
            raise node.error("it pads", "pad in the convolution before")
        output = len(self._tensors)
        self._operators.append(
            MaxPool2D(
                name=node.output, inputs=(source.tensor,), output=output, window=window,
                stride=stride,
            )
        )  # fmt: skip
        return self._append(replace(seen, name=node.output, shape=(1, *sizes, seen.shape[3])))

    def _flat(self, node: Node, source: _Stored) -> _Stored:
        seen = self._tensors[source.tensor]
        if node.kind == "Flatten":
            flat = node.get("axis", 1) == 1
        else:
            if node.inputs[1] not in self._constants:
                raise node.error("its shape is computed", "export with a fixed shape")
            target = self._constants[node.inputs[1]].tolist()
            flat = len(target) == 2 and target[1] in (-1, seen.size)
            flat = flat and target[0] in (-1, 0, 1, self._file.batch)
        if not flat:
            raise node.error("only [batch, features] can be made of an image")
        if len(seen.shape) == 2:
            return source
        _, height, width, channels = seen.shape
        positions = np.arange(seen.size).reshape(height, width, channels)
        self._operators.append(
            Reshape(name=node.output, inputs=(source.tensor,), output=len(self._tensors))
        )
        made = self._append(replace(seen, name=node.output, shape=(1, seen.size)))
        return replace(made, order=positions.transpose(2, 0, 1).ravel())
