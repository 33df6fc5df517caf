"""Learned importance: which weights survive is trained instead of the weights (HYDRA).

Sehwag et al. (2020): every weight has a score, and a pattern keeps the weights whose scores are
largest in magnitude. The loss of the masked network trains the scores, through the mask as if it
were the magnitude itself (straight-through), while the network stays as it is. Scores start
proportional to the weights, so that the first masks of each layer are those by magnitude.

Contract: scores are the weights of a second network, so that any pattern can rank by them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cactus_edge.train.compress import SMALLEST_SCALE, Masks
from cactus_edge.train.zoo import Network


@torch.no_grad()
def learned(network: Network) -> Network:
    """Freeze ``network``; return scores sqrt(6 / fan-in) W / max|W|, layer by layer."""
    scores = copy.deepcopy(network).requires_grad_(requires_grad=False)
    network.requires_grad_(requires_grad=False)
    for _, layer in scores.weighted():
        largest = layer.weight.abs().amax().clamp(min=SMALLEST_SCALE)
        layer.weight.mul_(math.sqrt(6 / layer.weight[0].numel()) / largest)
        layer.weight.requires_grad_()
    return scores


def trained(network: Network, scores: Network | None) -> Mapping[str, Tensor]:
    """What the optimizer moves, by name: all parameters, or else the scores of every layer."""
    if scores is None:
        return dict(network.named_parameters())
    return {f"{name}.weight": layer.get_parameter("weight") for name, layer in scores.weighted()}


def straight_through(masks: Mapping[str, Masks], scores: Network) -> Mapping[str, Masks]:
    """The same masks, by key of their pattern, as numbers with the gradient of |scores|."""
    sizes = {name: layer.weight.abs() for name, layer in scores.weighted()}
    zeros = {name: size - size.detach() for name, size in sizes.items()}
    return {
        key: {name: mask + zeros[name] for name, mask in named.items()}
        for key, named in masks.items()
    }
