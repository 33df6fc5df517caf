"""Weights in the order in which the deployed file stores them.

TFLite is channels-last: a convolution [out, in, kh, kw] becomes [out, kh, kw, in], and a linear
layer behind a flatten reads the channels of one pixel side by side. In torch's order the pixels are
next to each other in both, so one transposition serves all.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cactus_edge.train.zoo import Network


def pixels(network: Network) -> Mapping[str, int]:
    """How many pixels of the input one output of each weighted layer reads, by layer name."""
    image = len(network.input_shape) == 3
    channels = network.input_shape[0]
    result: dict[str, int] = {}
    for name, layer in network.layers():
        if isinstance(layer, nn.Conv2d):
            result[name] = layer.weight[0, 0].numel()
            channels = layer.out_channels
        elif isinstance(layer, nn.Linear):
            result[name] = layer.in_features // channels if image else 1
            image = False
    return result


def rows(weight: Tensor, pixels: int) -> Tensor:
    """Weights [out, ...] as rows of inputs in deployed order, [out, pixels * channels]."""
    return weight.reshape(weight.shape[0], -1, pixels).transpose(1, 2).flatten(1)


def unrows(values: Tensor, like: Tensor, pixels: int) -> Tensor:
    """The inverse of ``rows``: values [out, inputs] in the shape and order of ``like``."""
    return values.reshape(values.shape[0], pixels, -1).transpose(1, 2).reshape(like.shape)
