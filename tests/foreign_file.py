"""A `.tflite` file as another converter writes it, tensor by tensor and table by table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cactus_edge.flatbuffer import schema
from cactus_edge.flatbuffer.packing import pack_int4
from cactus_edge.flatbuffer.wire import serialize

Shape = tuple[int, ...]
Scale = tuple[float, int]
HEIGHT, WIDTH, CHANNELS = 6, 5, 6
INPUT: Shape = (1, HEIGHT, WIDTH, CHANNELS)


def pattern(value: float) -> int:
    """The bit pattern of a float32."""
    return int(np.float32(value).view(np.uint32))


@dataclass
class File:
    """A model as it grows; methods return tensor indices. Tensor 0 is the input."""

    rng: np.random.Generator
    shapes: list[Shape] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    tensors: list[dict[str, object]] = field(default_factory=list)
    buffers: list[dict[str, object]] = field(default_factory=lambda: [{}])
    codes: list[tuple[str, int]] = field(default_factory=list)
    operators: list[dict[str, object]] = field(default_factory=list)

    def scale(self) -> Scale:
        low, high = (-128, 128) if self.rng.random() < 0.7 else (-128, -127)
        return float(10 ** self.rng.uniform(-1.9, -1.2)), int(self.rng.integers(low, high))

    def tensor(
        self,
        shape: Shape,
        scale: Scale | None,
        kind: str = "INT8",
        data: np.ndarray | None = None,
        channel_scales: np.ndarray | None = None,
        axis: int = 0,
    ) -> int:
        values: dict[str, object] = {"shape": shape, "type": schema.TYPE_CODES[kind]}
        values["name"] = f"t{len(self.tensors)}"
        if channel_scales is not None:
            bits = channel_scales.astype(np.float32).view(np.uint32)
            values["quantization"] = {
                "scale": bits,
                "zero_point": np.zeros(bits.size, np.int64),
                "quantized_dimension": axis,
            }
        elif scale is not None:
            values["quantization"] = {"scale": [pattern(scale[0])], "zero_point": [scale[1]]}
        if data is not None:
            self.buffers.append({"data": np.ascontiguousarray(data).tobytes()})
            values["buffer"] = len(self.buffers) - 1
        self.tensors.append(values)
        self.shapes.append(shape)
        self.scales.append(scale or (0.0, 0))
        return len(self.tensors) - 1

    def input(self, shape: Shape = INPUT, scale: Scale | None = None, kind: str = "INT8") -> int:
        return self.tensor(shape, scale or self.scale(), kind)

    def list_of(self, *values: int) -> int:
        return self.tensor((len(values),), None, "INT32", np.array(values, np.int32))

    def op(
        self,
        kind: str,
        inputs: Sequence[int],
        shape: Shape,
        scale: Scale | None,
        options: dict[str, object] | None = None,
        output: str = "INT8",
    ) -> int:
        index = self.tensor(shape, scale, output)
        entry = (kind, schema.KINDS[kind].version)
        if entry not in self.codes:
            self.codes.append(entry)
        values: dict[str, object] = {
            "opcode_index": self.codes.index(entry),
            "inputs": np.array(inputs, np.int32),
            "outputs": [index],
        }
        if options is not None:
            values["builtin_options_type"] = schema.KINDS[kind].options_type
            values["builtin_options"] = (schema.KINDS[kind].options, options)
        self.operators.append(values)
        return index

    def bytes(self, output: int) -> bytes:
        codes = [
            {
                "deprecated_builtin_code": min(schema.KINDS[kind].code, 127),
                "builtin_code": schema.KINDS[kind].code,
                "version": version,
            }
            for kind, version in self.codes
        ]
        subgraph = {
            "tensors": self.tensors,
            "inputs": [0],
            "outputs": [output],
            "operators": self.operators,
            "name": "main",
        }
        return serialize(
            {
                "version": 3,
                "operator_codes": codes,
                "subgraphs": [subgraph],
                "description": "another converter",
                "buffers": self.buffers,
            }
        )

    # ------------------------------------------------------------------ layers
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
    ) -> int:
        """A layer whose outputs fill their range."""
        axis = 3 if kind == "DEPTHWISE_CONV_2D" else 0
        channels = weights[axis]
        most = 7 if int4 else 127
        values = self.rng.integers(-most, most + 1, weights).astype(np.int8)
        depth = values.size / channels
        target = self.scale()
        gain = 40 * spread / (most * 0.58 * 74 * np.sqrt(depth))
        factors = gain * self.rng.uniform(0.5, 1.5, channels if per_channel else 1)
        scales = np.float32(factors * target[0] / self.scales[source][0])
        tensor = self.tensor(
            weights,
            None,
            "INT4" if int4 else "INT8",
            pack_int4(values) if int4 else values,
            scales,
            axis if per_channel else 0,
        )
        inputs = [source, tensor]
        if bias:
            stored = self.rng.integers(-40, 41, channels) / np.broadcast_to(factors, channels)
            bias_scales = np.float32(self.scales[source][0]) * scales
            data = np.rint(stored).astype("<i4")
            inputs.append(self.tensor((channels,), None, "INT32", data, bias_scales, 0))
        elif kind == "FULLY_CONNECTED":
            inputs.append(-1)
        return self.op(kind, inputs, shape, target, options)

    def conv(
        self,
        source: int,
        channels: int = 8,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        same: bool = True,
        activation: int = 0,
        depthwise: int = 0,
        **how: bool,
    ) -> int:
        """CONV_2D, or DEPTHWISE_CONV_2D with a multiplier."""
        _, height, width, depth = self.shapes[source]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        extents = [
            -(-e // s) if same else (e - r) // s + 1
            for e, r, s in zip((height, width), reach, stride, strict=True)
        ]
        options: dict[str, object] = {
            "padding": 0 if same else 1,
            "stride_h": stride[0],
            "stride_w": stride[1],
            "dilation_h_factor": dilation[0],
            "dilation_w_factor": dilation[1],
            "fused_activation_function": activation,
        }
        if depthwise:
            options["depth_multiplier"] = depthwise
            channels = depth * depthwise
            kind, weights = "DEPTHWISE_CONV_2D", (1, *kernel, channels)
        else:
            kind, weights = "CONV_2D", (channels, *kernel, depth)
        return self.linear(source, kind, weights, (1, *extents, channels), options, **how)

    def dense(self, source: int, outputs: int = 10, keep: bool = False, **how: bool) -> int:
        """FULLY_CONNECTED of all elements, or of one row with ``keep``."""
        shape = self.shapes[source]
        depth = int(np.prod(shape))
        output = (*shape[:-1], outputs) if keep else (1, outputs)
        options: dict[str, object] = {"fused_activation_function": 0, "keep_num_dims": int(keep)}
        return self.linear(source, "FULLY_CONNECTED", (outputs, depth), output, options, **how)

    def rows(self, source: int, outputs: int) -> int:
        """FULLY_CONNECTED of every row."""
        shape = self.shapes[source]
        options: dict[str, object] = {"fused_activation_function": 1, "keep_num_dims": 1}
        weights, output = (outputs, shape[-1]), (*shape[:-1], outputs)
        return self.linear(source, "FULLY_CONNECTED", weights, output, options, per_channel=False)

    def unary(self, kind: str, source: int, scale: Scale | None = None, **options: object) -> int:
        target = self.scale() if scale is None else scale
        return self.op(kind, [source], self.shapes[source], target, options or None)

    def pool(self, kind: str, source: int, window: tuple[int, int], **options: int) -> int:
        _, height, width, channels = self.shapes[source]
        stride = (options.get("stride_h", window[0]), options.get("stride_w", window[1]))
        same = options.get("padding", 0) == 0
        extents = [
            -(-e // s) if same else (e - w) // s + 1
            for e, w, s in zip((height, width), window, stride, strict=True)
        ]
        values = {
            "padding": 0,
            "stride_h": stride[0],
            "stride_w": stride[1],
            "filter_height": window[0],
            "filter_width": window[1],
            **options,
        }
        return self.op(kind, [source], (1, *extents, channels), self.scales[source], values)

    def combined(self, kind: str, a: int, b: int, activation: int = 0) -> int:
        """ADD, SUB or MUL; the shape is that of the larger operand."""
        shape = max(self.shapes[a], self.shapes[b], key=lambda s: (np.prod(s), len(s)))
        product = self.scales[a][0] * self.scales[b][0]
        sizes = {"MUL": product * 60, "ADD": max(self.scales[a][0], self.scales[b][0]) * 1.7}
        scale = sizes.get(kind, sizes["ADD"]), int(self.rng.integers(-128, 60))
        return self.op(kind, [a, b], shape, scale, {"fused_activation_function": activation})

    def constant(self, shape: Shape) -> int:
        return self.tensor(
            shape, self.scale(), data=self.rng.integers(-128, 128, shape).astype(np.int8)
        )

    def moved(self, kind: str, inputs: Sequence[int], shape: Shape, **options: object) -> int:
        return self.op(kind, inputs, shape, self.scales[inputs[0]], options or None)

    def sliced(self, source: int, shape: Shape, rows: Sequence[Sequence[int]], **masks: int) -> int:
        lists = [self.list_of(*row) for row in rows]
        return self.moved("STRIDED_SLICE", [source, *lists], shape, **{"end_mask": 0, **masks})
