"""The convolutional networks of the certified-training literature."""

from __future__ import annotations

from cactus_edge.train.zoo.blocks import convolutions, head
from cactus_edge.train.zoo.network import Layers, Shape


def cnn_medium(shape: Shape, classes: int, width: float) -> Layers:
    """The 'medium' network of Gowal et al. (2018): 893,418 parameters on MNIST."""
    plan = ((32, 3, 1, 0), (32, 4, 2, 0), (64, 3, 1, 0), (64, 4, 2, 0))
    layers, shape = convolutions(shape, width, plan)
    return layers + head(shape, (512, 512), classes, width, 5)


def cnn_5(shape: Shape, classes: int, width: float) -> Layers:
    """Five layers: conv16, conv16 /2, conv32 /2, fc512 (820,954 parameters on MNIST)."""
    layers, shape = convolutions(shape, width, ((16, 3, 1, 1), (16, 4, 2, 1), (32, 4, 2, 1)))
    return layers + head(shape, (512,), classes, width, 4)


def cnn_7(shape: Shape, classes: int, width: float) -> Layers:
    """CNN7 of Shi et al. (2021): five 3x3 convolutions, fc512, batch normalization throughout."""
    plan = ((64, 3, 1, 1), (64, 3, 1, 1), (128, 3, 2, 1), (128, 3, 1, 1), (128, 3, 1, 1))
    layers, shape = convolutions(shape, width, plan, batch_norm=True)
    return layers + head(shape, (512,), classes, width, 6, batch_norm=True)
