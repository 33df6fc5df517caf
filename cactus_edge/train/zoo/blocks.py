"""What networks are made of: runs of convolutions, heads of linear layers, windows that fit.

Shapes are (C, H, W) of one sample. A part returns its layers and the shape behind them, so that the
next part knows what it gets.
"""

from __future__ import annotations

import math

from torch import nn

from cactus_edge.train.zoo.network import Layers, Shape


class TooSmallError(Exception):
    """A window has nothing left to slide over."""


def scaled(channels: int, width: float) -> int:
    """Channels times width, at least 1."""
    return max(1, round(channels * width))


def convolution(
    name: str,
    shape: Shape,
    channels: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> tuple[nn.Conv2d, Shape]:
    """One convolution on ``shape``, and the shape behind it."""
    layer = nn.Conv2d(shape[0], channels, kernel, stride, padding, groups=groups)
    extents: list[int] = []
    for axis in (0, 1):
        pad = layer.padding[axis]
        assert isinstance(pad, int)  # a word would be torch's 'same' or 'valid'
        extents.append((shape[1 + axis] + 2 * pad - layer.kernel_size[axis]) // stride + 1)
    if min(extents) < 1:
        raise TooSmallError(f"nothing is left at '{name}'")
    return layer, (channels, *extents)


def convolutions(
    shape: Shape,
    width: float,
    plan: tuple[tuple[int, int, int, int], ...],
    *,
    batch_norm: bool = False,
) -> tuple[Layers, Shape]:
    """Convolutions (channels, kernel, stride, padding) with ReLU: conv1, norm1, relu1, conv2..."""
    layers: Layers = []
    for index, (base, kernel, stride, padding) in enumerate(plan, start=1):
        name, channels = f"conv{index}", scaled(base, width)
        layer, shape = convolution(name, shape, channels, kernel, stride, padding)
        layers.append((name, layer))
        if batch_norm:
            layers.append((f"norm{index}", nn.BatchNorm2d(channels)))
        layers.append((f"relu{index}", nn.ReLU()))
    return layers, shape


def head(
    shape: Shape,
    hidden: tuple[int, ...],
    classes: int,
    width: float,
    first: int,
    *,
    batch_norm: bool = False,
) -> Layers:
    """Flatten, then linear layers with ReLU between; ReLUs are numbered from ``first``."""
    layers: Layers = [("flatten", nn.Flatten())]
    features = math.prod(shape)
    for index, base in enumerate(hidden):
        out = scaled(base, width)
        layers.append((f"fc{index + 1}", nn.Linear(features, out)))
        if batch_norm:
            layers.append((f"norm{first + index}", nn.BatchNorm1d(out)))
        layers.append((f"relu{first + index}", nn.ReLU()))
        features = out
    return [*layers, (f"fc{len(hidden) + 1}", nn.Linear(features, classes))]


def half_padding(extent: int, kernel: int) -> int:
    """Symmetric padding with which stride 2 leaves half of ``extent``, rounded up."""
    missing = 2 * ((extent + 1) // 2 - 1) + kernel - extent
    return (max(0, missing) + 1) // 2
