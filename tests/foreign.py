"""Files as other converters write them: models that together cover every operator and option.

``FAMILY`` gives, by name, a function that makes the bytes of a small model from a generator. They
are written table by table, so that forms are met which our own writer never chooses: constants
without axes, dropped dimensions, scales that are shared or not, biases left out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cactus_edge.flatbuffer import schema
from tests.foreign_file import CHANNELS, HEIGHT, INPUT, WIDTH, File, Scale, pattern

Build = Callable[[File], int]
FAMILY: dict[str, Build] = {}
PLAIN = -128


def model(build: Build) -> Build:
    FAMILY[build.__name__] = build
    return build


def made(name: str, seed: int) -> bytes:
    """The bytes of a model of the family."""
    file = File(np.random.default_rng((seed, list(FAMILY).index(name))))
    return file.bytes(FAMILY[name](file))


# ---------------------------------------------------------------------- functions of one value
def _function(kind: str, scale: Scale | None = None, **options: object) -> None:
    def build(file: File) -> int:
        layer = file.conv(file.input())
        return file.dense(file.unary(kind, layer, scale, **options))

    build.__name__ = kind.lower()
    FAMILY[build.__name__] = build


_function("RELU")
_function("RELU_N1_TO_1")
_function("LEAKY_RELU", alpha=pattern(0.2))
_function("LOGISTIC", (1 / 256, -128))
_function("TANH", (1 / 128, 0))
_function("HARD_SWISH")
_function("QUANTIZE")


@model
def relu6(file: File) -> int:
    layer = file.conv(file.input())
    return file.dense(file.unary("RELU6", layer, file.scales[layer]))


@model
def functions_in_a_row(file: File) -> int:
    found = file.input()
    found = file.unary("HARD_SWISH", found)
    found = file.unary("LEAKY_RELU", found, alpha=pattern(0.3))
    found = file.unary("TANH", found, (1 / 128, 0))
    return file.unary("QUANTIZE", found, (0.01, 3))


@model
def unsigned_input(file: File) -> int:
    source = file.input(scale=(1 / 255, 0), kind="UINT8")
    signed = file.op("QUANTIZE", [source], INPUT, (1 / 255, -128))
    return file.dense(file.conv(signed))


@model
def unsigned_output(file: File) -> int:
    found = file.dense(file.conv(file.input()))
    scale, zero = file.scales[found]
    return file.op("QUANTIZE", [found], file.shapes[found], (scale, zero + 128), None, "UINT8")


# ---------------------------------------------------------------------- functions of two values
def _two(kind: str) -> None:
    def tensors(file: File) -> int:
        source = file.input()
        return file.dense(file.combined(kind, file.conv(source, 6), file.conv(source, 6)))

    def channels(file: File) -> int:
        return file.combined(kind, file.conv(file.input()), file.constant((8,)), activation=1)

    def scalar(file: File) -> int:
        layer = file.conv(file.input())
        return file.dense(file.combined(kind, file.constant(()), layer))

    def whole(file: File) -> int:
        source = file.input()
        return file.combined(kind, file.constant(INPUT), source)

    for build in (tensors, channels, scalar, whole):
        FAMILY[f"{kind.lower()}_{build.__name__}"] = build


for _kind in ("ADD", "SUB", "MUL"):
    _two(_kind)


@model
def mul_enlarged(file: File) -> int:
    """A product whose factor is above 1."""
    source = file.input()
    layer = file.conv(source, CHANNELS)
    scale = file.scales[source][0] * file.scales[layer][0] / 1.7, 3
    options = {"fused_activation_function": 0}
    return file.op("MUL", [layer, source], INPUT, scale, options)


@model
def squeeze_and_excite(file: File) -> int:
    features = file.conv(file.input(), 8)
    pooled = file.pool("AVERAGE_POOL_2D", features, (HEIGHT, WIDTH), padding=1)
    hidden = file.conv(pooled, 4, (1, 1), activation=1)
    gate = file.unary("LOGISTIC", file.conv(hidden, 8, (1, 1)), (1 / 256, -128))
    return file.combined("MUL", features, gate)


@model
def gate_first(file: File) -> int:
    features = file.input()
    pooled = file.pool("MAX_POOL_2D", features, (HEIGHT, WIDTH), padding=1)
    return file.combined("SUB", pooled, features)


# ---------------------------------------------------------------------- moved elements
@model
def transposed(file: File) -> int:
    source = file.conv(file.input(), 4)
    order = file.list_of(0, 3, 1, 2)
    turned = file.moved("TRANSPOSE", [source, order], (1, 4, HEIGHT, WIDTH))
    return file.dense(file.conv(turned))


@model
def cropped(file: File) -> int:
    source = file.conv(file.input(), 4)
    rows = (0, 1, -4, 0), (1, HEIGHT, 5, 4), (1, 2, 1, 1)
    return file.dense(file.sliced(source, (1, 3, 4, 4), rows))


@model
def reversed_rows(file: File) -> int:
    source = file.input()
    rows = (0, -1, 0, 0), (0, 0, 0, 0), (1, -1, 2, 1)
    shape = (1, HEIGHT, -(-WIDTH // 2), CHANNELS)
    return file.dense(file.sliced(source, shape, rows, end_mask=15, begin_mask=9))


@model
def one_row(file: File) -> int:
    source = file.input()
    rows = (0, 2, 0, 0), (1, 3, WIDTH, CHANNELS), (1, 1, 1, 1)
    return file.dense(file.sliced(source, (1, WIDTH, CHANNELS), rows, shrink_axis_mask=2))


@model
def sized_slice(file: File) -> int:
    source = file.conv(file.input(), 4)
    lists = file.list_of(0, 1, 0, 1), file.list_of(1, 3, -1, 2)
    return file.dense(file.moved("SLICE", [source, *lists], (1, 3, WIDTH, 2)))


def _joined(axis: int) -> None:
    def build(file: File) -> int:
        source = file.input()
        first = file.pool("MAX_POOL_2D", source, (1, 1))
        second = file.pool("MAX_POOL_2D", source, (3, 3), stride_h=1, stride_w=1)
        shape = list(INPUT)
        shape[axis] *= 3
        options = {"axis": axis if axis < 3 else -1, "fused_activation_function": 0}
        return file.conv(
            file.moved("CONCATENATION", [first, second, source], tuple(shape), **options)
        )

    FAMILY[f"concatenation_along_{axis}"] = build


for _axis in (1, 2, 3):
    _joined(_axis)


@model
def padded(file: File) -> int:
    source = file.conv(file.input(), 4)
    table = np.array([[0, 0], [1, 2], [0, 1], [0, 0]], np.int32)
    rows = file.tensor((4, 2), None, "INT32", table)
    wide = file.moved("PAD", [source, rows], (1, HEIGHT + 3, WIDTH + 1, 4))
    return file.dense(file.conv(wide, same=False))


@model
def padded_with_a_value(file: File) -> int:
    source = file.conv(file.input(), 4)
    table = np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32)
    rows = file.tensor((4, 2), None, "INT32", table)
    scale = file.scales[source]
    value = file.tensor((1,), scale, data=np.array([scale[1]], np.int8))
    shape = (1, HEIGHT + 2, WIDTH + 2, 4)
    return file.dense(file.moved("PADV2", [source, rows, value], shape))


@model
def padded_channels(file: File) -> int:
    source = file.conv(file.input(), 4)
    table = np.array([[0, 0], [0, 1], [0, 0], [2, 1]], np.int32)
    rows = file.tensor((4, 2), None, "INT32", table)
    return file.conv(file.moved("PAD", [source, rows], (1, HEIGHT + 1, WIDTH, 7)))


@model
def padded_features(file: File) -> int:
    hidden = file.dense(file.input(), 9)
    rows = file.tensor((2, 2), None, "INT32", np.array([[0, 0], [3, 4]], np.int32))
    return file.dense(file.moved("PAD", [hidden, rows], (1, 16)))


@model
def squeezed(file: File) -> int:
    source = file.conv(file.input(), 12)
    pooled = file.pool("AVERAGE_POOL_2D", source, (HEIGHT, WIDTH), padding=1)
    flat = file.moved("SQUEEZE", [pooled], (1, 12), squeeze_dims=np.array([1, 2], np.int32))
    return file.dense(flat)


@model
def expanded(file: File) -> int:
    hidden = file.dense(file.input(), 12)
    axis = file.tensor((), None, "INT32", np.array(1, np.int32))
    wide = file.moved("EXPAND_DIMS", [hidden, axis], (1, 1, 12))
    again = file.list_of(1)
    return file.conv(file.moved("EXPAND_DIMS", [wide, again], (1, 1, 1, 12)), 5, (1, 1))


@model
def flattened_by_its_shape(file: File) -> int:
    """Keras' Flatten where the batch was free: the new shape is computed from the old one."""
    layer = file.conv(file.input(), 4)
    size = HEIGHT * WIDTH * 4
    shape = file.op("SHAPE", [layer], (4,), None, {"out_type": 2}, "INT32")
    ends = [file.list_of(value) for value in (0, 1, 1)]
    masks = {"shrink_axis_mask": 1}
    batch = file.op("STRIDED_SLICE", [shape, *ends], (), None, masks, "INT32")
    rest = file.tensor((), None, "INT32", np.array(-1, np.int32))
    packed = {"values_count": 2, "axis": 0}
    wanted = file.op("PACK", [batch, rest], (2,), None, packed, "INT32")
    return file.dense(file.moved("RESHAPE", [layer, wanted], (1, size)))


# ---------------------------------------------------------------------- means
def _mean(keep: bool) -> None:
    def build(file: File) -> int:
        source = file.conv(file.input(), 8)
        scale = file.scales[source][0] * 0.4, -7
        axes = file.list_of(1, 2) if keep else file.list_of(2, 1)
        shape = (1, 1, 1, 8) if keep else (1, 8)
        return file.dense(file.op("MEAN", [source, axes], shape, scale, {"keep_dims": int(keep)}))

    FAMILY["mean_keeping_dimensions" if keep else "mean"] = build


_mean(True)
_mean(False)


# ---------------------------------------------------------------------- linear layers
@model
def dense_without_bias(file: File) -> int:
    return file.dense(file.conv(file.input(), activation=1), bias=False)


@model
def convolution_without_bias(file: File) -> int:
    return file.dense(file.conv(file.input(), bias=False))


@model
def one_scale_for_all_channels(file: File) -> int:
    layer = file.conv(file.input(), per_channel=False)
    return file.dense(file.conv(layer, depthwise=1, per_channel=False), per_channel=False)


@model
def strides_and_dilations(file: File) -> int:
    layer = file.conv(file.input(), stride=(2, 1), same=False)
    return file.conv(layer, 5, (2, 2), dilation=(1, 2), same=False, activation=3)


@model
def depth_multiplier(file: File) -> int:
    layer = file.conv(file.input(), depthwise=3, activation=1)
    return file.dense(file.conv(layer, depthwise=1, stride=(2, 2), kernel=(3, 3), same=False))


@model
def packed_weights(file: File) -> int:
    layer = file.conv(file.input(), int4=True)
    return file.dense(layer, int4=True, per_channel=False)


@model
def kept_dimensions(file: File) -> int:
    layer = file.conv(file.input(), 8)
    pooled = file.pool("AVERAGE_POOL_2D", layer, (HEIGHT, WIDTH), padding=1)
    return file.dense(pooled, keep=True, per_channel=False)


@model
def rows_of_three_dimensions(file: File) -> int:
    source = file.input((1, 7, 12))
    return file.dense(file.rows(file.rows(source, 9), 17))


@model
def rows_of_four_dimensions(file: File) -> int:
    return file.dense(file.rows(file.conv(file.input(), 20), 8))


@model
def pools(file: File) -> int:
    layer = file.conv(file.input(), 8)
    layer = file.pool("AVERAGE_POOL_2D", layer, (2, 3), stride_h=1, stride_w=2)
    return file.dense(file.pool("MAX_POOL_2D", layer, (3, 2), stride_h=2, stride_w=1, padding=1))


@model
def residual(file: File) -> int:
    source = file.input()
    layer = file.conv(source, CHANNELS, activation=1)
    layer = file.combined("ADD", file.conv(layer, CHANNELS), source, activation=1)
    axes = file.list_of(1, 2)
    scale = file.scales[layer]
    return file.dense(file.op("MEAN", [layer, axes], (1, CHANNELS), scale, {"keep_dims": 0}))


# ---------------------------------------------------------------------- edges
def _decided(kind: str) -> None:
    def build(file: File) -> int:
        logits = file.dense(file.conv(file.input()))
        axis = file.tensor((), None, "INT32", np.array(1 if kind == "INT32" else -1, np.int32))
        options: dict[str, object] = {"output_type": schema.TYPE_CODES[kind]}
        return file.op("ARG_MAX", [logits, axis], (1,), None, options, kind)

    FAMILY[f"arg_max_{kind.lower()}"] = build


_decided("INT32")
_decided("INT64")


@model
def softmax(file: File) -> int:
    logits = file.dense(file.conv(file.input()))
    return file.op("SOFTMAX", [logits], (1, 10), (1 / 256, -128), {"beta": pattern(1.0)})


@model
def float_edges(file: File) -> int:
    source = file.tensor(INPUT, None, "FLOAT32")
    stored = file.op("QUANTIZE", [source], INPUT, file.scale())
    logits = file.dense(file.conv(stored))
    return file.op("DEQUANTIZE", [logits], (1, 10), None, None, "FLOAT32")
