"""The shape of a network: named layers in order, with skip connections.

Contract: a ``Network`` is made of ``LAYERS`` only and ends in a ``Linear`` layer; its layer names
are stable (they become tensor names in the deployed file). A layer reads the output of the one
before it; ``Resume`` goes on from an earlier layer instead, and ``Add`` adds an earlier one. The
input is [N, C, H, W] (or [N, F]) in [0, 1]; there is no normalization layer for it. Strided
convolutions pad symmetrically, as torch does; lowering writes PAD + VALID.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from cactus_edge.errors import UnsupportedModelError

Weighted = nn.Conv2d | nn.Linear
Shape = tuple[int, ...]
Layers = list[tuple[str, nn.Module]]


class Resume(nn.Module):
    """The output of the earlier layer ``source``: where a second branch begins."""

    def __init__(self, source: str) -> None:
        """Name the layer."""
        super().__init__()
        self.source = source


class Add(nn.Module):
    """The sum of the layer before and the earlier layer ``source``, of one shape."""

    def __init__(self, source: str) -> None:
        """Name the layer."""
        super().__init__()
        self.source = source


LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.Flatten,
    nn.AvgPool2d,
    nn.MaxPool2d,
    Resume,
    Add,
)


class Network(nn.Sequential):
    """Named layers that end in the output layer.

    Attributes:
        architecture: key of ``NETWORKS``.
        input_shape: (C, H, W) or (F,) of one sample.
        classes: number of logits.
        width: factor of the hidden layers' widths.
        kept: names of the layers whose outputs are read again later.
    """

    def __init__(
        self, architecture: str, input_shape: Shape, classes: int, width: float, layers: Layers
    ) -> None:
        """Check the layers and put them in order."""
        super().__init__(OrderedDict(layers))
        self.architecture = architecture
        self.input_shape = input_shape
        self.classes = classes
        self.width = width
        self.kept = frozenset(m.source for _, m in layers if isinstance(m, Resume | Add))
        seen: set[str] = set()
        for name, layer in layers:
            if not isinstance(layer, LAYERS):
                raise UnsupportedModelError(
                    f"layer '{name}' is a {type(layer).__name__}; networks are made of "
                    f"{', '.join(kind.__name__ for kind in LAYERS)}"
                )
            if isinstance(layer, Resume | Add) and layer.source not in seen:
                raise UnsupportedModelError(
                    f"layer '{name}' reads '{layer.source}', which is no layer before it"
                )
            seen.add(name)
        if not layers or not isinstance(layers[-1][1], nn.Linear):
            raise UnsupportedModelError("the last layer of a network must be Linear")

    def forward(self, input: Tensor) -> Tensor:
        """Logits [N, classes] of ``input`` [N, ...], with torch's own batch normalization."""
        x, kept = input, dict[str, Tensor]()
        for name, layer in self.layers():
            if isinstance(layer, Resume):
                x = kept[layer.source]
            elif isinstance(layer, Add):
                x = x + kept[layer.source]
            elif isinstance(layer, nn.Conv2d):
                x = convolve(layer, x, layer.weight, layer.bias)
            else:
                x = layer(x)
            if name in self.kept:
                kept[name] = x
        return x

    def layers(self) -> tuple[tuple[str, nn.Module], ...]:
        """The named layers, in order."""
        return tuple(self.named_children())

    def weighted(self) -> tuple[tuple[str, Weighted], ...]:
        """The layers with a weight that is pruned and quantized: Conv2d and Linear."""
        return tuple((n, m) for n, m in self.named_children() if isinstance(m, Weighted))

    def has_batch_norm(self) -> bool:
        """Whether any layer normalises over the batch."""
        return any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in self.children())


def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer with another weight and bias: [N, in, H, W] -> [N, out, H', W'].

    A 1x1 window is given only the pixels that its stride reads. The CPU kernels of torch 2.13 for
    strided 1x1 windows write outside their memory when channels are few.
    """
    stride = layer.stride
    if tuple(layer.kernel_size) == (1, 1) and layer.padding == (0, 0):
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return functional.conv2d(x, weight, bias, stride, layer.padding, layer.dilation, layer.groups)


def initialise_for_bounds(network: Network) -> None:
    """Shi et al. (2021): N(0, sqrt(2 pi) / fan-in), so that bounds keep their width.

    Every weight but the output layer's, as in the published code.
    """
    for _, layer in network.weighted()[:-1]:
        fan_in = layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / fan_in)


def parameter_count(network: Network) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in network.parameters())


def device_of(network: Network) -> torch.device:
    """Where the parameters live."""
    return next(network.parameters()).device
