"""The part of the TFLite schema that files of this package consist of, once for both directions.

``TABLES`` repeats the tables of the public ``schema.fbs`` (version 3), field by field in slot
order, with types and defaults; newer fields that change what a runtime does are listed so that the
reader can refuse them by name. ``KINDS`` gives each operator its code, the lowest version that all
runtimes accept, and its options table. Enumerations come from the ``tflite`` package; a test
compares the slots with its generated accessors.
"""

from __future__ import annotations

from dataclasses import dataclass

import tflite

IDENTIFIER = b"TFL3"
VERSION = 3
LARGEST_FILE = (1 << 31) - 1

# Bytes of each scalar type; float32 is carried as its bit pattern, so that no float is touched.
SCALARS = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
}
DATA_ALIGNMENT = 16


@dataclass(frozen=True)
class Field:
    """A slot: ``type`` is a scalar, ``string``, ``union``, a table, or one of these in brackets.

    ``opaque`` marks a reference whose presence is refused.
    """

    slot: int
    name: str
    type: str
    default: int = 0

    @property
    def size(self) -> int:
        """Bytes that the field takes inside its table: the scalar or an offset."""
        return SCALARS.get(self.type, 4)

    @property
    def scalar(self) -> bool:
        """Whether the value itself is stored in the table."""
        return self.type in SCALARS

    @property
    def item(self) -> str:
        """The element type of a vector, or an empty string."""
        return self.type[1:-1] if self.type.startswith("[") else ""


def _fields(text: str) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for slot, declaration in enumerate(text.split(",")):
        name, kind, *default = declaration.split()
        fields[name] = Field(slot, name, kind, int(default[0]) if default else 0)
    return fields


TABLES: dict[str, dict[str, Field]] = {
    "Model": _fields(
        "version uint32, operator_codes [OperatorCode], subgraphs [SubGraph], description string,"
        "buffers [Buffer], metadata_buffer [int32], metadata [Metadata],"
        "signature_defs [SignatureDef],"
        "external_buffer_groups opaque, external_buffers opaque"
    ),
    "OperatorCode": _fields(
        "deprecated_builtin_code int8, custom_code string, version int32 1, builtin_code int32"
    ),
    "SubGraph": _fields(
        "tensors [Tensor], inputs [int32], outputs [int32], operators [Operator], name string,"
        "debug_metadata_index int32 -1"
    ),
    "Tensor": _fields(
        "shape [int32], type int8, buffer uint32, name string,"
        "quantization QuantizationParameters, is_variable bool, sparsity opaque,"
        "shape_signature [int32], has_rank bool, variant_tensors opaque, external_buffer uint32"
    ),
    "QuantizationParameters": _fields(
        "min [float32], max [float32], scale [float32], zero_point [int64], details_type uint8,"
        "details opaque, quantized_dimension int32"
    ),
    "Buffer": _fields("data [uint8], offset uint64, size uint64"),
    "Metadata": _fields("name string, buffer uint32"),
    "SignatureDef": _fields(
        "inputs [TensorMap], outputs [TensorMap], signature_key string, deprecated_tag string,"
        "subgraph_index uint32"
    ),
    "TensorMap": _fields("name string, tensor_index uint32"),
    "Operator": _fields(
        "opcode_index uint32, inputs [int32], outputs [int32], builtin_options_type uint8,"
        "builtin_options union, custom_options [uint8], custom_options_format int8,"
        "mutating_variable_inputs [bool], intermediates [int32],"
        "large_custom_options_offset uint64, large_custom_options_size uint64,"
        "builtin_options_2_type uint8, builtin_options_2 opaque, debug_metadata_index int32 -1"
    ),
    "Conv2DOptions": _fields(
        "padding int8, stride_w int32, stride_h int32, fused_activation_function int8,"
        "dilation_w_factor int32 1, dilation_h_factor int32 1, quantized_bias_type int8"
    ),
    "DepthwiseConv2DOptions": _fields(
        "padding int8, stride_w int32, stride_h int32, depth_multiplier int32,"
        "fused_activation_function int8, dilation_w_factor int32 1, dilation_h_factor int32 1"
    ),
    "Pool2DOptions": _fields(
        "padding int8, stride_w int32, stride_h int32, filter_width int32, filter_height int32,"
        "fused_activation_function int8"
    ),
    "FullyConnectedOptions": _fields(
        "fused_activation_function int8, weights_format int8, keep_num_dims bool,"
        "asymmetric_quantize_inputs bool, quantized_bias_type int8, quant_spec opaque"
    ),
    "AddOptions": _fields("fused_activation_function int8, pot_scale_int16 bool 1"),
    "ReshapeOptions": _fields("new_shape [int32]"),
    "SoftmaxOptions": _fields("beta float32"),
    "SubOptions": _fields("fused_activation_function int8, pot_scale_int16 bool 1"),
    "MulOptions": _fields("fused_activation_function int8"),
    "LeakyReluOptions": _fields("alpha float32"),
    "ConcatenationOptions": _fields("axis int32, fused_activation_function int8"),
    "StridedSliceOptions": _fields(
        "begin_mask int32, end_mask int32, ellipsis_mask int32, new_axis_mask int32,"
        "shrink_axis_mask int32, offset bool"
    ),
    "ReducerOptions": _fields("keep_dims bool"),
    "ShapeOptions": _fields("out_type int8"),
    "PackOptions": _fields("values_count int32, axis int32"),
    "ArgMaxOptions": _fields("output_type int8"),
    "SqueezeOptions": _fields("squeeze_dims [int32]"),
}


@dataclass(frozen=True)
class Kind:
    """One operator of the schema.

    ``version`` is written: the lowest that every runtime takes for int8. ``newest`` is the last
    one that some runtime takes. ``options`` names the options table, None where it has no fields.
    """

    name: str
    code: int
    version: int
    newest: int
    options: str | None
    options_type: int


def _kind(name: str, version: int, newest: int, options: str) -> Kind:
    code = getattr(tflite.BuiltinOperator, name)
    table = options if options in TABLES else None
    return Kind(name, code, version, newest, table, getattr(tflite.BuiltinOptions, options))


_KINDS = (
    _kind("CONV_2D", 3, 8, "Conv2DOptions"),
    _kind("DEPTHWISE_CONV_2D", 3, 7, "DepthwiseConv2DOptions"),
    _kind("FULLY_CONNECTED", 4, 14, "FullyConnectedOptions"),
    _kind("ADD", 2, 6, "AddOptions"),
    _kind("AVERAGE_POOL_2D", 2, 3, "Pool2DOptions"),
    _kind("MAX_POOL_2D", 2, 3, "Pool2DOptions"),
    _kind("PAD", 2, 6, "PadOptions"),
    _kind("RESHAPE", 1, 1, "ReshapeOptions"),
    _kind("SOFTMAX", 2, 4, "SoftmaxOptions"),
    _kind("QUANTIZE", 1, 6, "QuantizeOptions"),
    _kind("DEQUANTIZE", 2, 9, "DequantizeOptions"),
    _kind("RELU", 2, 3, "NONE"),
    _kind("RELU6", 2, 3, "NONE"),
    _kind("RELU_N1_TO_1", 1, 2, "NONE"),
    _kind("LEAKY_RELU", 2, 2, "LeakyReluOptions"),
    _kind("LOGISTIC", 2, 3, "NONE"),
    _kind("TANH", 2, 3, "NONE"),
    _kind("HARD_SWISH", 1, 1, "HardSwishOptions"),
    _kind("SUB", 2, 6, "SubOptions"),
    _kind("MUL", 2, 7, "MulOptions"),
    _kind("CONCATENATION", 2, 5, "ConcatenationOptions"),
    _kind("TRANSPOSE", 2, 7, "TransposeOptions"),
    _kind("STRIDED_SLICE", 2, 9, "StridedSliceOptions"),
    _kind("SLICE", 2, 7, "SliceOptions"),
    _kind("PADV2", 2, 5, "PadV2Options"),
    _kind("MEAN", 2, 4, "ReducerOptions"),
    _kind("SQUEEZE", 1, 2, "SqueezeOptions"),
    _kind("EXPAND_DIMS", 1, 1, "ExpandDimsOptions"),
    _kind("ARG_MAX", 2, 3, "ArgMaxOptions"),
    _kind("SHAPE", 1, 1, "ShapeOptions"),
    _kind("PACK", 1, 4, "PackOptions"),
)
# The version alone makes LiteRT 2.3 leave this one to another kernel, which rounds differently.
DIVERGENT_VERSIONS = (("FULLY_CONNECTED", 8),)
# What is written for int16 activations instead of ``Kind.version``.
INT16_VERSIONS = {
    "CONV_2D": 4,
    "DEPTHWISE_CONV_2D": 5,
    "FULLY_CONNECTED": 7,
    "ADD": 3,
    "AVERAGE_POOL_2D": 3,
    "MAX_POOL_2D": 3,
    "QUANTIZE": 2,
    "DEQUANTIZE": 3,
    "CONCATENATION": 3,
    "TRANSPOSE": 4,
    "STRIDED_SLICE": 4,
}
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
TABLE_OF_OPTIONS: dict[int, str] = {k.options_type: k.options for k in _KINDS if k.options}
KIND_OF_CODE: dict[int, Kind] = {kind.code: kind for kind in _KINDS}


def _names(enumeration: type) -> dict[int, str]:
    return {v: k for k, v in vars(enumeration).items() if not k.startswith("_")}


OPERATOR_NAMES: dict[int, str] = _names(tflite.BuiltinOperator)
TYPE_NAMES: dict[int, str] = _names(tflite.TensorType)
ACTIVATION_NAMES: dict[int, str] = _names(tflite.ActivationFunctionType)
PADDING_NAMES: dict[int, str] = _names(tflite.Padding)
TYPE_CODES: dict[str, int] = {name: code for code, name in TYPE_NAMES.items()}
ACTIVATION_CODES: dict[str, int] = {name: code for code, name in ACTIVATION_NAMES.items()}
PADDING_CODES: dict[str, int] = {name: code for code, name in PADDING_NAMES.items()}
