"""The staircases of the last layer: stored logits of accumulators, and the inverse."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cactus_edge import semantics
from cactus_edge.graph import Int64Array, Requantization
from cactus_edge.semantics import Rounding

_DOUBLE = (Rounding.DOUBLE_HALF_AWAY, Rounding.DOUBLE_HALF_UP)
_HALF = Fraction(1, 2)
_BINARY32_UNIT = Fraction(1, 1 << 24)
_BINARY64_UNIT = Fraction(1, 1 << 53)


@dataclass(frozen=True, eq=False)
class Staircases:
    """How accumulators become stored logits, channel by channel; each is monotone."""

    parameters: Requantization
    zero_point: int
    limits: tuple[int, int]

    def stored(self, accumulator: Int64Array, channels: Int64Array) -> Int64Array:
        """Stored logits of accumulators; ``channels`` broadcasts against them."""
        channel = np.broadcast_to(channels, accumulator.shape)
        output = np.empty_like(accumulator)
        codes = self.parameters.rounding[channel]
        for code in np.unique(codes).tolist():
            chosen = codes == code
            index = channel[chosen]
            output[chosen] = semantics.REQUANTIZE[Rounding(code)](
                accumulator[chosen], self.parameters.multiplier[index], self.parameters.shift[index]
            )
        return semantics.clamp(output + self.zero_point, *self.limits)  # pyright: ignore

    def least(
        self, levels: Int64Array, channels: Int64Array, lower: Int64Array, upper: Int64Array
    ) -> Int64Array:
        """The least accumulator in [lower, upper] that reaches each level; upper + 1 where none.

        Args:
            levels: int64 of any shape; the others broadcast against it.
            channels: index of the logit.
            lower: where to begin.
            upper: where to end.
        """
        low = np.broadcast_to(lower, levels.shape).copy()
        high = np.broadcast_to(upper + 1, levels.shape).copy()
        while (low < high).any():
            middle = (low + high) >> 1
            reaches = self.stored(middle, channels) >= levels
            high = np.where(reaches, middle, high)
            low = np.where(reaches, low, np.minimum(middle + 1, high))
        return low

    def same(self, a: int, b: int) -> bool:
        """Whether two channels are one function by their parameters."""
        columns = (self.parameters.rounding, self.parameters.multiplier, self.parameters.shift)
        return all(column[a] == column[b] for column in columns)

    def is_identity(self, channel: int) -> bool:
        """Whether accumulators are kept as they are, but for the clamp."""
        single = int(self.parameters.rounding[channel]) == Rounding.SINGLE
        return single and self.factor(channel) == 1

    def rounds_halves_up(self, channel: int) -> bool:
        """Whether accumulators become ``floor(factor * accumulator + 1/2)``, but for the clamp."""
        single = int(self.parameters.rounding[channel]) == Rounding.SINGLE
        return single and not self.is_identity(channel)

    def factor(self, channel: int) -> Fraction:
        """The real factor."""
        double = int(self.parameters.rounding[channel]) in _DOUBLE
        exponent = int(self.parameters.shift[channel]) + (31 if double else 0)
        return Fraction(int(self.parameters.multiplier[channel]), 1 << exponent)

    def error(self, channel: int, largest: int) -> Fraction:
        """How far the rounded value is from ``factor * accumulator`` at most.

        ``largest`` is the greatest magnitude of the accumulators in question.
        """
        rounding = Rounding(int(self.parameters.rounding[channel]))
        if rounding is Rounding.SINGLE:
            return Fraction(0) if self.is_identity(channel) else _HALF
        if rounding in _DOUBLE:
            # Half a unit of the first rounding, divided by what the second one divides by.
            shift = int(self.parameters.shift[channel])
            return _HALF + (Fraction(1, 2 << shift) if shift else 0)
        if rounding is Rounding.FLOAT64:
            return _HALF + self.factor(channel) * largest * _BINARY64_UNIT
        # Integers of up to 24 bits are exact; above, two roundings add up.
        twice = 2 * _BINARY32_UNIT + _BINARY32_UNIT * _BINARY32_UNIT
        relative = _BINARY32_UNIT if largest <= 1 << 24 else twice
        return _HALF + self.factor(channel) * largest * relative
