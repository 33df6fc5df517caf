"""A valid file, and edits that make it wrong in one place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cactus_edge.errors import (
    UnsupportedModelError,
)
from cactus_edge.flatbuffer import read_tflite, wire
from cactus_edge.flatbuffer.writer import model_values
from cactus_edge.graph import (
    Activation,
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    DType,
    FullyConnected,
    Graph,
    Pad,
    Padding,
    Quantization,
    Reshape,
    Softmax,
    Tensor,
    Weights,
)

# A table of the file, as nested dictionaries and lists.
Tree = Any
Edit = Callable[[Tree], None]


def float_bits(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.uint32)


def sample() -> Graph:
    """Every kind of operator that has options or constants, in a fixed order."""
    scale = Quantization.of(0.05, -7)
    shapes = (
        (1, 4, 4, 2),  # 0 input
        (1, 6, 5, 2),  # 1 pad
        (1, 4, 3, 2),  # 2 convolution
        (1, 4, 3, 4),  # 3 depthwise
        (1, 4, 3, 4),  # 4 sum
        (1, 2, 1, 4),  # 5 pool
        (1, 8),  # 6 flat
        (1, 3),  # 7 logits
    )
    names = ("input", "pad", "convolution", "depthwise", "sum", "pool", "flat", "logits")
    tensors = [Tensor(n, s, DType.INT8, scale) for n, s in zip(names, shapes, strict=True)]
    tensors.append(Tensor("softmax", (1, 3), DType.INT8, Quantization.of(1 / 256, -128)))
    rng = np.random.default_rng(0)
    operators = (
        Pad(name="pad", inputs=(0,), output=1, paddings=((0, 0), (1, 1), (0, 1), (0, 0))),
        Conv2D(
            name="convolution",
            inputs=(1,),
            output=2,
            weights=Weights(rng.integers(-9, 9, (2, 3, 3, 2)), 8, float_bits(0.01, 0.02)),
            bias=np.array([3, -4]),
            activation=Activation.RELU,
        ),
        DepthwiseConv2D(
            name="depthwise",
            inputs=(2,),
            output=3,
            weights=Weights(rng.integers(-7, 8, (1, 3, 1, 4)), 4, float_bits(0.1, 0.2, 0.1, 0.3)),
            bias=np.array([3, -4, 1, 0]),
            padding=Padding.SAME,
        ),
        Add(name="sum", inputs=(3, 3), output=4),
        AveragePool2D(name="pool", inputs=(4,), output=5, window=(2, 2), stride=(2, 2)),
        Reshape(name="flat", inputs=(5,), output=6),
        FullyConnected(
            name="logits",
            inputs=(6,),
            output=7,
            weights=Weights(rng.integers(-9, 9, (3, 8)), 8, float_bits(0.01)),
            bias=np.array([3, -4, 5]),
        ),
        Softmax(name="softmax", inputs=(7,), output=8),
    )
    return Graph(tuple(tensors), operators, 0, 8, (("note", b"text"),))


def thaw(value: Tree) -> Tree:
    """A deep copy in which every table and every list can be changed."""
    if isinstance(value, dict):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return (value[0], thaw(value[1]))
    return [thaw(v) for v in value] if isinstance(value, (list, tuple)) else copy.copy(value)


def edited(edit: Edit) -> bytes:
    tree = thaw(model_values(sample()))
    edit(tree)
    return wire.serialize(tree)


def behind(offset: int) -> Edit:
    """Say that a buffer's data lie at an offset of the file."""

    def edit(tree: Tree) -> None:
        buffer = tree["buffers"][2]
        buffer.update(size=len(buffer.pop("data")), offset=offset)

    return edit


def tensor(name: str) -> Callable[[Tree], Tree]:
    return lambda tree: next(t for t in tree["subgraphs"][0]["tensors"] if t["name"] == name)


def operator(index: int) -> Callable[[Tree], Tree]:
    return lambda tree: tree["subgraphs"][0]["operators"][index]


def options(index: int) -> Callable[[Tree], Tree]:
    return lambda tree: operator(index)(tree)["builtin_options"][1]


def put(where: Callable[[Tree], Tree], **values: object) -> Edit:
    return lambda tree: where(tree).update(values)


def quantized(name: str, **values: object) -> Edit:
    return lambda tree: tensor(name)(tree)["quantization"].update(values)


def drop(where: Callable[[Tree], Tree], *names: str) -> Edit:
    def edit(tree: Tree) -> None:
        for name in names:
            del where(tree)[name]

    return edit


def data_of(name: str, data: bytes) -> Edit:
    def edit(tree: Tree) -> None:
        tree["buffers"][tensor(name)(tree)["buffer"]]["data"] = data

    return edit


def model(tree: Tree) -> Tree:
    return tree


def subgraph(tree: Tree) -> Tree:
    return tree["subgraphs"][0]


def code(index: int) -> Callable[[Tree], Tree]:
    return lambda tree: tree["operator_codes"][index]


def index_of(name: str) -> int:
    tensors = model_values(sample())["subgraphs"][0]["tensors"]  # type: ignore
    return [t["name"] for t in tensors].index(name)


def check(data: bytes, error: type[UnsupportedModelError], text: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read_tflite(data, "m")
    message = str(caught.value)
    assert text in message
    assert type(caught.value) is error, message
    assert message.startswith("m: ")
    assert "\n" not in message
