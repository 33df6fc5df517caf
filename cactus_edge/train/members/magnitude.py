"""The network without its smallest weights."""

from __future__ import annotations

from dataclasses import dataclass

from cactus_edge.train.compress import Masks, magnitude_masks
from cactus_edge.train.members.base import (
    Bits,
    Fraction,
    MemberKind,
    Pattern,
    Pruning,
    described,
)
from cactus_edge.train.zoo import Network


@dataclass(frozen=True)
class Magnitude(Pattern):
    """Prunes the fraction ``sparsity`` of the weights, the smallest, in the recipe's scope."""

    sparsity: float

    def key(self) -> str:
        """The fraction."""
        return repr(self.sparsity) if self.sparsity else ""

    def masks(self, network: Network, pruning: Pruning) -> Masks:
        """See ``compress.magnitude_masks``."""
        if not self.sparsity:
            return {}
        return magnitude_masks(network, self.sparsity, pruning.scope, prune_last=pruning.prune_last)


class Pruned(MemberKind, frozen=True, tag="pruned"):
    """The network without the ``sparsity`` smallest weights."""

    sparsity: Fraction

    def label(self) -> str:
        """``pruned 0.7``."""
        return f"pruned {self.sparsity:.4g}"

    def pattern(self) -> Pattern:
        """By magnitude."""
        return Magnitude(self.sparsity)


class PrunedQuantized(MemberKind, frozen=True, tag="pruned-quantized"):
    """Pruned, then quantized."""

    sparsity: Fraction
    bits: Bits

    def label(self) -> str:
        """``pruned 0.7, quantized 4 bit``."""
        return described(f"pruned {self.sparsity:.4g}", self.bits)

    def pattern(self) -> Pattern:
        """By magnitude."""
        return Magnitude(self.sparsity)

    def weight_bits(self) -> int:
        """As written."""
        return self.bits
