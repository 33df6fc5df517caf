"""Small graphs built layer by layer, in which a test says which weights are zero."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cactus_edge import profiles
from cactus_edge.graph import (
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    DType,
    FullyConnected,
    Graph,
    MaxPool2D,
    Operator,
    Pad,
    Padding,
    Quantization,
    Requantization,
    Reshape,
    Tensor,
    Weights,
    window_geometry,
)
from cactus_edge.semantics import Rounding

ZERO = -7
"""The zero point of every tensor."""


@dataclass
class Chain:
    """Layers one behind the other, all with zero point ``ZERO`` and factors of 2**-8."""

    shape: tuple[int, ...]
    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(3))

    def __post_init__(self) -> None:
        self._tensor(self.shape)

    @property
    def here(self) -> int:
        """The last tensor."""
        return len(self.tensors) - 1

    def _tensor(self, shape: tuple[int, ...]) -> None:
        name = f"t{len(self.tensors)}"
        self.tensors.append(Tensor(name, shape, DType.INT8, Quantization.of(0.5, ZERO)))
        self.shape = shape

    def _head(self, *inputs: int) -> dict[str, object]:
        inputs = inputs or (self.here,)
        return {"name": f"op{len(self.operators)}", "inputs": inputs, "output": len(self.tensors)}

    def linear(
        self,
        out: int,
        *,
        kernel: int = 0,
        dead: tuple[int, ...] = (),
        unread: tuple[int, ...] = (),
        bias: int = 0,
        padding: Padding = Padding.VALID,
        bits: int = 8,
        split: bool = False,
        source: int | None = None,
    ) -> Chain:
        """A layer; a convolution if it has a kernel. Dead rows are at the zero point plus bias.

        ``split``: the first half of the output reads the first half of the input alone, the second
        half the second.
        """
        source = self.here if source is None else source
        before = self.tensors[source]
        last = before.shape[-1]
        shape = (out, kernel, kernel, last) if kernel else (out, before.size)
        least = 1 << (bits - 1)
        values = self.rng.integers(1, least, shape) * self.rng.choice((-1, 1), shape)
        values[list(dead)] = 0
        values.reshape(out, -1, last)[..., list(unread)] = 0
        if split:
            values.reshape(out, -1, last)[: out // 2, :, last // 2 :] = 0
            values.reshape(out, -1, last)[out // 2 :, :, : last // 2] = 0
        biases = self.rng.integers(-900, 900, out)
        biases[list(dead)] = bias << 8
        common = {
            **self._head(source),
            "weights": Weights(values, bits, np.arange(out) + 0x3C000000 if bits == 8 else []),
            "bias": biases,
            "requantization": Requantization(
                np.int64(Rounding.SINGLE), (1 << 30) + np.arange(out), np.int64(38)
            ),
        }
        if not kernel:
            self.operators.append(FullyConnected(**common))  # type: ignore
            self._tensor((1, out))
            return self
        self.operators.append(Conv2D(padding=padding, **common))  # type: ignore
        extents = [window_geometry(e, kernel, 1, 1, padding)[0] for e in before.shape[1:3]]
        self._tensor((1, *extents, out))
        return self

    def depthwise(self, *, multiplier: int = 1, dead: tuple[int, ...] = (), bias: int = 0) -> Chain:
        """SAME, 3 x 3."""
        out = self.shape[-1] * multiplier
        values = self.rng.integers(1, 128, (1, 3, 3, out))
        values[..., list(dead)] = 0
        biases = self.rng.integers(-900, 900, out)
        biases[list(dead)] = bias << 8
        op = DepthwiseConv2D(
            **self._head(),  # type: ignore
            weights=Weights(values),
            bias=biases,
            padding=Padding.SAME,
            requantization=Requantization.uniform(Rounding.SINGLE, 1 << 30, 38, out),
        )
        self.operators.append(op)
        self._tensor((*self.shape[:-1], out))
        return self

    def pool(self, kind: type[MaxPool2D] | type[AveragePool2D]) -> Chain:
        """SAME, 2 x 2."""
        head = self._head()
        op = kind(**head, window=(2, 2), stride=(2, 2), padding=Padding.SAME)  # type: ignore
        self.operators.append(op)
        _, height, width, last = self.shape
        self._tensor((1, -(-height // 2), -(-width // 2), last))
        return self

    def pad(self) -> Chain:
        paddings = ((0, 0), (1, 0), (0, 2), (0, 0))
        self.operators.append(Pad(**self._head(), paddings=paddings))  # type: ignore
        _, height, width, last = self.shape
        self._tensor((1, height + 1, width + 2, last))
        return self

    def reshape(self, *shape: int) -> Chain:
        self.operators.append(Reshape(**self._head()))  # type: ignore
        self._tensor((1, *shape))
        return self

    def add(self, a: int, b: int) -> Chain:
        self.operators.append(Add(**self._head(a, b)))  # type: ignore
        self._tensor(self.tensors[a].shape)
        return self

    def graph(self) -> Graph:
        graph = Graph(tuple(self.tensors), tuple(self.operators), 0, self.here)
        return profiles.resolve(graph)
