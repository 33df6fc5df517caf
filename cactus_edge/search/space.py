"""The candidates of a search: sparsities and members, each at some widths."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from cactus_edge.errors import UsageError
from cactus_edge.train.lower import Settings, chosen_member
from cactus_edge.train.members import Magnitude
from cactus_edge.train.recipe import Recipe

logger = logging.getLogger(__name__)

BITS = (8, 4, 3, 2)
SPARSITIES = (0.0, 0.5, 0.9, 0.95)


@dataclass(frozen=True)
class Space:
    """What is explored.

    Attributes:
        bits: widths, for all that does not have its own.
        sparsities: fractions to prune by magnitude; None for ``SPARSITIES``, or for none where
            ``members`` are given.
        members: numbers or tables, as ``chosen_member`` takes them; None for all of the recipe's,
            or for none where ``sparsities`` are given.
    """

    bits: tuple[int, ...] = BITS
    sparsities: tuple[float, ...] | None = None
    members: tuple[str, ...] | None = None

    def candidates(self, recipe: Recipe) -> list[Option]:
        """Every candidate once: equal patterns at equal widths are one.

        Raises:
            UsageError: a width, a sparsity or a member that cannot be deployed, or nothing at all.
        """
        free = self.sparsities is None and self.members is None
        sparsities = SPARSITIES if free else self.sparsities or ()
        every = tuple(str(number) for number in range(1, len(recipe.compression.members) + 1))
        found = [Option(Settings(bits, sparsity)) for sparsity in sparsities for bits in self.bits]
        for text in every if free else self.members or ():
            found += _of_member(recipe, text, self.bits, given=not free)
        if not found:
            raise UsageError("nothing to search: give --bits with --sparsity or --member")
        distinct: dict[tuple[str, int], Option] = {}
        for option in found:
            distinct.setdefault(option.key, option)
        return list(distinct.values())


@dataclass(frozen=True)
class Option:
    """One way to compress; ``member`` is what ``convert --member`` takes, or empty."""

    settings: Settings
    member: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Equal keys mean equal integers."""
        return self.settings.pruned.key(), self.settings.bits

    @property
    def name(self) -> str:
        """``int4, 50 % pruned``."""
        pattern = self.settings.pruned
        text = pattern.key()
        if text and isinstance(pattern, Magnitude):
            text = f"{100 * pattern.sparsity:.4g} % pruned"
        return f"int{self.settings.bits}" + (f", {text}" if text else "")

    def command(self, run: str) -> str:
        """The verb that writes the same file."""
        words = ["cactus-edge", "convert", run, "--bits", str(self.settings.bits)]
        if self.settings.sparsity:
            words += ["--sparsity", repr(self.settings.sparsity)]
        if self.member:
            words += ["--member", self.member]
        return shlex.join([*words, "-o", "model.tflite"])


def _of_member(recipe: Recipe, text: str, widths: Sequence[int], *, given: bool) -> list[Option]:
    """A member at its width, or at each of ``widths``."""
    member = chosen_member(recipe, text)
    own = member.weight_bits()
    try:
        return [
            Option(Settings(bits, pattern=member.pattern()), text)
            for bits in (widths if own is None else (own,))
        ]
    except UsageError:
        if given:
            raise
        logger.warning("member %s, %s: left out, no file holds %s bits", text, member.label(), own)
        return []
