"""Which graphs a ``.tflite`` file can hold, such that stock runtimes compute the same integers.

The writer checks before it writes and the reader before it returns, so that whatever was read can
be written again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cactus_edge import scales
from cactus_edge.errors import InvalidGraphError, UnsupportedModelError
from cactus_edge.graph import (
    Activation,
    Add,
    ArgMax,
    Conv2D,
    DType,
    FullyConnected,
    Graph,
    Linear,
    Operator,
    Pool2D,
    Reshape,
    Tensor,
    window_geometry,
)
from cactus_edge.operators import TABLED, Function, Mean, ToUnsigned, Unary

# LiteRT takes no more for strides and dilations.
LARGEST_STEP = (1 << 15) - 1
# No device comes near these; they keep a small file from asking for all memory there is.
MOST_ELEMENTS = 1 << 27
MOST_OPERATORS = 1 << 12
BITS_ENTRY = "cactus_edge.weight_bits"

# Entries by which TFLite Micro is told where to place tensors, or that weights are compressed.
_HARMFUL_ENTRIES = ("OfflineMemoryAllocation", "COMPRESSION_METADATA")


def check(graph: Graph) -> None:
    """Check a graph that satisfies ``constraints.validate``.

    Raises:
        UnsupportedModelError: what cannot be stored, where, and what to do about it.
    """
    if len(graph.operators) > MOST_OPERATORS:
        raise UnsupportedModelError(
            f"{len(graph.operators)} operators; files of up to {MOST_OPERATORS} are supported"
        )
    computed = _away_from_quantize(graph)
    # An index is no logit; nor is it computed where only a part of the operators is left.
    logits = {op.output for op in graph.operators if not isinstance(op, ArgMax)}
    by_hand = _by_hand(graph)
    for index, tensor in enumerate(graph.tensors):
        int16 = tensor.dtype is DType.INT16
        if tensor.dtype.is_wide and not int16 and index not in logits:
            continue
        _check_tensor(tensor, uint8=index not in computed, int16=int16 and index not in by_hand)
    for index, op in enumerate(graph.operators):
        _check_operator(graph, op, f"operator {index} ({op.kind} '{op.name}')")
    _check_reshapes(graph)
    for name, _ in graph.metadata:
        if name == BITS_ENTRY or name in _HARMFUL_ENTRIES or not name.isprintable():
            raise UnsupportedModelError(f"metadata entry {name!r}: the name is reserved; rename it")


def _by_hand(graph: Graph) -> set[int]:
    """What layers that read int8 write, and what a RESHAPE makes of it."""
    found: set[int] = set()
    for op in graph.operators:
        narrow = isinstance(op, Linear) and graph.tensors[op.inputs[0]].dtype is not DType.INT16
        if narrow or (isinstance(op, Reshape) and op.inputs[0] in found):
            found.add(op.output)
    return found


def _check_reshapes(graph: Graph) -> None:
    """TFLite gives a RESHAPE's output its input's memory, and then lets an ADD overwrite both.

    Measured in tflite-runtime 2.14 and LiteRT 2.3: wrong results where the input is read again.
    """
    readers = Counter(index for op in graph.operators for index in op.inputs)
    readers[graph.output] += 1
    for index, op in enumerate(graph.operators):
        if isinstance(op, Reshape) and readers[op.inputs[0]] > 1:
            raise UnsupportedModelError(
                f"operator {index} (RESHAPE '{op.name}'): its input is used elsewhere too, which "
                "TFLite computes wrongly; let the other operators read the RESHAPE's output"
            )


def _away_from_quantize(graph: Graph) -> set[int]:
    """Tensors that anything but a QUANTIZE reads or writes, and that may not be uint8 therefore."""
    return {
        index
        for op in graph.operators
        if not (isinstance(op, Unary) and op.function is Function.QUANTIZE)
        and not isinstance(op, ToUnsigned)
        for index in (*op.inputs, op.output)
    }


def _check_tensor(tensor: Tensor, *, uint8: bool, int16: bool) -> None:
    where = f"tensor {tensor.name!r}"
    if not tensor.name.isprintable():
        raise UnsupportedModelError(f"{where}: a name in a file must be printable")
    if tensor.size > MOST_ELEMENTS:
        raise UnsupportedModelError(
            f"{where}: {tensor.size} elements; up to {MOST_ELEMENTS} are supported"
        )
    if tensor.dtype is DType.UINT8 and not uint8:
        raise UnsupportedModelError(
            f"{where}: uint8 beside int8 weights runs nowhere; store int8 (value - 128)"
        )
    if tensor.dtype.is_wide and not int16:
        raise UnsupportedModelError(
            f"{where}: {tensor.dtype.value} logits are for graphs built by hand and run in no "
            "runtime beside int8; give the last layer an int8 output"
        )
    if (tensor.dtype is not DType.FLOAT32) != (tensor.quantization is not None):
        raise UnsupportedModelError(
            f"{where}: integer tensors need a scale in a file, float32 tensors have none"
        )


def _check_operator(graph: Graph, op: Operator, where: str) -> None:
    if not op.name.isprintable():
        raise UnsupportedModelError(f"{where!r}: a name in a file must be printable")
    tabled = isinstance(op, TABLED) and op.table is not None
    if tabled or (isinstance(op, (Linear, Add)) and op.requantization is not None):
        raise UnsupportedModelError(
            f"{where}: a file holds scales, not multipliers; write the graph before `resolve`"
        )
    if isinstance(op, (Linear, Add, Pool2D)) and _activation_for(graph, op) is None:
        raise UnsupportedModelError(
            f"{where}: clamp {op.clamp} is none of NONE, RELU, RELU6 for this output; "
            "leave it to the activation"
        )
    if isinstance(op, Linear) and not isinstance(op, Mean):
        _check_weights(graph, op, where)
    if isinstance(op, (Conv2D, Pool2D)):
        _check_window(graph, op, where)
    if isinstance(op, Mean) and not op.keeps:
        readers = [reader for reader in graph.operators if op.output in reader.inputs]
        if not all(isinstance(reader, Reshape) for reader in readers):
            raise UnsupportedModelError(
                f"{where}: a MEAN that keeps no dimensions has nothing but a RESHAPE behind it"
            )


def _check_window(graph: Graph, op: Conv2D | Pool2D, where: str) -> None:
    source = graph.tensors[op.inputs[0]]
    window = op.weights.values.shape[1:3] if isinstance(op, Conv2D) else op.window
    dilation = op.dilation if isinstance(op, Conv2D) else (1, 1)
    size = source.shape[3]
    for axis in (0, 1):
        extent = source.shape[1 + axis]
        geometry = (window[axis], op.stride[axis], dilation[axis], op.padding)
        _, before, after = window_geometry(extent, *geometry)
        size *= extent + before + after
        largest = max(op.stride[axis], dilation[axis])
        if largest > LARGEST_STEP or size > MOST_ELEMENTS:
            raise UnsupportedModelError(
                f"{where}: window {tuple(window)}, stride {op.stride}, dilation {dilation} "
                f"reach too far; up to {MOST_ELEMENTS} elements with padding are supported"
            )
        if isinstance(op, Pool2D) and window[axis] > 2 * extent + 1:
            raise UnsupportedModelError(
                f"{where}: window {op.window} is more than twice the input {list(source.shape)}"
            )


def _check_weights(graph: Graph, op: Linear, where: str) -> None:
    weights = op.weights
    if not weights.scale_bits.size:
        raise UnsupportedModelError(f"{where}: weights have no scale, which a file must hold")
    if isinstance(op, FullyConnected) and weights.bits <= 4 and weights.per_channel:
        raise UnsupportedModelError(
            f"{where}: int4 weights with a scale for each channel run in few runtimes; "
            "express the layer as a 1x1 CONV_2D"
        )
    try:
        bias_scale_bits(graph, op)
    except InvalidGraphError as error:
        raise UnsupportedModelError(f"{where}: {error}") from None


def _activation_for(graph: Graph, op: Linear | Add | Pool2D) -> Activation | None:
    if op.clamp is None:
        return op.activation
    for activation in (op.activation, *Activation):
        if graph.output_range(replace(op, activation=activation, clamp=None)) == op.clamp:
            return activation
    return None


def fused_activation(graph: Graph, op: Linear | Add | Pool2D) -> Activation:
    """The activation that gives the operator's clamp; ``check`` has found that there is one."""
    activation = _activation_for(graph, op)
    assert activation is not None, f"'{op.name}' was not checked"
    return activation


def bias_scale_bits(graph: Graph, op: Linear) -> npt.NDArray[np.uint32]:
    """Float32 patterns of input scale * weight scale, [1] or [out].

    Raises:
        InvalidGraphError: a weight scale or a product is not a positive, normal float32.
    """
    quantization = graph.tensors[op.inputs[0]].quantization
    assert quantization is not None, "tensors are checked before operators"
    source = scales.decode_float32(quantization.scale_bits)
    patterns = {
        bits: _encode_float32(scales.multiply(source, scales.decode_float32(bits), 32))
        for bits in set(op.weights.scale_bits.tolist())
    }
    return np.array([patterns[bits] for bits in op.weights.scale_bits.tolist()], np.uint32)


def _encode_float32(value: scales.Binary) -> int:
    """The pattern of a number of 24 significant bits, the inverse of ``scales.decode_float32``."""
    exponent = value.exponent + 150
    if not 0 < exponent < 255:
        raise InvalidGraphError(
            "input scale * weight scale is no normal float32; rescale the model"
        )
    return exponent << 23 | value.significand & 0x7FFFFF
