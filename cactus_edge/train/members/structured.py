"""Without the weakest filters and hidden units: a smaller network, once converted.

A pruned channel loses its own weights and the weights that read it, so that its bias, its
normalization and padding have no influence: the masked network *is* the smaller one, and conversion
leaves the channel out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import msgspec
import torch
from torch import Tensor, nn

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.train.compress import Masks, largest
from cactus_edge.train.members.base import (
    Fraction,
    MemberKind,
    OptionalBits,
    Pattern,
    Pruning,
    described,
    width,
)
from cactus_edge.train.zoo import Network, Weighted

# Layers whose outputs have the channels of their inputs, in order.
_PASSING = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.Flatten,
    nn.AvgPool2d,
    nn.MaxPool2d,
)


@dataclass(frozen=True)
class StructuredPattern(Pattern):
    """Prunes the fraction ``sparsity`` of the output channels of each hidden layer.

    Those with the smallest sum of absolute weights go (Li et al. 2017), but never all. Depthwise
    convolutions follow the layer before them, and the logits stay.
    """

    removes_channels: ClassVar[bool] = True
    sparsity: float

    def key(self) -> str:
        """``structured 0.5``."""
        return f"structured {self.sparsity!r}" if self.sparsity else ""

    def masks(self, network: Network, pruning: Pruning) -> Masks:
        """Masks of all layers whose outputs or inputs are pruned."""
        del pruning  # whole channels are ranked layer by layer, and the logits are no channels
        if not self.sparsity:
            return {}
        last = network.weighted()[-1][0]
        current = torch.ones(network.input_shape[0], dtype=torch.bool)
        result: dict[str, Tensor] = {}
        for name, layer in network.layers():
            if isinstance(layer, Weighted):
                weight = layer.weight.detach()
                current = current.to(weight.device)
                kept = self._kept(layer, current, hidden=name != last)
                result[name] = _outputs(kept, weight) & _inputs(layer, current)
                current = kept
            elif not isinstance(layer, _PASSING):
                raise UnsupportedModelError(
                    f"layer '{name}' is a {type(layer).__name__}: channels are pruned in plain "
                    "sequences of layers only; use another kind of member"
                )
        return result

    def _kept(self, layer: Weighted, current: Tensor, *, hidden: bool) -> Tensor:
        """Which output channels of a layer stay, [out]."""
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            return current.repeat_interleave(layer.out_channels // layer.in_channels)
        weight = layer.weight.detach()
        if not hidden:
            return torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        return largest(weight.abs().flatten(1).sum(1), self.sparsity, least=1)


class Structured(MemberKind, frozen=True, tag="structured"):
    """Without the ``sparsity`` weakest filters and hidden units of each layer."""

    sparsity: Fraction
    bits: OptionalBits = msgspec.UNSET

    def label(self) -> str:
        """``structured 0.5, quantized 4 bit``."""
        return described(f"structured {self.sparsity:.4g}", self.weight_bits())

    def pattern(self) -> Pattern:
        """Whole channels."""
        return StructuredPattern(self.sparsity)

    def weight_bits(self) -> int | None:
        """As written."""
        return width(self.bits)


def _outputs(kept: Tensor, weight: Tensor) -> Tensor:
    """``kept`` [out] spread over a weight [out, ...]."""
    return kept.reshape(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)


def _inputs(layer: Weighted, kept: Tensor) -> Tensor:
    """Which inputs of a layer stay, given the channels before it; broadcasts with its weight."""
    if isinstance(layer, nn.Linear):  # behind a flatten it reads all pixels of a channel in a row
        return kept.repeat_interleave(layer.in_features // len(kept))[None]
    if layer.groups > 1:
        return kept.new_ones(1, 1, 1, 1)
    return kept[None, :, None, None]
