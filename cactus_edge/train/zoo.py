"""The networks, as flat sequences of named layers.

Contract: a ``Network`` is an ``nn.Sequential`` of ``LAYERS`` only and ends in a ``Linear`` layer;
its layer names are stable (they become tensor names in the deployed file). The input is
[N, C, H, W] (or [N, F]) in [0, 1]; there is no normalization layer. Strided convolutions pad
symmetrically, as torch does; lowering writes PAD + VALID.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from cactus_edge.errors import UnsupportedModelError, UsageError

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.Flatten,
    nn.AvgPool2d,
    nn.MaxPool2d,
)
Weighted = nn.Conv2d | nn.Linear
Shape = tuple[int, ...]
Layers = list[tuple[str, nn.Module]]


class Network(nn.Sequential):
    """A sequence of named layers that ends in the output layer.

    Attributes:
        architecture: key of ``NETWORKS``.
        input_shape: (C, H, W) or (F,) of one sample.
        classes: number of logits.
        width: factor of the hidden layers' widths.
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
        for name, layer in layers:
            if not isinstance(layer, LAYERS):
                raise UnsupportedModelError(
                    f"layer '{name}' is a {type(layer).__name__}; networks are made of "
                    f"{', '.join(kind.__name__ for kind in LAYERS)}"
                )
        if not layers or not isinstance(layers[-1][1], nn.Linear):
            raise UnsupportedModelError("the last layer of a network must be Linear")

    def layers(self) -> tuple[tuple[str, nn.Module], ...]:
        """The named layers, in order."""
        return tuple(self.named_children())

    def weighted(self) -> tuple[tuple[str, Weighted], ...]:
        """The layers with a weight that is pruned and quantized: Conv2d and Linear."""
        return tuple((n, m) for n, m in self.named_children() if isinstance(m, Weighted))

    def has_batch_norm(self) -> bool:
        """Whether any layer normalises over the batch."""
        return any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in self.children())


def build(architecture: str, input_shape: Shape, classes: int, width: float = 1.0) -> Network:
    """Build a network of the zoo with torch's default initialisation.

    Raises:
        UsageError: no such network, or it does not fit the input's shape.
    """
    if architecture not in NETWORKS:
        raise UsageError(
            f"[network] name: no network '{architecture}'; use one of {', '.join(NETWORKS)}"
        )
    make = NETWORKS[architecture]
    if len(input_shape) != 3 and make is not _mlp:
        raise UsageError(
            f"[network] name: '{architecture}' needs images, but a sample has shape "
            f"{list(input_shape)}; use 'mlp'"
        )
    try:
        return Network(architecture, input_shape, classes, width, make(input_shape, classes, width))
    except _TooSmallError as error:
        raise UsageError(
            f"[network] name: '{architecture}' does not fit images of shape {list(input_shape)}: "
            f"{error}; use a smaller network"
        ) from error


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


class _TooSmallError(Exception):
    """A convolution has nothing left to slide over."""


def _scaled(channels: int, width: float) -> int:
    """Channels times width, at least 1."""
    return max(1, round(channels * width))


def _convolutions(
    input_shape: Shape,
    width: float,
    plan: tuple[tuple[int, int, int, int], ...],
    *,
    batch_norm: bool = False,
) -> tuple[Layers, int]:
    """Convolutions (channels, kernel, stride, padding) with ReLU, flattened: layers, features."""
    channels, height, width_pixels = input_shape
    layers: Layers = []
    for index, (base, kernel, stride, padding) in enumerate(plan, start=1):
        out = _scaled(base, width)
        height = (height + 2 * padding - kernel) // stride + 1
        width_pixels = (width_pixels + 2 * padding - kernel) // stride + 1
        if min(height, width_pixels) < 1:
            raise _TooSmallError(f"nothing is left at convolution {index}")
        layers.append((f"conv{index}", nn.Conv2d(channels, out, kernel, stride, padding)))
        if batch_norm:
            layers.append((f"norm{index}", nn.BatchNorm2d(out)))
        layers.append((f"relu{index}", nn.ReLU()))
        channels = out
    return [*layers, ("flatten", nn.Flatten())], channels * height * width_pixels


def _head(features: int, hidden: tuple[int, ...], classes: int, width: float, first: int) -> Layers:
    """Linear layers with ReLU between them; ReLUs are numbered from ``first``."""
    layers: Layers = []
    for index, base in enumerate(hidden, start=1):
        out = _scaled(base, width)
        layers.append((f"fc{index}", nn.Linear(features, out)))
        layers.append((f"relu{first + index - 1}", nn.ReLU()))
        features = out
    return [*layers, (f"fc{len(hidden) + 1}", nn.Linear(features, classes))]


def _mlp(input_shape: Shape, classes: int, width: float) -> Layers:
    """Two hidden layers of 128 on flattened input."""
    features = math.prod(input_shape)
    return [("flatten", nn.Flatten()), *_head(features, (128, 128), classes, width, 1)]


def _cnn_tiny(input_shape: Shape, classes: int, width: float) -> Layers:
    """For 8x8 images: conv16 3x3, conv32 4x4 /2, fc64 (43k parameters)."""
    layers, features = _convolutions(input_shape, width, ((16, 3, 1, 1), (32, 4, 2, 1)))
    return layers + _head(features, (64,), classes, width, 3)


def _cnn_small(input_shape: Shape, classes: int, width: float) -> Layers:
    """conv16 5x5 /2, conv32 4x4 /2, fc100 (166,550 parameters on MNIST)."""
    layers, features = _convolutions(input_shape, width, ((16, 5, 2, 2), (32, 4, 2, 1)))
    return layers + _head(features, (100,), classes, width, 3)


def _cnn_small_bn(input_shape: Shape, classes: int, width: float) -> Layers:
    """``cnn-small`` with batch normalization after each convolution."""
    plan = ((16, 5, 2, 2), (32, 4, 2, 1))
    layers, features = _convolutions(input_shape, width, plan, batch_norm=True)
    return layers + _head(features, (100,), classes, width, 3)


def _cnn_medium(input_shape: Shape, classes: int, width: float) -> Layers:
    """The 'medium' network of Gowal et al. (2018): 893k parameters on MNIST."""
    plan = ((32, 3, 1, 0), (32, 4, 2, 0), (64, 3, 1, 0), (64, 4, 2, 0))
    layers, features = _convolutions(input_shape, width, plan)
    return layers + _head(features, (512, 512), classes, width, 5)


NETWORKS: Mapping[str, Callable[[Shape, int, float], Layers]] = MappingProxyType(
    {
        "mlp": _mlp,
        "cnn-tiny": _cnn_tiny,
        "cnn-small": _cnn_small,
        "cnn-small-bn": _cnn_small_bn,
        "cnn-medium": _cnn_medium,
    }
)


def device_of(network: Network) -> torch.device:
    """Where the parameters live."""
    return next(network.parameters()).device
