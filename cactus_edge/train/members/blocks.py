"""Whole blocks of output channels times inputs: what a dense kernel can step over."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from torch import Tensor, nn
from torch.nn import functional

from cactus_edge.train.compress import Masks, largest
from cactus_edge.train.members import layout
from cactus_edge.train.members.base import (
    Fraction,
    MemberKind,
    OptionalBits,
    Pattern,
    PositiveCount,
    Pruning,
    described,
    width,
)
from cactus_edge.train.zoo import Network, Weighted

ROWS, INPUTS = 32, 4  # the blocks that the kernels step over, see docs/kernels.md


@dataclass(frozen=True)
class BlockPattern(Pattern):
    """Prunes the fraction ``sparsity`` of each layer's blocks, those with the least mean square.

    Blocks begin at the first output channel and the first input, in deployed order; the last ones
    may be smaller. Layers with fewer output or input channels than a block stay whole.
    """

    sparsity: float
    rows: int = ROWS
    inputs: int = INPUTS

    def key(self) -> str:
        """``blocks 32x4 0.9``."""
        return f"blocks {self.rows}x{self.inputs} {self.sparsity!r}" if self.sparsity else ""

    def masks(self, network: Network, pruning: Pruning) -> Masks:
        """Masks of the layers that blocks fit."""
        if not self.sparsity:
            return {}
        counts = layout.pixels(network)
        layers = network.weighted() if pruning.prune_last else network.weighted()[:-1]
        result: dict[str, Tensor] = {}
        for name, layer in layers:
            if self._fits(layer, counts[name]):
                kept = self._kept(layout.rows(layer.weight.detach(), counts[name]))
                result[name] = layout.unrows(kept, layer.weight, counts[name])
        return result

    def _fits(self, layer: Weighted, pixels: int) -> bool:
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            return False
        out, inputs = layer.weight.shape[0], layer.weight[0].numel()
        return out >= self.rows and inputs // pixels >= self.inputs

    def _kept(self, matrix: Tensor) -> Tensor:
        """True for the surviving blocks of ``matrix`` [out, inputs]."""
        out, inputs = matrix.shape
        grid = (-(-out // self.rows), -(-inputs // self.inputs))
        padding = (0, grid[1] * self.inputs - inputs, 0, grid[0] * self.rows - out)
        squares, ones = matrix.square(), matrix.new_ones(matrix.shape)
        sums = [
            functional.pad(values, padding)
            .reshape(grid[0], self.rows, grid[1], self.inputs)
            .sum((1, 3))
            for values in (squares, ones)
        ]
        kept = largest((sums[0] / sums[1]).flatten(), self.sparsity, least=1).reshape(grid)
        spread = kept.repeat_interleave(self.rows, 0).repeat_interleave(self.inputs, 1)
        return spread[:out, :inputs]


class Blocks(MemberKind, frozen=True, tag="blocks"):
    """Without the ``sparsity`` weakest blocks of ``rows`` output channels times ``inputs``."""

    sparsity: Fraction
    rows: PositiveCount = ROWS
    inputs: PositiveCount = INPUTS
    bits: OptionalBits = msgspec.UNSET

    def label(self) -> str:
        """``blocks 32x4 0.9, quantized 4 bit``."""
        return described(
            f"blocks {self.rows}x{self.inputs} {self.sparsity:.4g}", self.weight_bits()
        )

    def pattern(self) -> Pattern:
        """Blocks."""
        return BlockPattern(self.sparsity, self.rows, self.inputs)

    def weight_bits(self) -> int | None:
        """As written."""
        return width(self.bits)
