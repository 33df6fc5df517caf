"""The networks. A new one is a function in a file of its own and one line in ``NETWORKS``.

The function gets the shape of a sample, (C, H, W) or (F,), the number of classes and the factor of
the hidden widths, and returns named layers; see ``network`` for what they may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cactus_edge.errors import UsageError, meant
from cactus_edge.train.zoo.blocks import TooSmallError
from cactus_edge.train.zoo.ds_cnn import ds_cnn
from cactus_edge.train.zoo.literature import cnn_5, cnn_7, cnn_medium
from cactus_edge.train.zoo.mlp import mlp
from cactus_edge.train.zoo.network import (
    LAYERS,
    Add,
    Layers,
    Network,
    Resume,
    Shape,
    Weighted,
    convolve,
    device_of,
    initialise_for_bounds,
    parameter_count,
)
from cactus_edge.train.zoo.resnet_8 import resnet_8
from cactus_edge.train.zoo.small import cnn_small, cnn_small_bn, cnn_strided, cnn_tiny

__all__ = [
    "LAYERS",
    "NETWORKS",
    "Add",
    "Layers",
    "Network",
    "Resume",
    "Shape",
    "Weighted",
    "build",
    "convolve",
    "device_of",
    "initialise_for_bounds",
    "parameter_count",
]

NETWORKS: Mapping[str, Callable[[Shape, int, float], Layers]] = MappingProxyType(
    {
        "mlp": mlp,
        "cnn-tiny": cnn_tiny,
        "cnn-small": cnn_small,
        "cnn-small-bn": cnn_small_bn,
        "cnn-strided": cnn_strided,
        "cnn-medium": cnn_medium,
        "cnn-5": cnn_5,
        "cnn-7": cnn_7,
        "resnet-8": resnet_8,
        "ds-cnn": ds_cnn,
    }
)


def build(architecture: str, input_shape: Shape, classes: int, width: float = 1.0) -> Network:
    """Build a network of the zoo with torch's default initialisation.

    Raises:
        UsageError: no such network, or it does not fit the input's shape.
    """
    if architecture not in NETWORKS:
        raise UsageError(
            f"[network] name: no network '{architecture}'{meant(architecture, NETWORKS)} "
            f"use one of {', '.join(NETWORKS)}"
        )
    make = NETWORKS[architecture]
    if len(input_shape) != 3 and make is not mlp:
        raise UsageError(
            f"[network] name: '{architecture}' needs images, but a sample has shape "
            f"{list(input_shape)}; use 'mlp'"
        )
    try:
        return Network(architecture, input_shape, classes, width, make(input_shape, classes, width))
    except TooSmallError as error:
        raise UsageError(
            f"[network] name: '{architecture}' does not fit images of shape {list(input_shape)}: "
            f"{error}; use a smaller network"
        ) from error
