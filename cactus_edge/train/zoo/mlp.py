"""``mlp``: two hidden layers of 128 on flattened input."""

from __future__ import annotations

from cactus_edge.train.zoo.blocks import head
from cactus_edge.train.zoo.network import Layers, Shape


def mlp(shape: Shape, classes: int, width: float) -> Layers:
    """fc128, fc128; for images, tables and windows of any shape."""
    return head(shape, (128, 128), classes, width, 1)
