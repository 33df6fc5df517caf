"""Networks of any sizes, and their weights in the order of the file that ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from cactus_edge import flatbuffer
from cactus_edge.datasets import Dataset
from cactus_edge.graph import Graph, Linear
from cactus_edge.train.checkpoint import Model, ModelMetadata
from cactus_edge.train.lower import Settings, lower
from cactus_edge.train.members import (
    MemberKind,
)
from cactus_edge.train.recipe import load_recipe
from cactus_edge.train.zoo import Network

ROOT = Path(__file__).resolve().parents[2]

Matrix = np.ndarray


def deployed(network: Network, values: dict[str, torch.Tensor]) -> dict[str, Matrix]:
    """Tensors in the shape of weights as rows of inputs, put into TFLite's order step by step."""
    result: dict[str, Matrix] = {}
    image: tuple[int, ...] | None = None
    x = torch.zeros(1, *network.input_shape)
    for name, layer in network.layers():
        if isinstance(layer, nn.Flatten) and x.dim() == 4:
            image = tuple(x.shape[1:])
        if name in values:
            array = values[name].numpy()
            if array.ndim == 4:
                array = array.transpose(0, 2, 3, 1)
            elif image is not None:
                array = array.reshape(-1, *image).transpose(0, 2, 3, 1)
            result[name] = array.reshape(len(array), -1)
        if isinstance(layer, nn.Linear):
            image = None
        x = layer(x)
    return result


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Convolutions, depthwise ones and linear layers of any sizes, on small images."""
    channels, side = draw(st.integers(1, 5)), draw(st.integers(4, 7))
    shape = (channels, side, side)
    layers: list[tuple[str, nn.Module]] = []
    torch.manual_seed(draw(st.integers(0, 1000)))
    for index in range(draw(st.integers(1, 2))):
        kernel, out = draw(st.integers(1, 3)), draw(st.integers(1, 9))
        padding = draw(st.integers(0, 1))
        if channels > 1 and draw(st.booleans()):
            out = channels * draw(st.integers(1, 2))
            made = nn.Conv2d(channels, out, kernel, padding=padding, groups=channels)
        else:
            made = nn.Conv2d(channels, out, kernel, padding=padding)
        layers += [(f"conv{index}", made), (f"relu{index}", nn.ReLU())]
        side, channels = side + 2 * padding - kernel + 1, out
    hidden = draw(st.integers(1, 9))
    layers += [
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(channels * side * side, hidden)),
        ("relu", nn.ReLU()),
        ("fc2", nn.Linear(hidden, 3)),
    ]
    return Network("made-up", shape, 3, 1.0, layers)


def written(network: Network, member: MemberKind, bits: int) -> dict[str, Matrix]:
    """The weights [out, inputs] in the file that conversion writes, read back, by layer."""
    graph = flatbuffer.read_tflite(flatbuffer.write_tflite(lowered(network, member, bits)))
    return {
        op.name: op.weights.values.reshape(op.weights.values.shape[0], -1)
        if op.kind != "DEPTHWISE_CONV_2D"
        else op.weights.values.reshape(-1, op.channels).T
        for op in graph.core
        if isinstance(op, Linear)
    }


def lowered(network: Network, member: MemberKind, bits: int, *, universal: bool = False) -> Graph:
    data = calibration(network)
    chosen = Settings(bits, epsilon=0.01, universal=universal, pattern=member.pattern())
    return lower(model(network), data, chosen).graph


def model(network: Network) -> Model:
    metadata = ModelMetadata("made-up", 1.0, network.input_shape, network.classes, "11" * 32)
    recipe = load_recipe(ROOT / "recipes" / "digits.toml")
    return Model(network.eval(), recipe, {}, metadata)


def calibration(network: Network, count: int = 32) -> Dataset:
    channels, *extents = network.input_shape
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, *extents, channels)).astype(np.uint8)
    return Dataset("made-up", pixels, np.zeros(count, np.int64), 3, "train", "11" * 32)


def groups(matrix: Matrix, m: int) -> list[Matrix]:
    return [matrix[:, start : start + m] for start in range(0, matrix.shape[1], m)]


def block_sums(matrix: Matrix, rows: int, inputs: int) -> Matrix:
    """The sum of each block; the last ones may be smaller."""
    starts = [
        np.arange(0, size, step) for size, step in zip(matrix.shape, (rows, inputs), strict=True)
    ]
    return np.add.reduceat(np.add.reduceat(matrix.astype(np.float64), starts[0], 0), starts[1], 1)


def blocks_of(matrix: Matrix, rows: int, inputs: int) -> list[Matrix]:
    return [
        matrix[top : top + rows, left : left + inputs]
        for top in range(0, matrix.shape[0], rows)
        for left in range(0, matrix.shape[1], inputs)
    ]
