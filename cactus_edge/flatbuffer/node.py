"""An operator as it stands in a file, and how its parts are read and checked.

Source: ``kernels/kernel_util.cc``, ``conv.cc``, ``depthwise_conv.cc``, ``fully_connected.cc`` of
TensorFlow Lite.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cactus_edge import scales
from cactus_edge.errors import InvalidGraphError
from cactus_edge.flatbuffer import schema
from cactus_edge.flatbuffer.packing import unpack_int4
from cactus_edge.flatbuffer.wire import Place, Table
from cactus_edge.graph import Activation, DType, Padding, Tensor, Weights

_log = logging.getLogger(__name__)

_NEED_BIASES = ("CONV_2D", "DEPTHWISE_CONV_2D")
_WITHOUT_BIAS = (
    "has no bias; read as one of zeros, as TFLite Micro does; TFLite and LiteRT refuse the file or "
    "crash: write it again with biases of zero"
)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor with data: uint8, as stored. ``scale_bits`` and ``zero_points`` have one length."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    scale_bits: npt.NDArray[np.uint32]
    zero_points: npt.NDArray[np.int64]
    quantized_dimension: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    def values(self) -> npt.NDArray[np.int32]:
        """Int32 values in the tensor's shape."""
        return self.data.view("<i4").reshape(self.shape)


@dataclass(frozen=True)
class Node:
    """An operator as it stands in a file, with its constants looked up.

    ``constants`` are the inputs behind the activations, None where one is left out;
    ``constant_first`` where the only one stands before the activation.
    """

    place: Place
    kind: schema.Kind
    options: Table | None
    inputs: tuple[int, ...]
    constants: Sequence[Constant | None]
    output: int
    tensors: Sequence[Tensor]
    constant_first: bool = False

    @property
    def source(self) -> Tensor:
        """The first activation."""
        return self.tensors[self.inputs[0]]

    @property
    def target(self) -> Tensor:
        """The output."""
        return self.tensors[self.output]

    def integer(self, option: str) -> int:
        """The value of an option of a table that has to be there."""
        if self.options is None:
            raise self.place.malformed(f"has no {self.kind.options}")
        return self.options.integer(option)

    def constant(self, position: int, what: str, kind: str) -> Constant | None:
        """The constant of this type at ``position``, None where it is left out."""
        found = self.constants[position] if position < len(self.constants) else None
        if found is not None and found.type != kind:
            raise self.place.unsupported(f"{what} is {found.type}; only {kind} is supported")
        return found

    def name(self, suffix: str) -> str:
        """The operator's name, which only names of its constants can hold."""
        first = self.constants[0] if self.constants else None
        if first is not None and first.name.endswith(suffix):
            return first.name.removesuffix(suffix)
        return self.target.name

    def activation(self) -> Activation:
        """The fused activation."""
        code = self.integer("fused_activation_function")
        if code not in schema.ACTIVATION_NAMES:
            raise self.place.malformed(f"fused activation {code} does not exist")
        name = schema.ACTIVATION_NAMES[code]
        known = [activation.value for activation in Activation]
        if name not in known:
            raise self.place.unsupported(f"fused {name}; supported: {', '.join(known)}")
        return Activation(name)

    def padding(self) -> Padding:
        """SAME or VALID."""
        code = self.integer("padding")
        if code not in schema.PADDING_NAMES:
            raise self.place.malformed(f"padding {code} is neither SAME nor VALID")
        return Padding(schema.PADDING_NAMES[code])

    def pair(self, height: str, width: str) -> tuple[int, int]:
        """Two options that are at least 1."""
        pair = self.integer(height), self.integer(width)
        if min(pair) < 1:
            raise self.place.malformed(
                f"{height} {pair[0]} and {width} {pair[1]} must be at least 1"
            )
        return pair

    def weights(self, rank: int, axis: int) -> Weights:
        """The weight tensor; ``axis`` is where its output channels lie."""
        constant = self.constants[0] if self.constants else None
        if constant is None:
            raise self.place.unsupported("its weights are not constant")
        if constant.type not in ("INT8", "INT4"):
            raise self.place.unsupported(f"weights are {constant.type}; supported: INT8, INT4")
        if len(constant.shape) != rank:
            raise self.place.malformed(
                f"weights {list(constant.shape)} must have {rank} dimensions"
            )
        count, channels = constant.scale_bits.size, constant.shape[axis]
        if count not in (1, channels):
            raise self.place.malformed(f"{count} weight scales for {channels} channels")
        allowed = (axis,) if count > 1 else (0, axis)
        if constant.quantized_dimension not in allowed:
            # Old converters wrote it; TFLite Micro never looks, and the number of scales is right.
            text = f"dimension {constant.quantized_dimension}, not {axis}; read along {axis}"
            _log.warning(
                "%s",
                self.place.message(
                    f"weights are quantized along {text}, as TFLite Micro does; TFLite and LiteRT "
                    "refuse the file: write it again with the dimension corrected"
                ),
            )
        if constant.zero_points.any():
            raise self.place.unsupported(
                "weights have a zero point other than 0; quantize symmetrically"
            )
        if constant.type == "INT4":
            values = unpack_int4(constant.data, constant.size)
        else:
            values = constant.data.view(np.int8)
        bits = 4 if constant.type == "INT4" else 8
        return Weights(values.reshape(constant.shape), bits, constant.scale_bits)

    def bias(
        self, weights: Weights, channels: int
    ) -> npt.NDArray[np.int32] | npt.NDArray[np.int64]:
        """Int32 [channels], zeros where the file has none; int64 beside int16 activations."""
        if len(self.constants) > 2:
            raise self.place.malformed(f"has {len(self.constants) + 1} inputs instead of 2 or 3")
        wide = self.source.dtype is DType.INT16
        constant = self.constant(1, "the bias", self.bias_type)
        if constant is None and wide:
            raise self.place.unsupported(
                "int16 activations without a bias, which runtimes refuse or round otherwise; write "
                "int64 zeros"
            )
        if constant is None:
            if self.kind.name in _NEED_BIASES:
                _log.warning("%s", self.place.message(_WITHOUT_BIAS))
            return np.zeros(channels, np.int32)
        if constant.shape != (channels,):
            raise self.place.malformed(f"bias {list(constant.shape)} for {channels} channels")
        if constant.zero_points.any():
            raise self.place.malformed("bias has a zero point other than 0")
        if constant.scale_bits.size not in (1, channels):
            raise self.place.malformed(
                f"{constant.scale_bits.size} bias scales, {channels} channels"
            )
        self._check_bias_scale(constant, weights)
        return constant.data.view("<i8").reshape(channels) if wide else constant.values()

    def _check_bias_scale(self, bias: Constant, weights: Weights) -> None:
        """Runtimes add the stored bias as it is, so its scale has to be that of the accumulator."""
        source = self.source.quantization
        if source is None:
            raise self.place.unsupported(f"input '{self.source.name}' has no scale")
        pairs = np.broadcast_arrays(bias.scale_bits, weights.scale_bits)
        distinct = sorted(set(zip(*(part.tolist() for part in pairs), strict=True)))
        try:
            factor = scales.decode_float32(source.scale_bits).fraction()
            for stored, weight in distinct:
                expected = factor * scales.decode_float32(weight).fraction()
                found = scales.decode_float32(stored).fraction()
                if 50 * abs(found - expected) > expected:
                    raise self.place.malformed(
                        "bias scale differs from input scale * weight scale by more than 2 %"
                    )
        except InvalidGraphError as error:
            raise self.place.malformed(str(error)) from None

    @property
    def bias_type(self) -> str:
        """INT32, or INT64 beside int16 activations: LiteRT computes int32 biases wrongly there."""
        return "INT64" if self.source.dtype is DType.INT16 else "INT32"

    def check_bias_type(self) -> None:
        """Refuse a bias of another type than ``bias_type``."""
        code = self.integer("quantized_bias_type")
        if code not in (0, schema.TYPE_CODES[self.bias_type]):
            name = schema.TYPE_NAMES.get(code, str(code))
            raise self.place.unsupported(
                f"quantized_bias_type {name}; only {self.bias_type} is supported"
            )
