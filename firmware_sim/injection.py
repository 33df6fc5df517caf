"""Faults in an emulated board: flipped bits in flash, RAM and registers, and truncated weights.

A fault happens before the start, where ``cactus_edge_init`` can find it, or before a chosen
instruction of an inference. Its outcome is one of:

- ``masked``: the logits are those of a run without fault;
- ``detected``: the model returned an error code;
- ``other-logits``: no error, other logits, the same label;
- ``wrong-label``: no error and another label, the silent failure;
- ``crash``: an access outside the memories, or no instruction;
- ``hang``: ``_PATIENCE`` times the usual number of instructions, and no end.

A board has a watchdog and a fault handler, so crash and hang are noticed there; the two in between
are not. What is flipped stays flipped until the run ends; registers are those of the core's general
use, stack pointer and link register included.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cactus_edge import Graph
from cactus_edge.csource import CSource
from cactus_edge.errors import ToolError, UsageError
from firmware_sim import build
from firmware_sim.boards import CPUS, Board
from firmware_sim.emulator import Machine, add_hook
from firmware_sim.host import stored_inputs
from firmware_sim.image import read_image

Place = Literal["weights", "code", "ram", "register", "truncated"]
Outcome = Literal["masked", "detected", "other-logits", "wrong-label", "crash", "hang"]

PLACES: tuple[Place, ...] = ("weights", "code", "ram", "register", "truncated")
_PATIENCE = 4
_BOOT_STEPS = 64  # instructions per byte that the CRC never takes
_NEVER = (1 << 64) - 1
_ERASED = 0xFF
_CRASHED = 255  # as a label, see c/flips.c


@dataclass(frozen=True)
class Fault:
    """One fault.

    ``where``: the byte, counted from the start of constants, of code or of RAM; the index of the
    register among ``Registers.general``; or how many bytes of the constants were written, behind
    which flash is erased. ``bit`` is that of the byte or register. ``instruction``: of the
    inference, or None for a fault before the start.
    """

    place: Place
    where: int
    bit: int = 0
    instruction: int | None = None


class _Trigger(ctypes.Structure):
    """``struct trigger`` of ``c/hook.c``."""

    _fields_ = (
        ("until", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("steps", ctypes.c_uint64),
        ("fault", ctypes.c_void_p),
        ("endless", ctypes.c_void_p),
    )


class Injector:
    """A board with one model and one input, on which faults are tried one after another."""

    def __init__(self, graph: Graph, source: CSource, sample: npt.ArrayLike, board: Board) -> None:
        """Boot, and run once without fault.

        Args:
            graph: the model.
            source: its C, with the default prefix.
            sample: one stored input [1, ...].
            board: where it runs.

        Raises:
            DoesNotFitError: the board is too small.
            ToolError: the compiler or the emulator failed.
        """
        self._input = stored_inputs(graph, sample)[0].tobytes()
        self._size = source.output_bytes
        self._kind = np.uint8 if graph.tensors[graph.logits].dtype.value == "uint8" else np.int8
        with tempfile.TemporaryDirectory(prefix="cactus-edge-") as name:
            folder = Path(name)
            self._image = read_image(build.firmware(source.files, folder, board))
            texts = {"hook.c": build.data_file("hook.c")}
            self._library = ctypes.CDLL(str(build.shared_library(texts, folder, "hook")))
        self._board = board
        self._registers = CPUS[board.cpu].registers.general
        self._callbacks = [ctypes.CFUNCTYPE(None)(call) for call in (self._strike, self._give_up)]
        pointers = [ctypes.cast(call, ctypes.c_void_p).value for call in self._callbacks]
        self._trigger = _Trigger(0, 0, 0, *pointers)
        self._fault: Fault | None = None
        self._endless = False
        self._boot()
        _, self._logits = self._infer(1 << 62)
        self.instructions = int(self._trigger.steps)

    def sizes(self) -> dict[Place, int]:
        """How many values ``Fault.where`` can take, by place."""
        image = self._image
        return {
            "weights": image.constant_bytes,
            "code": image.code_bytes,
            "ram": image.static_bytes,
            "register": len(self._registers),
            "truncated": image.constant_bytes,
        }

    def address(self, symbol: str) -> int:
        """Where a symbol of the image is."""
        return self._image.address(symbol)

    def draw(self, rng: np.random.Generator, place: Place, *, start: bool = False) -> Fault:
        """A fault of this place, uniformly; before the start, or at any instruction."""
        where = int(rng.integers(self.sizes()[place]))
        bit = int(rng.integers(32 if place == "register" else 8))
        when = None if start or place == "truncated" else int(rng.integers(self.instructions))
        return Fault(place, where, bit, when)

    def run(self, fault: Fault) -> Outcome:
        """What becomes of one fault.

        Raises:
            UsageError: a fault that the board cannot have.
        """
        if fault.place not in PLACES or not 0 <= fault.where < self.sizes()[fault.place]:
            raise UsageError(f"{fault}: no such place on {self._board.name}")
        if fault.instruction is None and fault.place in ("ram", "register"):
            raise UsageError(f"{fault}: RAM and registers have no content before the start")
        self._fault = fault
        outcome = self._outcome(fault)
        self._fault = None
        if fault.place in ("weights", "code", "truncated") or outcome in ("crash", "hang"):
            self._boot()
        return outcome

    def _outcome(self, fault: Fault) -> Outcome:
        try:
            if fault.instruction is None:
                self._boot(struck=True)
                if self._machine.start_status:
                    return "detected"
            status, logits = self._infer(_PATIENCE * self.instructions + 1000)
        except ToolError:
            return "hang" if self._endless else "crash"
        if self._endless:
            return "hang"
        if status:
            return "detected"
        if np.array_equal(logits, self._logits):
            return "masked"
        same = int(logits.argmax()) == int(self._logits.argmax())
        return "other-logits" if same else "wrong-label"

    def _boot(self, *, struck: bool = False) -> None:
        self._trigger.until, self._trigger.steps = _NEVER, 0
        self._trigger.limit = _BOOT_STEPS * self._image.flash_bytes + 100_000
        self._endless = False

        def before(machine: Machine) -> None:
            self._machine = machine
            if struck:
                self._strike()
            add_hook(machine.engine, "UC_HOOK_CODE", self._library.count_step, self._trigger)

        self._machine = Machine(self._board, self._image, before=before)
        self._memory = bytes(
            self._machine.engine.mem_read(self._board.ram_origin, self._board.ram_bytes)
        )
        if self._endless:
            raise ToolError("the start does not end")

    def _infer(self, limit: int) -> tuple[int, npt.NDArray[np.generic]]:
        machine, fault, trigger = self._machine, self._fault, self._trigger
        engine, image = machine.engine, self._image
        engine.mem_write(self._board.ram_origin, self._memory)
        given, output = (image.address(f"{n}_buffer") for n in ("input", "output"))
        engine.mem_write(given, self._input)
        later = fault is not None and fault.instruction is not None
        trigger.until = fault.instruction if fault is not None and later else _NEVER
        trigger.steps, trigger.limit, self._endless = 0, limit, False
        status = machine.call("cactus_edge_run", given, output)
        logits = np.frombuffer(bytes(engine.mem_read(output, self._size)), self._kind)
        return status, logits

    def _strike(self) -> None:
        fault, engine = self._fault, self._machine.engine
        assert fault is not None, "nothing strikes without a fault"
        if fault.place == "register":
            register = self._machine.register(self._registers[fault.where])
            engine.reg_write(register, engine.reg_read(register) ^ 1 << fault.bit)
            return
        origin = self._board.ram_origin if fault.place == "ram" else self._board.flash_origin
        constants = origin + self._image.code_bytes
        if fault.place == "truncated":
            rest = self._image.constant_bytes - fault.where
            engine.mem_write(constants + fault.where, bytes([_ERASED]) * rest)
            return
        address = fault.where + (constants if fault.place == "weights" else origin)
        (byte,) = engine.mem_read(address, 1)
        engine.mem_write(address, bytes([byte ^ 1 << fault.bit]))
        if fault.place == "code":
            engine.ctl_remove_cache(address, address + 1)

    def _give_up(self) -> None:
        self._endless = True
        self._machine.engine.emu_stop()


@dataclass(frozen=True)
class Flips:
    """``noticed`` bool [n]: whether the check found a flip; ``right`` labels [m] without one.

    ``labels`` int64 [n, m] are those that a flip leads to without a check, -1 for a crash.
    """

    noticed: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]


def flip_tables(
    graph: Graph, source: CSource, flips: npt.ArrayLike, inputs: npt.ArrayLike
) -> Flips:
    """Single bits of the tables, flipped in a build for this computer, and the check for them.

    Args:
        graph: the model, of fewer than 255 classes.
        source: its C, with the default prefix.
        flips: (byte, bit) [n, 2], bytes counted through ``source.tables``.
        inputs: stored integers [m, ...].

    Raises:
        ToolError: the compiler or the program failed.
    """
    pairs = np.asarray(flips, np.int32).reshape(-1, 2)
    data = stored_inputs(graph, inputs)
    lines = "".join(f"  {{{name}, sizeof {name}}},\n" for name in source.tables)
    with tempfile.TemporaryDirectory(prefix="cactus-edge-") as name:
        folder = Path(name)
        build.put({**source.files, "tables.inc": lines}, folder)
        (folder / "flips.c").write_text(build.data_file("flips.c"), encoding="utf-8")
        build.compile_c(["-std=c99", "-O2", "-g0", "flips.c", "-o", "flips"], folder)
        (folder / "flips.bin").write_bytes(pairs.tobytes())
        (folder / "inputs.bin").write_bytes(data.tobytes())
        command = [folder / "flips", "flips.bin", "inputs.bin", "results.bin"]
        result = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        if result.returncode:
            raise ToolError(f"the program that flips bits failed (status {result.returncode})")
        found = np.frombuffer((folder / "results.bin").read_bytes(), np.uint8)
    found = np.where(found == _CRASHED, -1, found.astype(np.int64))
    right, rows = found[: len(data)], found[len(data) :].reshape(len(pairs), 1 + len(data))
    return Flips(rows[:, 0] == 1, rows[:, 1:], right)
