"""Microcontrollers to emulate: instruction set and memory map.

Sizes are those of the data sheets. ``ram_bytes`` is the contiguous region that a plain linker
script uses: an STM32F405 has 64 KiB more, core-coupled at another address.
"""

from __future__ import annotations

from dataclasses import dataclass

from cactus_edge.errors import UsageError

KIB = 1024


@dataclass(frozen=True)
class Board:
    """``cpu`` is a key of ``CPUS``; origins are addresses, multiples of 4 KiB as are the sizes."""

    name: str
    cpu: str
    flash_origin: int
    flash_bytes: int
    ram_origin: int
    ram_bytes: int


@dataclass(frozen=True)
class Cpu:
    """``compiler`` is clang's name for -mcpu, ``model`` unicorn's constant."""

    compiler: str
    model: str


CPUS: dict[str, Cpu] = {
    # Unicorn has no M0+; both execute ARMv6-M and differ in their pipelines alone.
    "cortex-m0plus": Cpu("cortex_m0plus", "UC_CPU_ARM_CORTEX_M0"),
    "cortex-m3": Cpu("cortex_m3", "UC_CPU_ARM_CORTEX_M3"),
    "cortex-m4": Cpu("cortex_m4", "UC_CPU_ARM_CORTEX_M4"),
    "cortex-m7": Cpu("cortex_m7", "UC_CPU_ARM_CORTEX_M7"),
    "cortex-m33": Cpu("cortex_m33", "UC_CPU_ARM_CORTEX_M33"),
}

_TABLE = (
    Board("STM32L073", "cortex-m0plus", 0x08000000, 192 * KIB, 0x20000000, 20 * KIB),
    Board("STM32L152RE", "cortex-m3", 0x08000000, 512 * KIB, 0x20000000, 80 * KIB),
    Board("STM32F405", "cortex-m4", 0x08000000, 1024 * KIB, 0x20000000, 128 * KIB),
    Board("nRF52840", "cortex-m4", 0x00000000, 1024 * KIB, 0x20000000, 256 * KIB),
    Board("STM32F746", "cortex-m7", 0x08000000, 1024 * KIB, 0x20000000, 320 * KIB),
    Board("nRF5340", "cortex-m33", 0x00000000, 1024 * KIB, 0x20000000, 512 * KIB),
)
BOARDS: dict[str, Board] = {board.name: board for board in _TABLE}


def board_of(cpu: str, board: str | Board | None) -> Board:
    """The board of this name, or the first one in the table with this CPU.

    Raises:
        UsageError: no such CPU or board, or a board with another CPU.
    """
    if cpu not in CPUS:
        raise UsageError(f"no CPU '{cpu}'; known: {', '.join(CPUS)}")
    if board is None:
        return next(entry for entry in _TABLE if entry.cpu == cpu)
    if isinstance(board, str):
        if board not in BOARDS:
            raise UsageError(f"no board '{board}'; known: {', '.join(BOARDS)}")
        board = BOARDS[board]
    if board.cpu != cpu:
        raise UsageError(f"board {board.name} has a {board.cpu}, not a {cpu}")
    return board
