"""``resnet-8``: the residual network of MLPerf Tiny, image classification (Banbury et al. 2021)."""

from __future__ import annotations

from torch import nn

from cactus_edge.train.zoo.blocks import convolution, head, scaled
from cactus_edge.train.zoo.network import Add, Layers, Resume, Shape


def resnet_8(shape: Shape, classes: int, width: float) -> Layers:
    """conv16, blocks of 16, 32 /2 and 64 /2, average over the map (78,186 parameters on CIFAR-10).

    A block that changes the shape takes its shortcut through a 1x1 convolution.
    """
    layers: Layers = []

    def add(name: str, shape: Shape, channels: int, kernel: int, stride: int) -> Shape:
        layer, shape = convolution(name, shape, channels, kernel, stride, kernel // 2)
        layers.append((name, layer))
        return shape

    def normalized(index: int, shape: Shape, channels: int, stride: int = 1) -> Shape:
        shape = add(f"conv{index}", shape, channels, 3, stride)
        layers.append((f"norm{index}", nn.BatchNorm2d(channels)))
        return shape

    shape = normalized(1, shape, scaled(16, width))
    layers.append(("relu1", nn.ReLU()))
    entry = "relu1"
    for block, (base, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
        before, channels, last = shape, scaled(base, width), 2 * block + 1
        shape = normalized(last - 1, shape, channels, stride)
        layers.append((f"relu{last - 1}", nn.ReLU()))
        shape = normalized(last, shape, channels)
        if shape != before:
            layers.append((f"resume{block}", Resume(entry)))
            add(f"shortcut{block}", before, channels, 1, stride)
            entry = f"norm{last}"
        layers.append((f"add{block}", Add(entry)))
        layers.append((f"relu{last}", nn.ReLU()))
        entry = f"relu{last}"
    layers.append(("pool", nn.AvgPool2d((shape[1], shape[2]))))
    return layers + head((shape[0], 1, 1), (), classes, width, 8)
