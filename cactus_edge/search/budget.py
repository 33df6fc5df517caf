"""Limits, which candidates keep them, and what would have to give where none does.

What is asked of a candidate is in ``Measured``, so that rules can be tested on plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from cactus_edge.errors import UsageError
from cactus_edge.search.front import Point

_NEAREST = 3
KIB = 1024


class Measured(Protocol):
    """A candidate's figures; see ``report.Row``."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def cost(self) -> float | None: ...  # noqa: D102
    @property
    def certified_accuracy(self) -> float: ...  # noqa: D102


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """None does not limit.

    Attributes:
        max_size: KiB that ship.
        max_latency: microseconds of one image, on this machine.
        max_instructions: of one inference, on a microcontroller.
        min_certified: percent of the validation samples.
    """

    max_size: float | None = None
    max_latency: float | None = None
    max_instructions: float | None = None
    min_certified: float | None = None

    def check(self, device: str) -> None:
        """Check ranges, and that costs are those of the device.

        Raises:
            UsageError: a limit that nothing can keep or break, or one of another device.
        """
        for option, value in (
            ("--max-size", self.max_size),
            ("--max-latency", self.max_latency),
            ("--max-instructions", self.max_instructions),
        ):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{option} {value:g}: a finite number above 0 is needed")
        if self.min_certified is not None and not 0 <= self.min_certified <= 100:
            raise UsageError(f"--min-certified {self.min_certified:g}: give percent, from 0 to 100")
        if device == "host" and self.max_instructions is not None:
            raise UsageError(
                "--max-instructions is about a microcontroller; name one with --device, or limit "
                "this machine's time with --max-latency"
            )
        if device != "host" and self.max_latency is not None:
            raise UsageError(
                f"--max-latency is about this machine; {device} is emulated: limit its "
                "--max-instructions"
            )


class Miss(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A limit that a candidate breaks, and the value that it needs there."""

    option: str
    limit: float
    value: float


class Near(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A candidate that does not keep the limits, and which ones."""

    name: str
    misses: tuple[Miss, ...]


@dataclass(frozen=True)
class _Rule:
    """One limit: ``values`` of the candidates may be at most (``sign`` 1) or at least (-1) it."""

    option: str
    limit: float
    sign: int

    def value(self, row: Measured) -> float:
        if self.option == "--max-size":
            return row.size / KIB
        if self.option == "--min-certified":
            return 100 * row.certified_accuracy
        return math.inf if row.cost is None else row.cost

    def excess(self, row: Measured) -> float:
        """Relative to the limit; at most 0 where it is kept."""
        difference = self.sign * (self.value(row) - self.limit)
        return difference / self.limit if self.limit else difference


def _rules(limits: Limits) -> list[_Rule]:
    entries = (
        ("--max-size", limits.max_size, 1),
        ("--max-latency", limits.max_latency, 1),
        ("--max-instructions", limits.max_instructions, 1),
        ("--min-certified", limits.min_certified, -1),
    )
    return [_Rule(option, limit, sign) for option, limit, sign in entries if limit is not None]


def objectives(row: Measured) -> Point:
    """Certified accuracy, size and cost, the better the smaller.

    Sizes count in whole KiB: of two files with as many weights, one may hold a longer text about
    where it comes from.
    """
    cost = math.inf if row.cost is None else row.cost
    return (-row.certified_accuracy, -(-row.size // KIB), cost)


def meets(row: Measured, limits: Limits) -> bool:
    """Whether a candidate runs on the device and keeps every limit."""
    return row.cost is not None and all(rule.excess(row) <= 0 for rule in _rules(limits))


def choose(rows: Sequence[Measured], limits: Limits) -> int | None:
    """The index of the best candidate that keeps the limits; None if there is none.

    It is the most certified one, or the cheapest if ``min_certified`` says how much is enough. What
    is equal there is decided by the other objectives, so that the choice is on the Pareto front.
    """
    able = [index for index, row in enumerate(rows) if meets(row, limits)]

    def order(index: int) -> Point:
        certified, size, cost = objectives(rows[index])
        enough = limits.min_certified is not None
        return (cost, size, certified) if enough else (certified, size, cost)

    return min(able, key=order, default=None)


def nearest(rows: Sequence[Measured], limits: Limits) -> tuple[Near, ...]:
    """The candidates whose largest excess, relative to its limit, is least."""
    rules = _rules(limits)
    found: list[tuple[float, Near]] = []
    for row in rows:
        broken = [rule for rule in rules if rule.excess(row) > 0]
        if row.cost is not None and broken:
            misses = tuple(Miss(rule.option, rule.limit, rule.value(row)) for rule in broken)
            found.append((max(rule.excess(row) for rule in broken), Near(row.name, misses)))
    return tuple(near for _, near in sorted(found, key=lambda entry: entry[0])[:_NEAREST])


def needed(rows: Sequence[Measured], limits: Limits) -> dict[str, float | None]:
    """By limit: the tightest value at which a candidate keeps all others; None if none does."""
    rules = _rules(limits)
    result: dict[str, float | None] = {}
    for rule in rules:
        values = [
            rule.value(row)
            for row in rows
            if row.cost is not None
            and all(other.excess(row) <= 0 for other in rules if other is not rule)
        ]
        result[rule.option] = min(values, key=lambda v: rule.sign * v, default=None)  # noqa: B023
    return result
