"""Files with int16 activations and int8 weights, as other converters write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cactus_edge.flatbuffer import schema
from tests.foreign_file import CHANNELS, HEIGHT, INPUT, WIDTH, File, Scale, Shape

# What the reference converter writes.
VERSIONS = {
    "CONV_2D": 4,
    "DEPTHWISE_CONV_2D": 5,
    "FULLY_CONNECTED": 7,
    "ADD": 4,
    "AVERAGE_POOL_2D": 3,
    "MAX_POOL_2D": 3,
    "QUANTIZE": 2,
    "DEQUANTIZE": 3,
    "CONCATENATION": 3,
    "TRANSPOSE": 4,
    "STRIDED_SLICE": 4,
}


class Wide(File):
    """Tensors are int16 where nothing else is said; biases are int64."""

    def scale(self) -> Scale:
        return float(10 ** self.rng.uniform(-4.4, -3.9)), 0

    def input(self, shape: Shape = INPUT, scale: Scale | None = None, kind: str = "INT16") -> int:
        return super().input(shape, scale, kind)

    def op(
        self,
        kind: str,
        inputs: Sequence[int],
        shape: Shape,
        scale: Scale | None,
        options: dict[str, object] | None = None,
        output: str = "INT16",
    ) -> int:
        index = super().op(kind, inputs, shape, scale, options, output)
        types = {self.tensors[i]["type"] for i in (*inputs, index) if i >= 0}
        if schema.TYPE_CODES["INT16"] in types:
            wanted = (kind, VERSIONS.get(kind, schema.KINDS[kind].version))
            if wanted not in self.codes:
                self.codes.append(wanted)
            self.operators[-1]["opcode_index"] = self.codes.index(wanted)
        return index

    def linear(
        self,
        source: int,
        kind: str,
        weights: Shape,
        shape: Shape,
        options: dict[str, object],
        *,
        per_channel: bool = True,
        bias: bool = True,
        int4: bool = False,
        spread: float = 1.0,
        bias_type: str = "INT64",
        fine: bool = False,
    ) -> int:
        """A layer whose outputs fill their range."""
        axis = 3 if kind == "DEPTHWISE_CONV_2D" else 0
        channels = weights[axis]
        values = self.rng.integers(-127, 128, weights).astype(np.int8)
        target = self.scale()
        gain = 20000 * spread / (74 * 19000 * np.sqrt(values.size / channels))
        factors = gain * self.rng.uniform(0.5, 1.5, channels if per_channel else 1)
        scales = np.asarray(factors * target[0] / self.scales[source][0], np.float32)
        while fine and not _told_apart(self.scales[source][0], scales, target[0]):
            scales = np.asarray(scales * self.rng.uniform(0.999, 1.001), np.float32)
        tensor = self.tensor(weights, None, "INT8", values, scales, axis if per_channel else 0)
        stored = self.rng.integers(-9000, 9001, channels) / np.broadcast_to(factors, channels)
        data = np.rint(stored).astype("<i8" if bias_type == "INT64" else "<i4")
        bias_scales = np.asarray(np.float32(self.scales[source][0]) * scales, np.float32)
        inputs = [source, tensor]
        if bias:
            inputs.append(self.tensor((channels,), None, bias_type, data, bias_scales, 0))
        return self.op(kind, inputs, shape, target, options)

    def added(self, a: int, b: int, activation: int = 0, pot: int = 0) -> int:
        scale = max(self.scales[a][0], self.scales[b][0]) * 1.7, 0
        options: dict[str, object] = {
            "fused_activation_function": activation,
            "pot_scale_int16": pot,
        }
        return self.op("ADD", [a, b], self.shapes[a], scale, options)

    def narrow(self) -> Narrow:
        """The same file, to which int8 layers are added."""
        return Narrow(**vars(self))


class Narrow(File):
    """Int8 layers in a file with int16 ones."""


Build = Callable[[Wide], int]
FAMILY: dict[str, Build] = {}


def model(build: Build) -> Build:
    FAMILY[build.__name__] = build
    return build


def made(name: str, seed: int = 0) -> bytes:
    """The bytes of a model of the family."""
    file = Wide(np.random.default_rng((seed, 16, list(FAMILY).index(name))))
    return file.bytes(FAMILY[name](file))


@model
def convolutions(file: Wide) -> int:
    found = file.conv(file.input(), activation=1)
    found = file.conv(found, 5, (2, 3), (2, 1), (1, 2), same=False, per_channel=False)
    return file.conv(found, 7, (1, 1), activation=1)


@model
def six(file: Wide) -> int:
    return file.conv(file.input(), activation=3)


@model
def depthwise(file: Wide) -> int:
    found = file.conv(file.input(), depthwise=1, activation=1)
    return file.conv(found, depthwise=2, stride=(2, 2))


@model
def dense_layers(file: Wide) -> int:
    found = file.dense(file.input((1, 40)), 24)
    return file.dense(found, per_channel=False)


def _told_apart(source: float, weight: npt.NDArray[np.float32], target: float) -> bool:
    """Whether 15 bits show if a runtime forms the product of scales in float32 or in float64."""
    wide = np.float64(np.float32(source)) * np.float64(weight[0]) / np.float32(target)
    narrow = np.float64(np.float32(source) * weight[0]) / np.float32(target)
    bits = [np.floor(np.frexp(factor)[0] * 2.0**15 + 0.5) for factor in (wide, narrow)]
    return bool(bits[0] != bits[1])


@model
def product_of_scales(file: Wide) -> int:
    return file.dense(file.input((1, 40)), 24, per_channel=False, fine=True)


@model
def classifier(file: Wide) -> int:
    found = file.conv(file.input(), activation=1)
    found = file.pool("MAX_POOL_2D", found, (2, 2))
    found = file.conv(found, 6, activation=1)
    size = int(np.prod(file.shapes[found]))
    flat = file.moved(
        "RESHAPE", [found, file.list_of(1, size)], (1, size), new_shape=np.array([1, size])
    )
    return file.dense(flat)


@model
def residual_sums(file: Wide) -> int:
    first = file.conv(file.input(), activation=1)
    second = file.conv(first)
    return file.dense(file.added(first, second, activation=1))


@model
def equal_sums(file: Wide) -> int:
    """LiteRT's optimized kernel is described for operands of one scale alone."""
    first = file.conv(file.input(), activation=1)
    return file.added(first, file.pool("MAX_POOL_2D", first, (3, 3), stride_h=1, stride_w=1))


@model
def averages(file: Wide) -> int:
    found = file.pool("AVERAGE_POOL_2D", file.input(), (2, 3), stride_h=1, stride_w=2)
    return file.pool("AVERAGE_POOL_2D", found, (2, 2), padding=1, fused_activation_function=1)


@model
def padded(file: Wide) -> int:
    source = file.input()
    rows = file.tensor((4, 2), None, "INT32", np.array([[0, 0], [1, 0], [2, 1], [0, 0]], np.int32))
    found = file.moved("PAD", [source, rows], (1, HEIGHT + 1, WIDTH + 3, CHANNELS))
    return file.conv(found, same=False)


@model
def relu_rescales(file: Wide) -> int:
    return file.unary("RELU", file.conv(file.input()))


@model
def requantized(file: Wide) -> int:
    found = file.unary("QUANTIZE", file.input(), (3e-4, 0))
    return file.conv(file.unary("QUANTIZE", found, (7e-5, 0)))


@model
def to_int8(file: Wide) -> int:
    found = file.conv(file.input())
    return file.op("QUANTIZE", [found], file.shapes[found], (0.017, -9), None, "INT8")


@model
def int8_in_between(file: Wide) -> int:
    found = file.conv(file.input())
    found = file.op("QUANTIZE", [found], file.shapes[found], (0.017, -9), None, "INT8")
    found = file.narrow().conv(found, activation=1)
    found = file.op("QUANTIZE", [found], file.shapes[found], (2e-4, 0), None, "INT16")
    return file.dense(found)


@model
def moved_elements(file: Wide) -> int:
    found = file.conv(file.input())
    _, height, width, channels = file.shapes[found]
    both = file.moved("CONCATENATION", [found, found], (1, height, width, 2 * channels), axis=3)
    return file.sliced(
        both, (1, 3, width, channels), ((0, 1, 0, 1), (1, 6, width, 16), (1, 2, 1, 2))
    )


@model
def real_edges(file: Wide) -> int:
    source = file.tensor((1, 12), None, "FLOAT32")
    stored = file.op("QUANTIZE", [source], (1, 12), (1 / 32767, 0))
    found = file.dense(file.dense(stored, 16))
    return file.op("DEQUANTIZE", [found], (1, 10), None, None, "FLOAT32")
