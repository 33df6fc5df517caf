"""A Cortex-M or a RISC-V core that runs a firmware image, instruction by instruction, in unicorn.

Instruction counts are exact: a histogram of the basic blocks that were entered times the number of
instructions in each. An instruction that an IT block skips counts, as it takes its cycle; this is
why instructions are not counted one by one, which would leave those out. There are no cycles here:
unicorn models no pipeline, no wait states and no interrupts; ``timing`` estimates them.

Sources: ARMv7-M Architecture Reference Manual, A5.1, and the RISC-V Instruction Set Manual, volume
I, 1.5 (lengths of instructions).
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cactus_edge.csource import CLayer
from cactus_edge.errors import DoesNotFitError, MissingExtraError, ToolError
from firmware_sim import build
from firmware_sim.boards import CPUS, Board
from firmware_sim.image import Image, check_fit
from firmware_sim.timing import CLASSES, INSTRUCTIONS, Class, Mix, classify

_STACK_PATTERN = 0xA5
_NEVER = 0xFFFFFFFE  # an address at which no board has code

TraceCallback = Callable[[int, bytes], None]


class Histogram(ctypes.Structure):
    """``struct histogram`` of ``c/hook.c``."""

    _fields_ = (
        ("origin", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("entries", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("strange", ctypes.c_uint64),
        ("jumps", ctypes.c_uint64),
        ("behind", ctypes.c_uint64),
    )


def instruction_bytes(halfword: int, *, thumb: bool = True) -> int:
    """Length of the Thumb, or RISC-V, instruction that begins with ``halfword``."""
    if not thumb:
        return 4 if halfword & 3 == 3 else 2
    return 4 if halfword >> 11 >= 0b11101 else 2


class BlockCounter:
    """Counts instructions between two calls of ``take``.

    Args:
        image: its code is what is counted.
        board: where it runs; its flash begins with the code.
        folder: for the compiled hook.
    """

    def __init__(self, image: Image, board: Board, folder: Path) -> None:
        origin = board.flash_origin
        self._origin, self._thumb = origin, CPUS[board.cpu].thumb
        (code,) = (content for address, content in image.segments if address == origin)
        self._halfwords = np.frombuffer(code[: image.code_bytes], "<u2")
        slots = self._halfwords.size
        self._entries = np.zeros(slots, np.uint64)
        self._sizes = np.zeros(slots, np.uint32)
        self._classes = np.zeros((slots, CLASSES), np.int64)
        self._mix = np.zeros(CLASSES, np.int64)
        self._state = Histogram(
            origin, slots, self._entries.ctypes.data, self._sizes.ctypes.data, 0, 0, 0
        )
        texts = {"hook.c": build.data_file("hook.c")}
        self._library = ctypes.CDLL(str(build.shared_library(texts, folder, "hook")))

    def attach(self, engine: Any) -> None:
        """Install the hook.

        Raises:
            ToolError: unicorn refuses, or is a version without these internals.
        """
        add_hook(engine, "UC_HOOK_BLOCK", self._library.count_block, self._state)

    def split(self, address: int) -> int:
        """``take`` at the entry of a block that was counted already: it belongs to what follows."""
        slot = (address - self._origin) // 2
        self._entries[slot] -= np.uint64(1)
        total = self.take()
        self._entries[slot] = 1
        return total

    def take(self) -> int:
        """Instructions since the last call.

        Raises:
            ToolError: code ran that is not in the image, so the count would be wrong.
        """
        if self._state.strange:
            raise ToolError(f"{self._state.strange} blocks ran that are not the image's code")
        entered = np.flatnonzero(self._entries)
        for slot in entered.tolist():
            if not self._classes[slot].any():
                self._decode(slot, int(self._sizes[slot]))
        mix = self._entries[entered].astype(np.int64) @ self._classes[entered]
        self._entries[:] = 0
        self._mix += mix
        return int(mix @ INSTRUCTIONS)

    def take_mix(self) -> tuple[Mix, int]:
        """What ``take`` counted since the last call of this, and jumps; see ``timing``."""
        mix, jumps = self._mix, int(self._state.jumps)
        self._mix, self._state.jumps = np.zeros(CLASSES, np.int64), 0
        return mix, jumps

    def _decode(self, first: int, size: int) -> None:
        """Instructions in the block of ``size`` bytes, by class; on RISC-V all are one."""
        slot, end = first, first + size // 2
        while slot < end:
            halfword = int(self._halfwords[slot])
            length = instruction_bytes(halfword, thumb=self._thumb) // 2
            kind, registers = Class.OTHER, 0
            if self._thumb:
                kind, registers = classify(halfword, int(self._halfwords[slot + length - 1]))
            self._classes[first, kind] += 1
            self._classes[first, Class.REGISTERS] += registers
            slot += length


def add_hook(engine: Any, kind: str, function: Any, state: ctypes.Structure) -> None:
    """Have unicorn call a C function; the bindings' own way takes Python ones, 50 times slower.

    Raises:
        ToolError: unicorn refuses, or is a version without these internals.
    """
    bindings = importlib.import_module("unicorn.unicorn_py3.unicorn")
    try:
        add = ctypes.CDLL(bindings.uclib._name).uc_hook_add
        handle = engine._uch
    except AttributeError:
        raise ToolError("this version of unicorn is not supported; install 2.1.4") from None
    status = add(
        handle,
        ctypes.byref(ctypes.c_size_t()),
        ctypes.c_int(getattr(_constants(), kind)),
        function,
        ctypes.byref(state),
        ctypes.c_uint64(1),
        ctypes.c_uint64(0),
    )
    if status:
        raise ToolError(f"unicorn did not accept a hook that counts (error {status})")


class Machine:
    """A board that has booted an image and waits for calls.

    ``start_status`` is what ``cactus_edge_init`` returned.
    """

    def __init__(
        self,
        board: Board,
        image: Image,
        *,
        trace: TraceCallback | None = None,
        layers: Sequence[CLayer] = (),
        before: Callable[[Machine], None] | None = None,
    ) -> None:
        """Load, map the board's memory and nothing else, and run the start-up code.

        Args:
            board: where it runs.
            image: linked for that board.
            trace: called with layer and content behind each operator.
            layers: to say which of them need most, where the model does not fit.
            before: called when everything is loaded and nothing has run.

        Raises:
            MissingExtraError: unicorn is not installed.
            DoesNotFitError: the board is too small.
            ToolError: the image failed before it was ready.
        """
        check_fit(image, board, layers)
        self.board, self.image = board, image
        self._cpu = CPUS[board.cpu]
        self._constants = _constants(self._cpu.registers.module)
        self.engine = _engine(board)
        for address, content in image.segments:
            self.engine.mem_write(address, content)
        self._stack_top, entry = (
            int.from_bytes(self.engine.mem_read(board.flash_origin + offset, 4), "little")
            for offset in (0, 4)
        )
        self._stack_end = board.ram_origin + image.static_bytes
        self.ready = image.address("ready")
        self.engine.mem_write(
            self._stack_end, bytes([_STACK_PATTERN]) * (self._stack_top - self._stack_end)
        )
        registers = self._cpu.registers
        self.engine.reg_write(self.register(registers.stack), self._stack_top)
        if before is not None:
            before(self)
        self._run(entry)
        self._stack_pointer = self.engine.reg_read(self.register(registers.stack))
        self.start_status = self.word("status")
        if trace is not None:
            self._trace(trace)

    def register(self, name: str) -> int:
        """Unicorn's number of a register."""
        return int(getattr(self._constants, f"{self._cpu.registers.prefix}{name}"))

    def word(self, symbol: str) -> int:
        """A 32-bit variable of the image."""
        return int.from_bytes(self.engine.mem_read(self.image.address(symbol), 4), "little")

    def prepare(self, function: str, *arguments: int) -> int:
        """Registers for a call of a function that returns to ``ready``; where it begins."""
        registers, thumb = self._cpu.registers, int(self._cpu.thumb)
        for name, value in zip(registers.arguments, arguments, strict=False):
            self.engine.reg_write(self.register(name), value)
        self.engine.reg_write(self.register(registers.stack), self._stack_pointer)
        self.engine.reg_write(self.register(registers.link), self.ready | thumb)
        return self.image.address(function) | thumb

    def result(self) -> int:
        """What a function that has returned returned."""
        return int(self.engine.reg_read(self.register(self._cpu.registers.arguments[0])))

    def call(self, function: str, *arguments: int) -> int:
        """One call, from a function's first instruction to its return; what it returns.

        Raises:
            ToolError: a fault, such as an access outside the board's memory or a write to flash.
        """
        self._run(self.prepare(function, *arguments))
        return self.result()

    def resume(self) -> None:
        """Go on where the program was ready, until a callback stops the engine.

        Raises:
            ToolError: a fault.
        """
        self._run(self.ready | int(self._cpu.thumb), until=_NEVER)

    def infer(self, data: bytes, output_bytes: int) -> bytes:
        """One call of ``cactus_edge_run``.

        Raises:
            ToolError: a fault, or the model reported an error.
            DoesNotFitError: the stack ran into the data below it.
        """
        given, output = (self.image.address(f"{n}_buffer") for n in ("input", "output"))
        self.engine.mem_write(given, data)
        status = self.call("cactus_edge_run", given, output)
        if status:
            raise ToolError(
                f"cactus_edge_run on the emulated {self.board.cpu} reported error {status}; see "
                "its header"
            )
        return bytes(self.engine.mem_read(output, output_bytes))

    def stack_bytes(self) -> int:
        """Deepest stack so far, by the pattern that it has overwritten.

        Raises:
            DoesNotFitError: it used all there was, so it may have run into the data below it.
        """
        room = self._stack_top - self._stack_end
        stack = np.frombuffer(bytes(self.engine.mem_read(self._stack_end, room)), np.uint8)
        untouched = int(np.argmax(np.append(stack, 0) != _STACK_PATTERN))
        if untouched == 0:
            raise DoesNotFitError(
                f"the stack does not fit {self.board.name}: {room} bytes are left beside "
                f"{self.image.static_bytes} bytes of data; choose a larger board"
            )
        return room - untouched

    def at(self, address: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever the instruction at ``address`` is about to run."""

        def stopped(engine: Any, at: int, size: int, user: object) -> None:
            callback()

        self.engine.hook_add(_constants().UC_HOOK_CODE, stopped, None, address, address)

    def _run(self, begin: int, until: int | None = None) -> None:
        unicorn = importlib.import_module("unicorn")
        try:
            self.engine.emu_start(begin, self.ready if until is None else until)
        except unicorn.UcError as error:
            address = self.engine.reg_read(self.register(self._cpu.registers.counter))
            raise ToolError(
                f"the emulated {self.board.cpu} stopped at 0x{address:08x}: {error}"
            ) from None

    def _trace(self, callback: TraceCallback) -> None:
        """Report each call of ``cactus_edge_trace``."""
        names = [self.register(name) for name in self._cpu.registers.arguments]

        def stopped(engine: Any, address: int, size: int, user: object) -> None:
            layer, data, count = (engine.reg_read(name) for name in names)
            callback(layer, bytes(engine.mem_read(data, count)))

        address = self.image.address("cactus_edge_trace")
        kind = _constants().UC_HOOK_CODE
        self.engine.hook_add(kind, stopped, None, address, address)


def _constants(module: str = "unicorn_const") -> ModuleType:
    try:
        return importlib.import_module(f"unicorn.{module}")
    except ModuleNotFoundError:
        raise MissingExtraError("unicorn", "sim", "Emulating a microcontroller") from None


def _engine(board: Board) -> Any:
    """Unicorn with the board's CPU and memory."""
    constants, cpu = _constants(), CPUS[board.cpu]
    unicorn = importlib.import_module("unicorn")
    model = getattr(_constants(cpu.registers.module), cpu.model)
    # UC_MODE_MCLASS would look right and silently emulate a Cortex-M33 whatever model is asked for.
    kind = (constants.UC_ARCH_ARM, constants.UC_MODE_THUMB)
    if not cpu.thumb:
        kind = (constants.UC_ARCH_RISCV, constants.UC_MODE_RISCV32)
    engine = unicorn.Uc(*kind, model)
    if engine.ctl_get_cpu_model() != model:
        raise ToolError(f"unicorn does not emulate a {board.cpu}; install unicorn 2.1.4")
    executable = constants.UC_PROT_READ | constants.UC_PROT_EXEC
    writable = constants.UC_PROT_READ | constants.UC_PROT_WRITE
    engine.mem_map(board.flash_origin, board.flash_bytes, executable)
    engine.mem_map(board.ram_origin, board.ram_bytes, writable)
    return engine
