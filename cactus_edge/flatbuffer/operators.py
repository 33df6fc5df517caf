"""Each operator's options and constant tensors, in both directions.

``encode`` gives what an operator looks like in a file, ``decode`` makes the operator from it and
refuses whatever a stock runtime would compute differently. Neither touches bytes of the file
format, which are the business of ``wire``.

Source: ``kernels/conv.cc``, ``depthwise_conv.cc``, ``fully_connected.cc``, ``reshape.cc``,
``pad.cc``, ``kernel_util.cc`` and ``core/api/flatbuffer_conversions.cc`` of TensorFlow Lite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cactus_edge.flatbuffer import imported, schema
from cactus_edge.flatbuffer.imported import Split, plain, reshaped
from cactus_edge.flatbuffer.node import Constant, Node
from cactus_edge.flatbuffer.packing import pack_int4
from cactus_edge.flatbuffer.storable import bias_scale_bits, fused_activation
from cactus_edge.flatbuffer.wire import Values
from cactus_edge.graph import (
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    Dequantize,
    DType,
    FullyConnected,
    Graph,
    Linear,
    MaxPool2D,
    Operator,
    Pad,
    Pool2D,
    Quantize,
    Reshape,
    Softmax,
    Weights,
)
from cactus_edge.operators import Function, Mean, PadAxes, Rows, ToUnsigned, Unary

_ONE_BITS = 0x3F800000  # the pattern of 1 in float32


class Encoded(NamedTuple):
    """``options`` None where the operator has no options table."""

    options: Values | None
    constants: list[Constant]


# ------------------------------------------------------------------------------------------ encode
def encode(graph: Graph, op: Operator) -> Encoded:
    """Options and constants of an operator that ``storable.check`` has accepted."""
    match op:
        case Mean():
            return Encoded(*imported.encode(graph, op))
        case Rows():
            return Encoded({**_fused(graph, op), "keep_num_dims": 1}, _rows_constants(graph, op))
        case Conv2D():
            return Encoded(_window_options(graph, op), _linear_constants(graph, op))
        case FullyConnected():
            return Encoded(_fused(graph, op), _linear_constants(graph, op))
        case Add():
            return Encoded(_add_options(graph, op), [])
        case Pool2D():
            sizes = {"filter_height": op.window[0], "filter_width": op.window[1]}
            return Encoded({**_fused(graph, op), **_strides(op), **sizes}, [])
        case Pad() | PadAxes():
            paddings = np.array(op.paddings, np.int32)
            return Encoded(None, [imported.int32_constant(f"{op.name}/paddings", paddings)])
        case Reshape():
            shape = np.array(graph.tensors[op.output].shape, np.int32)
            constant = imported.int32_constant(f"{op.name}/shape", shape)
            return Encoded({"new_shape": shape}, [constant])
        case Softmax():
            return Encoded({"beta": _ONE_BITS}, [])
        case _:
            return Encoded(*imported.encode(graph, op))


def _fused(graph: Graph, op: Linear | Add | Pool2D) -> dict[str, object]:
    activation = fused_activation(graph, op)
    return {"fused_activation_function": schema.ACTIVATION_CODES[activation.value]}


def _add_options(graph: Graph, op: Add) -> dict[str, object]:
    options = _fused(graph, op)
    if graph.tensors[op.output].dtype is DType.INT16:
        options["pot_scale_int16"] = 0  # else runtimes take the scales for powers of two
    return options


def _strides(op: Conv2D | Pool2D) -> dict[str, object]:
    return {
        "padding": schema.PADDING_CODES[op.padding.value],
        "stride_h": op.stride[0],
        "stride_w": op.stride[1],
    }


def _window_options(graph: Graph, op: Conv2D) -> dict[str, object]:
    dilation = {"dilation_h_factor": op.dilation[0], "dilation_w_factor": op.dilation[1]}
    options = {**_fused(graph, op), **_strides(op), **dilation}
    if isinstance(op, DepthwiseConv2D):
        options["depth_multiplier"] = op.channels // graph.tensors[op.inputs[0]].shape[3]
    return options


def _rows_constants(graph: Graph, op: Rows) -> list[Constant]:
    weights, bias = _linear_constants(graph, op)
    return [replace(weights, shape=(op.channels, op.weights.values.shape[3])), bias]


def _octets(values: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _linear_constants(graph: Graph, op: Linear) -> list[Constant]:
    weights = op.weights
    zeros = np.zeros(weights.scale_bits.size, np.int64)
    axis = 3 if isinstance(op, DepthwiseConv2D) and weights.per_channel else 0
    packed = weights.bits <= 4
    wide = graph.tensors[op.inputs[0]].dtype is DType.INT16
    return [
        Constant(
            f"{op.name}/weight",
            "INT4" if packed else "INT8",
            weights.values.shape,
            pack_int4(weights.values) if packed else _octets(weights.values),
            weights.scale_bits,
            zeros,
            axis,
        ),
        Constant(
            f"{op.name}/bias",
            "INT64" if wide else "INT32",
            op.bias.shape,
            _octets(op.bias.astype("<i8" if wide else "<i4")),
            bias_scale_bits(graph, op),
            zeros,
        ),
    ]


# ------------------------------------------------------------------------------------------ decode
def decode(node: Node) -> Operator | Split:
    """The operator that ``node`` stands for, or two.

    Raises:
        MalformedModelError: options or constants are missing or contradict each other.
        UnsupportedModelError: an option or a type that is not supported.
    """
    return _DECODERS[node.kind.name](node)


def with_edge(decoded: Sequence[Operator]) -> list[Operator]:
    """The operators, with a QUANTIZE behind SOFTMAX as the edge that it is."""
    if len(decoded) < 2:
        return list(decoded)
    *rest, before, last = decoded
    quantizes = isinstance(last, Unary) and last.function is Function.QUANTIZE
    if quantizes and isinstance(before, Softmax) and last.inputs == (before.output,):
        last = ToUnsigned(name=last.name, inputs=last.inputs, output=last.output)
    return [*rest, before, last]


def _conv_2d(node: Node) -> Operator:
    node.check_bias_type()
    weights = node.weights(4, 0)
    return Conv2D(
        name=node.name("/weight"),
        inputs=node.inputs,
        output=node.output,
        weights=weights,
        bias=node.bias(weights, weights.values.shape[0]),
        activation=node.activation(),
        stride=node.pair("stride_h", "stride_w"),
        dilation=node.pair("dilation_h_factor", "dilation_w_factor"),
        padding=node.padding(),
    )


def _depthwise_conv_2d(node: Node) -> Operator:
    weights = node.weights(4, 3)
    channels = weights.values.shape[3]
    shape = node.source.shape
    multiplier = node.integer("depth_multiplier")
    if len(shape) != 4 or multiplier * shape[3] != channels:
        raise node.place.malformed(
            f"depth_multiplier {multiplier} takes input {list(shape)} to other than "
            f"{channels} channels"
        )
    return DepthwiseConv2D(
        name=node.name("/weight"),
        inputs=node.inputs,
        output=node.output,
        weights=weights,
        bias=node.bias(weights, channels),
        activation=node.activation(),
        stride=node.pair("stride_h", "stride_w"),
        dilation=node.pair("dilation_h_factor", "dilation_w_factor"),
        padding=node.padding(),
    )


def _fully_connected(node: Node) -> Operator | Split:
    node.check_bias_type()
    if node.integer("weights_format") != 0:
        raise node.place.unsupported(
            "shuffled weights; only the default weights_format is supported"
        )
    if node.integer("asymmetric_quantize_inputs") != 0:
        raise node.place.unsupported("asymmetric_quantize_inputs; only full int8 is supported")
    if node.options is not None and node.options.present("quant_spec"):
        raise node.place.unsupported("a quant_spec")
    weights = node.weights(2, 0)
    channels, depth = weights.values.shape
    kept = node.integer("keep_num_dims") != 0
    if node.source.size != depth:
        return _rows(node, weights, kept)
    wanted = (*node.source.shape[:-1], channels) if kept else (1, channels)
    if node.target.shape != wanted:
        raise node.place.malformed(f"its output is {list(node.target.shape)}, not {list(wanted)}")
    if len(wanted) > 2 and weights.per_channel:
        raise node.place.unsupported(
            "an output of more than 2 dimensions with a scale for each channel, which "
            "tflite-runtime's reference kernel computes wrongly; reshape behind the layer instead"
        )
    op = FullyConnected(
        name=node.name("/weight"),
        inputs=node.inputs,
        output=node.output,
        weights=weights,
        bias=node.bias(weights, weights.values.shape[0]),
        activation=node.activation(),
    )
    return reshaped(node, op, (1, channels))


def _rows(node: Node, weights: Weights, kept: bool) -> Operator | Split:
    """More rows than one, which are pixels."""
    shape, (channels, depth) = node.source.shape, weights.values.shape
    if not kept or shape[-1] != depth or len(shape) not in (3, 4) or weights.per_channel:
        raise node.place.unsupported(
            f"rows of {depth} in an input {list(shape)}; more than one row is supported with "
            "keep_num_dims, 3 or 4 dimensions and one weight scale"
        )
    if node.target.shape != (*shape[:-1], channels):
        raise node.place.malformed(f"its output is {list(node.target.shape)}")
    pixels = replace(weights, values=weights.values.reshape(channels, 1, 1, depth))
    layer = Rows(
        name=node.name("/weight"),
        inputs=node.inputs,
        output=node.output,
        weights=pixels,
        bias=node.bias(weights, channels),
        activation=node.activation(),
    )
    return imported.rows(node, layer)


def _pool(node: Node) -> Operator:
    plain(node)
    kind = AveragePool2D if node.kind.name == "AVERAGE_POOL_2D" else MaxPool2D
    return kind(
        name=node.target.name,
        inputs=node.inputs,
        output=node.output,
        window=node.pair("filter_height", "filter_width"),
        stride=node.pair("stride_h", "stride_w"),
        padding=node.padding(),
        activation=node.activation(),
    )


def _pad(node: Node) -> Operator:
    plain(node, 1)
    constant = node.constant(0, "the tensor of paddings", "INT32")
    if constant is None:
        raise node.place.malformed("has no constant tensor of paddings")
    rank = len(node.source.shape)
    if constant.shape != (rank, 2):
        raise node.place.malformed(f"paddings {list(constant.shape)} for {rank} dimensions")
    rows: list[list[int]] = constant.values().tolist()
    if min(min(row) for row in rows) < 0:
        raise node.place.malformed(f"negative paddings {rows}")
    return imported.padded(node, rows)


def _reshape(node: Node) -> Operator:
    if len(node.constants) > 1:
        raise node.place.malformed(f"has {len(node.constants) + 1} inputs instead of 1 or 2")
    constant = node.constant(0, "the new shape", "INT32")
    if node.constants and constant is None:
        raise node.place.unsupported("its new shape is not constant")
    wanted: list[tuple[int, ...]] = []
    if constant is not None:
        if len(constant.shape) != 1:
            raise node.place.malformed(f"new shape is a tensor {list(constant.shape)}, not a list")
        wanted.append(tuple(constant.values().tolist()))
    if node.options is not None and (option := node.options.integers("new_shape")):
        wanted.append(option)
    if not wanted:
        raise node.place.malformed("has no new shape")
    for shape in wanted:
        if not _resolves_to(shape, node.target.shape):
            raise node.place.malformed(
                f"new shape {list(shape)} is not the output's shape {list(node.target.shape)}"
            )
    return Reshape(name=node.name("/shape"), inputs=node.inputs, output=node.output)


def _resolves_to(wanted: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether ``wanted``, in which one extent may be -1, is ``shape``; sizes are compared later."""
    if len(wanted) != len(shape) or wanted.count(-1) > 1:
        return False
    return all(w in (-1, s) for w, s in zip(wanted, shape, strict=True))


def _softmax(node: Node) -> Operator:
    plain(node)
    if node.integer("beta") != _ONE_BITS:
        raise node.place.unsupported("beta other than 1")
    return Softmax(name=node.target.name, inputs=node.inputs, output=node.output)


def _quantize(node: Node) -> Operator:
    plain(node)
    if node.source.dtype is not DType.FLOAT32:
        return imported.quantize(node)
    return Quantize(name=node.target.name, inputs=node.inputs, output=node.output)


def _dequantize(node: Node) -> Operator:
    plain(node)
    return Dequantize(name=node.target.name, inputs=node.inputs, output=node.output)


_DECODERS: dict[str, Callable[[Node], Operator | Split]] = {
    "CONV_2D": _conv_2d,
    "DEPTHWISE_CONV_2D": _depthwise_conv_2d,
    "FULLY_CONNECTED": _fully_connected,
    **imported.DECODERS,
    "AVERAGE_POOL_2D": _pool,
    "MAX_POOL_2D": _pool,
    "PAD": _pad,
    "RESHAPE": _reshape,
    "SOFTMAX": _softmax,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
}
