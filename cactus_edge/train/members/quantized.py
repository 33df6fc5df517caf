"""The network with rounded weights, or with weights moved as far as rounding can move them."""

from __future__ import annotations

from cactus_edge.train.compress import Weights
from cactus_edge.train.members.base import (
    Bits,
    Fraction,
    MemberKind,
    Pattern,
    PositiveCount,
    Training,
    described,
    perturbed,
)
from cactus_edge.train.members.magnitude import Magnitude


class Quantized(MemberKind, frozen=True, tag="quantized"):
    """The network with ``bits``-bit weights (realised as ``compression.quantizer`` says)."""

    bits: Bits

    def label(self) -> str:
        """``quantized 4 bit``."""
        return described("", self.bits)

    def weight_bits(self) -> int:
        """As written."""
        return self.bits


class Perturbed(MemberKind, frozen=True, tag="perturbed"):
    """Weights moved adversarially by up to half a quantization step of ``bits`` bits."""

    bits: Bits
    steps: PositiveCount = 1
    sparsity: Fraction = 0.0

    def label(self) -> str:
        """``pruned 0.7, perturbed 4 bit``."""
        pruned = f"pruned {self.sparsity:.4g}, " if self.sparsity else ""
        return f"{pruned}perturbed {self.bits} bit"

    def pattern(self) -> Pattern:
        """By magnitude, if at all."""
        return Magnitude(self.sparsity)

    def weight_bits(self) -> int:
        """As written."""
        return self.bits

    def training_weights(self, weights: Weights, training: Training) -> Weights:
        """Moved, whatever the quantizer."""
        return perturbed(weights, self.bits, self.steps, training)
