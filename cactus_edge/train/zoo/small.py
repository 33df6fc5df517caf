"""Networks for a few minutes of training on one core."""

from __future__ import annotations

from cactus_edge.train.zoo.blocks import convolutions, head
from cactus_edge.train.zoo.network import Layers, Shape

_SMALL = ((16, 5, 2, 2), (32, 4, 2, 1))


def cnn_tiny(shape: Shape, classes: int, width: float) -> Layers:
    """For 8x8 images: conv16 3x3, conv32 4x4 /2, fc64 (41,866 parameters)."""
    layers, shape = convolutions(shape, width, ((16, 3, 1, 1), (32, 4, 2, 1)))
    return layers + head(shape, (64,), classes, width, 3)


def cnn_strided(shape: Shape, classes: int, width: float) -> Layers:
    """conv16 5x5 /2, conv22 4x4 /2, conv28 4x4 /2, fc28 (23,328 parameters on MNIST).

    Few weights behind the convolutions, so that a file of 4 bits has less than 20 kB.
    """
    plan = ((16, 5, 2, 2), (22, 4, 2, 1), (28, 4, 2, 1))
    layers, shape = convolutions(shape, width, plan)
    return layers + head(shape, (28,), classes, width, 4)


def cnn_small(shape: Shape, classes: int, width: float) -> Layers:
    """conv16 5x5 /2, conv32 4x4 /2, fc100 (166,550 parameters on MNIST)."""
    layers, shape = convolutions(shape, width, _SMALL)
    return layers + head(shape, (100,), classes, width, 3)


def cnn_small_bn(shape: Shape, classes: int, width: float) -> Layers:
    """``cnn-small`` with batch normalization after each convolution."""
    layers, shape = convolutions(shape, width, _SMALL, batch_norm=True)
    return layers + head(shape, (100,), classes, width, 3)
