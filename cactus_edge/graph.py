"""The network as integers: frozen tensors and operators in execution order.

A ``Graph`` is what the file holds: scales, zero points, integer weights. A *resolved* graph also
carries, in every operator that rescales, the integers of one rounding profile (see ``profiles``);
only a resolved graph can be executed, compiled or certified. Graphs may be built by hand with any
integer clamp, multiplier, shift and rounding, and then need no scales and no file.

Layout: activations are [1, height, width, channels] or [1, features]; the leading 1 is the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_edge import scales
from cactus_edge.semantics import AddRounding, Rounding

Int8Array = npt.NDArray[np.int8]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Stored = npt.NDArray[np.integer[Any]]
"""Activations of any integer type: as stored from a session, int64 from the reference."""


class DType(Enum):
    """Element types of activations.

    INT16 is for activations beside int8 weights, INT16 and INT32 are for the logits of graphs built
    by hand, INT32 and INT64 for ARG_MAX's index.
    """

    INT8 = "int8"
    UINT8 = "uint8"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT32 = "float32"

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest stored integer."""
        if self is DType.UINT8:
            return 0, 255
        half = 1 << (_WIDE_BITS.get(self, 8) - 1)
        return -half, half - 1

    @property
    def is_wide(self) -> bool:
        """Whether the integers take more than a byte."""
        return self in _WIDE_BITS


_WIDE_BITS = {DType.INT16: 16, DType.INT32: 32, DType.INT64: 64}


class Padding(Enum):
    """TFLite's two padding schemes; explicit padding is a PAD operator of its own."""

    SAME = "SAME"
    VALID = "VALID"


class Activation(Enum):
    """The activation fused into an operator; it only narrows the clamp."""

    NONE = "NONE"
    RELU = "RELU"
    RELU6 = "RELU6"


def frozen_array(values: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A read-only, C-contiguous copy; a value that ``dtype`` cannot hold is an error."""
    source = np.asarray(values)
    array = np.array(source, dtype=dtype, order="C")
    if array.dtype.kind in "iu" and not np.array_equal(array, source):
        raise ValueError(f"values do not fit {array.dtype}")
    array.flags.writeable = False
    return array


@dataclass(frozen=True)
class Quantization:
    """``real = scale * (stored - zero_point)``; ``scale_bits`` is the float32 scale's bit pattern.

    The pattern, not the float, is kept: multipliers are derived from it in integers.
    """

    scale_bits: int
    zero_point: int

    @staticmethod
    def of(scale: object, zero_point: int) -> Quantization:
        """From a scale that is first rounded to float32."""
        return Quantization(int(np.float32(scale).view(np.uint32)), int(zero_point))  # pyright: ignore

    @property
    def scale(self) -> np.float32:
        """The scale as a NumPy float32."""
        return np.uint32(self.scale_bits).view(np.float32)


@dataclass(frozen=True)
class Tensor:
    """An activation: ``shape`` with leading batch 1, ``quantization`` None only for float edges."""

    name: str
    shape: tuple[int, ...]
    dtype: DType = DType.INT8
    quantization: Quantization | None = None

    @property
    def size(self) -> int:
        """Number of elements of one sample."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def zero_point(self) -> int:
        """The stored integer that stands for real 0; 0 where no quantization is given."""
        return self.quantization.zero_point if self.quantization else 0


@dataclass(frozen=True, eq=False)
class Weights:
    """Symmetric integer weights.

    ``values`` int8, in TFLite's layout (CONV_2D [out, kh, kw, in], DEPTHWISE [1, kh, kw, out],
    FULLY_CONNECTED [out, in]); ``bits`` 2 to 8, of which up to 4 are stored packed as INT4;
    ``scale_bits`` uint32 [1] or [out], float32 patterns, empty in graphs built without scales.
    """

    values: Int8Array
    bits: int = 8
    scale_bits: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        object.__setattr__(self, "values", frozen_array(self.values, np.int8))
        object.__setattr__(self, "scale_bits", frozen_array(self.scale_bits, np.uint32))

    @property
    def per_channel(self) -> bool:
        """Whether each output channel has a scale of its own."""
        return self.scale_bits.size > 1

    @property
    def scale(self) -> npt.NDArray[np.float32]:
        """Scales as float32 [1] or [out]."""
        return self.scale_bits.view(np.float32)


@dataclass(frozen=True, eq=False)
class Requantization:
    """How accumulators of a layer become stored integers: int64 arrays [out].

    ``rounding`` holds codes of ``semantics.Rounding``; ``multiplier`` and ``shift`` have the
    meaning that ``semantics.REQUANTIZE`` gives them for that rounding.
    """

    rounding: Int64Array
    multiplier: Int64Array
    shift: Int64Array

    def __post_init__(self) -> None:
        """Freeze the arrays and spread scalars over the channels."""
        parts = (self.rounding, self.multiplier, self.shift)
        spread = np.broadcast_arrays(*(np.atleast_1d(np.asarray(p, np.int64)) for p in parts))
        for name, array in zip(("rounding", "multiplier", "shift"), spread, strict=True):
            object.__setattr__(self, name, frozen_array(array, np.int64))

    @staticmethod
    def uniform(rounding: Rounding, multiplier: int, shift: int, channels: int) -> Requantization:
        """The same three integers for every channel."""
        ones = np.ones(channels, np.int64)
        return Requantization(ones * int(rounding), ones * multiplier, ones * shift)


@dataclass(frozen=True)
class AddRequantization:
    """The six integers of ``semantics.ADD[rounding]``: (multiplier, shift) of a, b and the sum."""

    rounding: AddRounding
    integers: tuple[int, int, int, int, int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class Operator:
    """What every operator has; ``inputs`` and ``output`` index ``Graph.tensors``."""

    name: str
    inputs: tuple[int, ...]
    output: int

    @property
    def kind(self) -> str:
        """The operator's name in the TFLite schema."""
        return _KINDS[type(self)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Operator):
    """What CONV_2D, DEPTHWISE_CONV_2D and FULLY_CONNECTED share.

    ``bias`` int32 [out], int64 where a value needs it (int16 activations). ``clamp`` overrides the
    range that ``activation`` and the output's type imply. ``requantization`` is None until the
    graph is resolved.
    """

    weights: Weights
    bias: npt.NDArray[np.int32 | np.int64]
    activation: Activation = Activation.NONE
    clamp: tuple[int, int] | None = None
    requantization: Requantization | None = None

    def __post_init__(self) -> None:
        """Freeze the bias."""
        bias = np.asarray(self.bias)
        fits = bias.dtype != np.int64 or not bias.size or abs(bias).max() < 1 << 31
        object.__setattr__(self, "bias", frozen_array(bias, np.int32 if fits else np.int64))

    @property
    def channels(self) -> int:
        """Number of output channels."""
        values = self.weights.values
        return values.shape[-1] if isinstance(self, DepthwiseConv2D) else values.shape[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class FullyConnected(Linear):
    """``weights`` [out, in]; the input is flattened."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv2D(Linear):
    """``weights`` [out, kh, kw, in]; ``stride`` and ``dilation`` are (height, width)."""

    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: Padding = Padding.VALID


@dataclass(frozen=True, eq=False, kw_only=True)
class DepthwiseConv2D(Conv2D):
    """``weights`` [1, kh, kw, in * depth_multiplier]; channel c reads c // depth_multiplier."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Operator):
    """Elementwise sum of two tensors of one shape."""

    activation: Activation = Activation.NONE
    clamp: tuple[int, int] | None = None
    requantization: AddRequantization | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Pool2D(Operator):
    """What the two pools share; input and output have one quantization."""

    window: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding = Padding.VALID
    activation: Activation = Activation.NONE
    clamp: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class AveragePool2D(Pool2D):
    """Mean of the stored integers that lie inside the input, see ``semantics.average``."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool2D(Pool2D):
    """Maximum of the stored integers that lie inside the input."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Pad(Operator):
    """Pads with the zero point; ``paddings`` are (before, after) for each axis."""

    paddings: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Reshape(Operator):
    """The same elements in the same order under the output's shape."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Operator):
    """First operator only: real float32 input to stored integers, to nearest."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Softmax(Operator):
    """Last operator before an optional DEQUANTIZE: part of the decision rule, not of the core."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Dequantize(Operator):
    """Last operator only: stored integers to real float32; order-preserving, so ignored."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ArgMax(Operator):
    """Last operator only: the index of the greatest logit, which is the decision rule itself."""


_KINDS: dict[type[Operator], str] = {
    FullyConnected: "FULLY_CONNECTED",
    Conv2D: "CONV_2D",
    DepthwiseConv2D: "DEPTHWISE_CONV_2D",
    Add: "ADD",
    AveragePool2D: "AVERAGE_POOL_2D",
    MaxPool2D: "MAX_POOL_2D",
    Pad: "PAD",
    Reshape: "RESHAPE",
    Quantize: "QUANTIZE",
    Softmax: "SOFTMAX",
    Dequantize: "DEQUANTIZE",
    ArgMax: "ARG_MAX",
}

EDGES = (Quantize, Softmax, Dequantize, ArgMax)


@dataclass(frozen=True, eq=False)
class Graph:
    """One input, one output, operators in execution order.

    ``metadata`` are the named byte strings of the file (provenance, input map); they take no part
    in the arithmetic nor in ``fingerprint``.
    """

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    input: int
    output: int
    metadata: tuple[tuple[str, bytes], ...] = ()

    @cached_property
    def core(self) -> tuple[Operator, ...]:
        """The operators that compute in integers: all but ``EDGES``."""
        return tuple(op for op in self.operators if not isinstance(op, EDGES))

    @cached_property
    def core_input(self) -> int:
        """The tensor that holds the integer input: behind QUANTIZE where there is one."""
        first = self.operators[0] if self.operators else None
        return first.output if isinstance(first, Quantize) else self.input

    @cached_property
    def logits(self) -> int:
        """The tensor of integer logits: before SOFTMAX, DEQUANTIZE, ARG_MAX if there are any."""
        tensor = self.output
        for op in reversed(self.operators):
            if isinstance(op, (Softmax, Dequantize, ArgMax)) and op.output == tensor:
                tensor = op.inputs[0]
        return tensor

    @cached_property
    def computes_int16(self) -> bool:
        """Whether int16 is computed with, not given as logits alone: by the reference executor."""
        used = {self.core_input}
        for op in self.core:
            if not isinstance(op, Reshape):
                used |= {*op.inputs} if isinstance(op, Linear) else {*op.inputs, op.output}
        return any(self.tensors[index].dtype is DType.INT16 for index in used)

    @property
    def has_softmax(self) -> bool:
        """Whether the decision is taken on SOFTMAX's output."""
        return any(isinstance(op, Softmax) for op in self.operators)

    def output_range(self, op: Operator) -> tuple[int, int]:
        """Smallest and largest integer that ``op`` may store."""
        tensor = self.tensors[op.output]
        lower, upper = tensor.dtype.range
        if not isinstance(op, (Linear, Add, Pool2D)):
            return lower, upper
        if op.clamp is not None:
            return op.clamp
        if op.activation is not Activation.NONE:
            lower = max(lower, tensor.zero_point)
        if op.activation is Activation.RELU6:
            upper = min(upper, sixes(tensor)[0])
        return lower, upper

    def fingerprint(self) -> str:
        """SHA-256 of everything that the arithmetic depends on, and of nothing else."""
        digest = hashlib.sha256(b"cactus_edge graph 1\0")
        for tensor in self.tensors:
            quantization = tensor.quantization
            pair = (quantization.scale_bits, quantization.zero_point) if quantization else ()
            digest.update(repr((tensor.shape, tensor.dtype.value, pair)).encode())
        for op in self.operators:
            digest.update(op.kind.encode())
            for part in _parts(op):
                digest.update(part)
        digest.update(repr((self.input, self.output)).encode())
        return digest.hexdigest()


def sixes(tensor: Tensor) -> tuple[int, int]:
    """What runtimes take for a stored 6, see ``scales.sixes``; refused where they differ."""
    if tensor.quantization is None:
        raise ValueError(f"RELU6 on tensor '{tensor.name}' needs a scale")
    return scales.sixes(tensor.quantization.scale_bits, tensor.zero_point)


def _parts(value: object) -> Iterator[bytes]:
    """A canonical byte string for each field, names left out."""
    if isinstance(value, np.ndarray):
        yield repr((value.dtype.str, value.shape)).encode() + value.tobytes()
    elif is_dataclass(value):
        for item in fields(value):
            if item.name != "name":
                yield item.name.encode() + b"="
                yield from _parts(getattr(value, item.name))
    else:
        yield repr(value).encode() + b";"


def window_geometry(
    extent: int, kernel: int, stride: int, dilation: int, padding: Padding
) -> tuple[int, int, int]:
    """``(output extent, padding before, padding after)`` along one axis, as TFLite computes it.

    The output extent is 0 or less where the window does not fit.
    """
    reach = (kernel - 1) * dilation + 1
    if padding is Padding.VALID:
        return (extent - reach + stride) // stride, 0, 0
    output = (extent + stride - 1) // stride
    total = max((output - 1) * stride + reach - extent, 0)
    return output, total // 2, total - total // 2
