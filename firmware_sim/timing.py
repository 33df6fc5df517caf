"""Cycles as an estimate: instructions by class times what the core's manual says of each class.

What is counted is exact (see ``emulator``): how often each class of instruction ran and how often
the program went on elsewhere than behind a block. What a class costs is a range: manuals give
ranges where neighbours, alignment or operands decide. All of them are for memory without wait
states; flash that is slower than the core, and interrupts, come on top. Cores without such a table
here (Cortex-M7, Cortex-M33, RISC-V) have no estimate.

Sources: the documents named in each ``Timing``; TI SWCU192, "Load/Store Timings" (loads and stores
side by side); encodings of Thumb instructions: ARMv7-M Architecture Reference Manual, A5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import median_low

import numpy as np
import numpy.typing as npt

Mix = npt.NDArray[np.int64]
Range = tuple[int, int]


class Class(IntEnum):
    """Of instructions; ``REGISTERS`` counts what ``MULTIPLE`` instructions move."""

    OTHER = 0
    IT = 1
    SINGLE = 2
    MULTIPLE = 3
    MULTIPLY = 4
    ACCUMULATE = 5
    LONG = 6
    LONG_ACCUMULATE = 7
    DIVIDE = 8
    REGISTERS = 9


CLASSES = len(Class)
INSTRUCTIONS = np.array([kind is not Class.REGISTERS for kind in Class], np.int64)
"""1 for the classes that count instructions."""


def classify(first: int, second: int) -> tuple[Class, int]:
    """Class of a Thumb instruction of one or two halfwords, and the registers that it moves."""
    if first >> 11 >= 0b11101:
        return _wide(first, second)
    if first & 0xFFC0 == 0x4340:
        return Class.MULTIPLY, 0
    if first >> 11 == 0b01001 or 0b0101 <= first >> 12 <= 0b1001:
        return Class.SINGLE, 0
    if first & 0xF600 == 0xB400:  # PUSH and POP
        return Class.MULTIPLE, (first & 0x1FF).bit_count()
    if first >> 12 == 0b1100:
        return Class.MULTIPLE, (first & 0xFF).bit_count()
    if first >> 8 == 0xBF and first & 15:
        return Class.IT, 0
    return Class.OTHER, 0


def _wide(first: int, second: int) -> tuple[Class, int]:
    if first & 0xFE40 == 0xE800:
        return Class.MULTIPLE, second.bit_count()
    if first & 0xFE40 == 0xE840:  # pairs of registers, and table branches
        return Class.MULTIPLE, 2
    if first & 0xFE00 == 0xF800:
        return Class.SINGLE, 0
    if first & 0xFF80 == 0xFB00:
        return Class.MULTIPLY if second >> 12 == 15 else Class.ACCUMULATE, 0
    if first & 0xFF80 == 0xFB80:
        operation = first >> 4 & 7
        if operation in (1, 3):
            return Class.DIVIDE, 0
        return Class.LONG if operation in (0, 2) else Class.LONG_ACCUMULATE, 0
    return Class.OTHER, 0


@dataclass(frozen=True)
class Timing:
    """Least and most cycles of each class, and of going on elsewhere (``refill``)."""

    source: str
    single: Range
    refill: Range
    it: Range = (1, 1)
    accumulate: Range = (1, 1)
    long: Range = (1, 1)
    long_accumulate: Range = (1, 1)
    divide: Range = (2, 12)

    def cycles(self, mix: Mix, jumps: int) -> Range:
        """Of a number of instructions by class, and of jumps.

        MULTIPLE takes one cycle, and one for each register; multiplication one.
        """
        one = (1, 1)
        costs = {
            Class.OTHER: one,
            Class.IT: self.it,
            Class.SINGLE: self.single,
            Class.MULTIPLE: one,
            Class.MULTIPLY: one,
            Class.ACCUMULATE: self.accumulate,
            Class.LONG: self.long,
            Class.LONG_ACCUMULATE: self.long_accumulate,
            Class.DIVIDE: self.divide,
            Class.REGISTERS: one,
        }
        low, high = (
            sum(int(mix[kind]) * cost[end] for kind, cost in costs.items())
            + jumps * self.refill[end]
            for end in (0, 1)
        )
        return low, high


TIMINGS = {
    # A core may have a multiplier of 32 cycles instead; those of RP2040 and STM32L0 take one.
    "cortex-m0plus": Timing(
        "Arm Cortex-M0+ Technical Reference Manual (DDI 0484), table 3-1, with the multiplier of "
        "one cycle",
        single=(2, 2),
        refill=(1, 2),
    ),
    "cortex-m3": Timing(
        "Arm Cortex-M3 Technical Reference Manual (DDI 0337), instruction set summary",
        single=(1, 2),
        refill=(1, 3),
        it=(0, 1),
        accumulate=(2, 2),
        long=(3, 5),
        long_accumulate=(4, 7),
    ),
    "cortex-m4": Timing(
        "Arm Cortex-M4 Processor Technical Reference Manual (100166), table 3-1",
        single=(1, 2),
        refill=(1, 3),
        it=(0, 1),
    ),
}


@dataclass(frozen=True)
class Cycles:
    """An estimate of the cycles of one inference, from ``minimum`` to ``maximum``; its source."""

    minimum: int
    maximum: int
    source: str

    @staticmethod
    def of(cpu: str, mixes: Sequence[Mix], jumps: Sequence[int]) -> Cycles | None:
        """Medians over samples; None for a core without a table."""
        timing = TIMINGS.get(cpu)
        if timing is None:
            return None
        ranges = [timing.cycles(mix, count) for mix, count in zip(mixes, jumps, strict=True)]
        low, high = (median_low([ends[end] for ends in ranges]) for end in (0, 1))
        return Cycles(low, high, f"{timing.source}; no wait states")

    def microjoules(self, microamperes_per_megahertz: float, volts: float) -> tuple[float, float]:
        """Energy of these cycles at a current per clock frequency, which is a charge per cycle."""
        each = microamperes_per_megahertz * volts * 1e-6
        return self.minimum * each, self.maximum * each
