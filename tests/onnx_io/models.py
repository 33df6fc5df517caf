"""ONNX models node by node, and random ones over all operators that are imported."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray


class Maker:
    """A graph under construction; ``at`` is the tensor that the next node reads."""

    def __init__(self, shape: tuple[Any, ...], opset: int = 17) -> None:
        self.shape, self.opset = shape, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.at = "x"

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def add(self, kind: str, *inputs: str, at: str | None = None, **attributes: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        sources = [self.at if at is None else at, *inputs]
        self.nodes.append(helper.make_node(kind, sources, [f"{name}_out"], name, **attributes))
        self.at = f"{name}_out"
        return self.at

    def content(self, outputs: tuple[str, ...] = (), elements: int = TensorProto.FLOAT) -> bytes:
        source = helper.make_tensor_value_info("x", elements, self.shape)
        targets = [
            helper.make_tensor_value_info(name, elements, ["n", "classes"])
            for name in outputs or (self.at,)
        ]
        graph = helper.make_graph(self.nodes, "main", [source], targets, self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


class RandomModel(Maker):
    """A classifier of small images; ``shape`` and what else is drawn follow from the seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.channels, self.side = int(self.rng.integers(1, 4)), int(self.rng.integers(5, 8))
        self.last = bool(self.rng.integers(2))  # NHWC, as Keras exports
        image = (self.side, self.side)
        shape = (*image, self.channels) if self.last else (self.channels, *image)
        super().__init__(("n", *shape), int(self.rng.choice([13, 17, 21])))
        if self.last:
            self.add("Transpose", perm=(0, 3, 1, 2))
        self.height, self.width = image
        if self.rng.random() < 0.3:
            self._scaled("Sub", 0.5, 0.1)
            self._scaled("Div", 0.4, 0.1)
        for _ in range(int(self.rng.integers(1, 4))):
            self._block()
        self._head()

    def normal(self, *shape: int) -> Array:
        return self.rng.normal(0, 1, shape)

    def _scaled(self, kind: str, mean: float, spread: float) -> None:
        values = mean + spread * self.normal(self.channels, 1, 1)
        self.add(kind, self.constant(values))

    def _block(self) -> None:
        before = self.at
        self._convolution()
        if self.rng.random() < 0.5:
            self._normalization()
        if self.rng.random() < 0.2:
            self._scaled(str(self.rng.choice(["Add", "Mul", "Sub"])), 0.8, 0.3)
        self._activation()
        match self.rng.integers(6):
            case 0:
                self._residual(before)
            case 1:
                self._concatenation()
            case 2:
                self._pool()
            case _:
                pass

    def _convolution(self, out: int = 0) -> None:
        kernel = [int(self.rng.integers(1, 4)) for _ in range(2)]
        groups = int(self.rng.choice([1, 1, self.channels]))
        dilation = [int(self.rng.integers(1, 3)) if k > 1 else 1 for k in kernel]
        stride = [int(self.rng.integers(1, 3)) for _ in range(2)] if not out else [1, 1]
        out = out or groups * int(self.rng.integers(1, 5))
        groups = groups if out % groups == 0 else 1
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        extents = [self.height, self.width]
        options: dict[str, Any] = {}
        if self.rng.random() < 0.3 and dilation == [1, 1]:
            options["auto_pad"] = str(self.rng.choice(["SAME_UPPER", "SAME_LOWER"]))
            sizes = [-(-e // s) for e, s in zip(extents, stride, strict=True)]
        else:
            pads = [int(self.rng.integers(0, 2)) for _ in range(4)]
            need = [r - e for r, e in zip(reach, extents, strict=True)]
            pads = [max(p, need[i % 2]) for i, p in enumerate(pads)]
            options["pads"] = pads
            sizes = [(e + pads[i] + pads[i + 2] - reach[i]) // stride[i] + 1
                     for i, e in enumerate(extents)]  # fmt: skip
        weight = self.normal(out, self.channels // groups, *kernel)
        scale = (np.prod(kernel) * self.channels / groups) ** -0.5
        inputs = [self.constant(weight * scale)]
        if self.rng.random() < 0.7:
            inputs.append(self.constant(0.2 * self.normal(out)))
        self.add(
            "Conv", *inputs, group=groups, strides=stride, dilations=dilation, kernel_shape=kernel,
            **options,
        )  # fmt: skip
        self.channels, (self.height, self.width) = out, sizes

    def _normalization(self) -> None:
        c = self.channels
        parts = [1 + 0.3 * self.normal(c), 0.2 * self.normal(c), 0.2 * self.normal(c)]
        variance = self.rng.uniform(0.5, 1.5, c)
        self.add("BatchNormalization", *(self.constant(v) for v in (*parts, variance)))

    def _activation(self) -> None:
        if (kind := self.rng.random()) < 0.5:
            self.add("Relu")
        elif kind < 0.7:
            self.add("Clip", self.constant(0.0), self.constant(float(self.rng.uniform(0.5, 3))))

    def _residual(self, before: str) -> None:
        del before  # of another shape
        start, channels = self.add("Relu"), self.channels
        kernel = 3 if min(self.height, self.width) >= 3 else 1
        weight = self.normal(channels, channels, kernel, kernel) / (3 * channels**0.5)
        self.add("Conv", self.constant(weight), pads=[kernel // 2] * 4)
        self.add("Add", start)
        if self.rng.random() < 0.5:
            self.add("Relu")

    def _concatenation(self) -> None:
        start = self.at
        parts = [start] if self.rng.random() < 0.5 else []
        total = self.channels * len(parts)
        for _ in range(2):
            out = int(self.rng.integers(1, 4))
            weight = self.normal(out, self.channels, 1, 1) / self.channels**0.5
            self.at = start
            self.add("Conv", self.constant(weight))
            if self.rng.random() < 0.5:
                self.add("Relu")
            parts.append(self.at)
            total += out
        self.add("Concat", *parts[1:], at=parts[0], axis=1)
        self.channels = total

    def _pool(self) -> None:
        window = min(2, self.height, self.width)
        kind = str(self.rng.choice(["MaxPool", "AveragePool"]))
        self.add("Relu")
        options: dict[str, Any] = {}
        before = after = 0
        if self.rng.random() < 0.3:
            before = after = int(window > 1)
            options["pads"] = [before] * 4
            options |= {"count_include_pad": 1} if kind == "AveragePool" else {}
        self.add(kind, kernel_shape=[window] * 2, strides=[window] * 2, **options)
        self.height, self.width = (
            (extent + before + after - window) // window + 1 for extent in (self.height, self.width)
        )

    def _head(self) -> None:
        features = self.channels * self.height * self.width
        if self.last:
            self.add("Transpose", perm=(0, 2, 3, 1))  # Keras flattens channels last
        match self.rng.integers(4):
            case 0:
                self.add("Flatten")
            case 1:
                self.add("Reshape", self.constant([0, -1], np.int64))
            case 2:
                shape, count = self.at, self.constant([features], np.int64)
                self.add("Shape")
                self.add("Gather", self.constant([0], np.int64), axis=0)
                target = self.add("Concat", count, axis=0)
                self.add("Reshape", target, at=shape)
            case _ if not self.last:
                self.add("GlobalAveragePool")
                self.add("Squeeze", self.constant([2, 3], np.int64))
                features = self.channels
            case _:
                self.add("Flatten", axis=1)
        weight = self.normal(features, 5) / features**0.5
        if self.rng.random() < 0.5:
            self.add("Gemm", self.constant(weight), self.constant(0.2 * self.normal(5)))
        else:
            self.add("MatMul", self.constant(weight))
            self.add("Add", self.constant(0.2 * self.normal(5)))
        if self.rng.random() < 0.3:
            self.add("Softmax", axis=-1)

    def samples(self, count: int) -> Array:
        """Images [count, height, width, channels], uint8."""
        extents = self.shape[1:] if self.last else (*self.shape[2:], self.shape[1])
        return self.rng.integers(0, 256, (count, *extents)).astype(np.uint8)
