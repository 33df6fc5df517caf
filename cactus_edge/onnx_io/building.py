"""The network as it is made: what a node reads, and how stages are added or changed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.graph import Int64Array
from cactus_edge.lowering.stages import (
    INPUT,
    NO_PADS,
    Branch,
    FloatArray,
    Layer,
    Stage,
    Sum,
    output_of,
)
from cactus_edge.onnx_io.reading import Array, File, Node
from cactus_edge.onnx_io.values import Value, plain

LARGEST_DENSE = 1 << 24


@dataclass
class Translation:
    """A network.

    Attributes:
        shape: of the input, (C, H, W) or (F,).
        order: for each element of the file's input its position in ``shape``.
        stages: in order.
        notes: what the stages do not have, and why that changes nothing.
        tail: operators after the logits that change no decision, for comparisons.
    """

    shape: tuple[int, ...]
    order: Int64Array
    stages: list[Stage] = field(default_factory=list[Stage])
    notes: list[str] = field(default_factory=list[str])
    tail: list[str] = field(default_factory=list[str])


class Builder:
    """Values by tensor, shapes without batch by stage, constants, and the stages so far."""

    def __init__(self, file: File) -> None:
        """Nothing but the input is known."""
        self.file = file
        self.constants: dict[str, Array] = dict(file.constants)
        self.uses: dict[str, int] = {file.output: 1}
        for node in file.nodes:
            for name in node.inputs:
                self.uses[name] = self.uses.get(name, 0) + 1
        self.values = {file.input: plain(INPUT, file.shape[1:], self.alone(file.input))}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.order: Int64Array | None = None
        self.made = Translation((), np.zeros(0, np.int64))

    def alone(self, name: str) -> bool:
        """Whether one node alone reads a tensor."""
        return self.uses.get(name, 0) == 1

    def value(self, node: Node, position: int = 0) -> Value:
        """An operand that depends on the input."""
        name = node.inputs[position]
        if name not in self.values:
            raise node.error(f"input '{name}' must come from the input, not be a constant")
        return self.values[name]

    def constant(self, node: Node, position: int) -> Array | None:
        """A constant input; None where it is left out."""
        if position >= len(node.inputs) or not node.inputs[position]:
            return None
        name = node.inputs[position]
        if name not in self.constants:
            raise node.error(
                f"input '{name}' is computed from the input", "only constants are supported there"
            )
        return self.constants[name]

    def required(self, node: Node, position: int) -> FloatArray:
        """A constant input that may not be left out, float64."""
        value = self.constant(node, position)
        if value is None:
            raise node.error(f"input {position} is missing")
        if value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            raise node.error(f"input '{node.inputs[position]}' does not hold finite numbers")
        return value.astype(np.float64)

    def settle(self, value: Value) -> Value:
        """``value``; the first operator that computes says how the input's elements are ordered."""
        if value.source != INPUT:
            return value
        if self.order is None:
            self.order = np.argsort(value.index.ravel())
            self.shapes[INPUT] = value.shape[1:]
        return replace(value, index=self.order[value.index])

    def image(self, node: Node, position: int = 0) -> tuple[Value, tuple[int, ...]]:
        """An operand [1, C, H, W] and its shape without batch."""
        value = self.settle(self.value(node, position))
        if len(value.shape) != 4 or value.shape[1:] != self.shapes[value.source]:
            raise node.error(
                f"its input is {list(value.shape)}, from {list(self.shapes[value.source])}",
                "images are [batch, channels, height, width] throughout",
            )
        if not value.is_plain:
            raise node.error("its input is a transposed image", "transpose the input or the output")
        return value, value.shape[1:]

    def read(self, name: str, value: Value) -> None:
        """Let the next stage read a value's source."""
        current = output_of(self.made.stages[-1]) if self.made.stages else INPUT
        if value.source != current:
            self.made.stages.append(Branch(f"{name}/from", value.source))

    def emit(self, stage: Stage) -> None:
        """Add a stage."""
        self.made.stages.append(stage)

    def give(self, node: Node, shape: tuple[int, ...], source: str = "") -> None:
        """The node's output is all of a new stage's."""
        source = source or node.output
        self.shapes[source] = shape
        self.values[node.output] = plain(source, shape, self.alone(node.output))

    def maker(self, value: Value) -> int | None:
        """The stage that made a value, if it may still be changed."""
        if not value.alone or value.pads != NO_PADS:
            return None
        for index, stage in enumerate(self.made.stages):
            if isinstance(stage, Layer | Sum) and stage.output == value.source:
                return None if stage.relu else index
        return None

    def change(self, node: Node, value: Value, index: int, stage: Layer | Sum) -> None:
        """Replace the stage that made a value by one that yields the node's output."""
        self.made.stages[index] = replace(stage, output=node.output)
        self.shapes[node.output] = self.shapes[value.source]
        moved = replace(value, source=node.output)
        self.values[node.output] = moved.moved(value.index, self.alone(node.output))

    def add(self, name: str, output: str, first: Value, second: str) -> None:
        """Add a sum of ``first`` and all of what ``second`` names."""
        current = output_of(self.made.stages[-1]) if self.made.stages else INPUT
        if current == second:
            second = first.source
        else:
            self.read(name, first)
        self.emit(Sum(name, output, second))

    def scale(self, node: Node, value: Value, factor: Array, offset: Array) -> None:
        """``value * factor + offset``, constants that broadcast against ``value``."""
        shape = self.shapes[value.source]
        if value.pads != NO_PADS:
            raise node.error("it reads a Pad", "pad in the convolution or pool itself")
        channels: list[FloatArray] = []
        for constant in (factor, offset):
            try:
                whole = np.broadcast_to(constant, value.shape)
            except ValueError:
                raise node.error(
                    f"a constant {list(constant.shape)} and activations {list(value.shape)}",
                    "constants must spread over the activations",
                ) from None
            ordered = np.empty(value.index.size)
            ordered[value.index.ravel()] = whole.ravel()
            ordered = ordered.reshape(shape[0], -1)
            if (ordered != ordered[:, :1]).any():
                raise node.error("its constant differs within a channel", "use one per channel")
            channels.append(ordered[:, 0])
        index = self.maker(value)
        stage = None if index is None else self.made.stages[index]
        if index is not None and isinstance(stage, Layer):
            weight = stage.weight * channels[0].reshape(-1, *[1] * (stage.weight.ndim - 1))
            bias = stage.bias * channels[0] + channels[1]
            self.change(node, value, index, replace(stage, weight=weight, bias=bias))
            return
        self.read(node.name, value)
        self.emit(self.spread(node.name, value, channels[0], channels[1], node.output))
        self.shapes[node.output] = shape
        moved = replace(value, source=node.output, alone=True)
        self.values[node.output] = moved.moved(value.index, self.alone(node.output))

    def spread(
        self, name: str, value: Value, factor: FloatArray, offset: FloatArray, output: str = ""
    ) -> Layer:
        """A layer that only scales and shifts channels."""
        shape, output = self.shapes[value.source], output or name
        if len(shape) == 3:
            weight = factor.reshape(-1, 1, 1, 1)
            return Layer(name, output, weight, offset, groups=len(factor))
        if len(factor) ** 2 > LARGEST_DENSE:
            raise UnsupportedModelError(
                f"node '{name}': {len(factor)} features that no layer has made are too many to be "
                "scaled or clipped by one; put a layer before them"
            )
        return Layer(name, output, np.diag(factor), offset)
