"""``ds-cnn``: the depthwise separable network of MLPerf Tiny's keyword spotting.

After Zhang et al. (2017) and Banbury et al. (2021).
"""

from __future__ import annotations

from torch import nn

from cactus_edge.train.zoo.blocks import convolution, half_padding, head, scaled
from cactus_edge.train.zoo.network import Layers, Shape

_FIRST = (10, 4)  # rows (time) x columns (coefficients)


def ds_cnn(shape: Shape, classes: int, width: float) -> Layers:
    """conv64 10x4 /2, four times (depthwise 3x3, conv64 1x1), average over the map.

    For spectrograms (1, 49, 10), time series (C, T, 1) and small images; a first window that is
    larger than the sample is cut (23,756 parameters on spectrograms with 12 classes).
    """
    channels = scaled(64, width)
    kernel = (min(_FIRST[0], shape[1]), min(_FIRST[1], shape[2]))
    padding = (half_padding(shape[1], kernel[0]), half_padding(shape[2], kernel[1]))
    layers: Layers = []

    def add(name: str, shape: Shape, layer: nn.Conv2d) -> None:
        index = 1 + sum(isinstance(m, nn.Conv2d) for _, m in layers)
        layers.append((name, layer))
        layers.append((f"norm{index}", nn.BatchNorm2d(shape[0])))
        layers.append((f"relu{index}", nn.ReLU()))

    layer, shape = convolution("conv1", shape, channels, kernel, 2, padding)
    add("conv1", shape, layer)
    for block in range(2, 6):
        layer, shape = convolution(
            f"depthwise{block}", shape, channels, 3, padding=1, groups=channels
        )
        add(f"depthwise{block}", shape, layer)
        layer, shape = convolution(f"pointwise{block}", shape, channels, 1)
        add(f"pointwise{block}", shape, layer)
    layers.append(("pool", nn.AvgPool2d((shape[1], shape[2]))))
    return layers + head((channels, 1, 1), (), classes, width, 10)
