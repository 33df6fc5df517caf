"""Microcontrollers to emulate: instruction set and memory map.

Sizes are those of the data sheets. ``ram_bytes`` is the contiguous region that a plain linker
script uses: an STM32F405 has 64 KiB more, core-coupled at another address, an STM32H743 has 544
KiB in other banks. The flash of an RP2040 is a chip of its own, 2 MiB on a Pico; so is that of most
ESP32-C3 modules, 4 MiB, of which code and constants are mapped at two addresses and here at one.
"""

from __future__ import annotations

from dataclasses import dataclass

from cactus_edge.errors import UsageError, meant

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
class Registers:
    """``module`` of unicorn with the constants ``prefix`` + name; all that a fault may hit."""

    module: str
    prefix: str
    stack: str
    link: str
    counter: str
    arguments: tuple[str, ...]
    general: tuple[str, ...]


@dataclass(frozen=True)
class Cpu:
    """``compiler`` is clang's name for -mcpu, ``model`` unicorn's constant.

    ``registers`` names unicorn's, with ``target`` and ``thumb`` what follows from the architecture.
    """

    compiler: str
    model: str
    registers: Registers
    target: str = "thumb-freestanding-eabi"

    @property
    def thumb(self) -> bool:
        """Whether addresses of functions carry the Thumb bit."""
        return self.target.startswith("thumb")


ARM = Registers(
    "arm_const",
    "UC_ARM_REG_",
    "SP",
    "LR",
    "PC",
    ("R0", "R1", "R2"),
    (*(f"R{n}" for n in range(13)), "SP", "LR"),
)
RISCV = Registers(
    "riscv_const",
    "UC_RISCV_REG_",
    "X2",
    "X1",
    "PC",
    ("X10", "X11", "X12"),
    tuple(f"X{n}" for n in range(1, 32)),
)


CPUS: dict[str, Cpu] = {
    # Unicorn has no M0+; both execute ARMv6-M and differ in their pipelines alone.
    "cortex-m0plus": Cpu("cortex_m0plus", "UC_CPU_ARM_CORTEX_M0", ARM),
    "cortex-m3": Cpu("cortex_m3", "UC_CPU_ARM_CORTEX_M3", ARM),
    "cortex-m4": Cpu("cortex_m4", "UC_CPU_ARM_CORTEX_M4", ARM),
    "cortex-m7": Cpu("cortex_m7", "UC_CPU_ARM_CORTEX_M7", ARM),
    "cortex-m33": Cpu("cortex_m33+dsp", "UC_CPU_ARM_CORTEX_M33", ARM),
    "rv32imc": Cpu(
        "generic_rv32+m+c", "UC_CPU_RISCV32_SIFIVE_E31", RISCV, "riscv32-freestanding-none"
    ),
}

_TABLE = (
    Board("STM32L073", "cortex-m0plus", 0x08000000, 192 * KIB, 0x20000000, 20 * KIB),
    Board("RP2040", "cortex-m0plus", 0x10000000, 2048 * KIB, 0x20000000, 264 * KIB),
    Board("STM32L152RE", "cortex-m3", 0x08000000, 512 * KIB, 0x20000000, 80 * KIB),
    Board("STM32F405", "cortex-m4", 0x08000000, 1024 * KIB, 0x20000000, 128 * KIB),
    Board("nRF52840", "cortex-m4", 0x00000000, 1024 * KIB, 0x20000000, 256 * KIB),
    Board("STM32F746", "cortex-m7", 0x08000000, 1024 * KIB, 0x20000000, 320 * KIB),
    Board("STM32H743", "cortex-m7", 0x08000000, 2048 * KIB, 0x24000000, 512 * KIB),
    Board("nRF5340", "cortex-m33", 0x00000000, 1024 * KIB, 0x20000000, 512 * KIB),
    Board("ESP32-C3", "rv32imc", 0x42000000, 4096 * KIB, 0x3FC80000, 384 * KIB),
)
BOARDS: dict[str, Board] = {board.name: board for board in _TABLE}


USUAL_CPU = "cortex-m4"
"""Where neither a CPU nor a board is asked for."""


def board_of(cpu: str | None, board: str | Board | None) -> Board:
    """The board of this name, or the first one in the table with this CPU.

    Raises:
        UsageError: no such CPU or board, or a board with another CPU.
    """
    if cpu is None:
        cpu = USUAL_CPU if board is None else board_named(board).cpu
    if cpu not in CPUS:
        raise UsageError(f"no CPU '{cpu}'{meant(cpu, CPUS)} known: {', '.join(CPUS)}")
    if board is None:
        return next(entry for entry in _TABLE if entry.cpu == cpu)
    found = board_named(board)
    if found.cpu != cpu:
        raise UsageError(f"board {found.name} has a {found.cpu}, not a {cpu}")
    return found


def board_named(board: str | Board) -> Board:
    """The board of this name, in any case or cut short, or the board itself.

    Raises:
        UsageError: no such board, or several.
    """
    if isinstance(board, Board):
        return board
    if board in BOARDS:
        return BOARDS[board]
    like = [entry for name, entry in BOARDS.items() if name.lower().startswith(board.lower())]
    if len(like) == 1:
        return like[0]
    if like:
        names = ", ".join(entry.name for entry in like)
        raise UsageError(f"no board '{board}'; it may be: {names}")
    raise UsageError(f"no board '{board}'{meant(board, BOARDS)} known: {', '.join(BOARDS)}")
