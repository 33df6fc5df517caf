"""At most n of every m neighbouring weights: the pattern of sparse tensor cores for 2 of 4."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from cactus_edge.train.compress import Masks
from cactus_edge.train.members import layout
from cactus_edge.train.members.base import (
    MemberKind,
    OptionalBits,
    Pattern,
    PositiveCount,
    Pruning,
    described,
    width,
)
from cactus_edge.train.zoo import Network


@dataclass(frozen=True)
class NOfMPattern(Pattern):
    """Keeps the ``n`` largest of every ``m`` inputs of a row, in deployed order."""

    n: int
    m: int

    def key(self) -> str:
        """``2:4``."""
        return f"{self.n}:{self.m}" if self.n < self.m else ""

    def masks(self, network: Network, pruning: Pruning) -> Masks:
        """Masks of all layers, or of all but the last."""
        if self.n == self.m:
            return {}
        counts = layout.pixels(network)
        layers = network.weighted() if pruning.prune_last else network.weighted()[:-1]
        result: dict[str, Tensor] = {}
        for name, layer in layers:
            sizes = layout.rows(layer.weight.detach().abs(), counts[name])
            kept = _largest_of_each(sizes, self.n, self.m)
            result[name] = layout.unrows(kept, layer.weight, counts[name])
        return result


class NOfM(MemberKind, frozen=True, tag="n-of-m"):
    """At most ``n`` weights in every ``m`` inputs of an output channel, rounded to ``bits``."""

    n: PositiveCount
    m: PositiveCount
    bits: OptionalBits = msgspec.UNSET

    def __post_init__(self) -> None:
        """Check what involves both numbers."""
        if self.n > self.m:
            raise ValueError(f"n = {self.n} of m = {self.m}: n must not exceed m")

    def label(self) -> str:
        """``2:4, quantized 4 bit``."""
        return described(f"{self.n}:{self.m}", self.weight_bits())

    def pattern(self) -> Pattern:
        """N of m."""
        return NOfMPattern(self.n, self.m)

    def weight_bits(self) -> int | None:
        """As written."""
        return width(self.bits)


def _largest_of_each(sizes: Tensor, n: int, m: int) -> Tensor:
    """True for the n largest of each m columns of ``sizes`` [rows, columns].

    Of equal sizes the first ones are pruned first. A last, incomplete group keeps up to n too.
    """
    count = sizes.shape[1]
    padded = functional.pad(sizes, (0, -count % m), value=-1.0).unflatten(1, (-1, m))
    rank = torch.argsort(torch.argsort(padded, dim=2, stable=True), dim=2)
    return (rank >= m - n).flatten(1)[:, :count]
