"""The same C in another emulator: QEMU, where the Cortex-M55 is.

A cross-check of unicorn's cores, which descend from an older QEMU, and the only way to a Cortex-M55
and its vector instructions (MVE). Needs ``qemu-system-arm`` 7.2 or later, which pip does not have.

Instructions are counted by the system timer: with ``-icount`` QEMU's clocks go on by a fixed time
with each instruction. The count is exact to the few instructions around the call.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cactus_edge import Graph
from cactus_edge.csource import CSource
from cactus_edge.errors import ToolError, UsageError, meant
from firmware_sim import build
from firmware_sim.boards import ARM, KIB, Board, Cpu
from firmware_sim.certified import Verdicts, verdicts
from firmware_sim.host import Stored, as_tensor, stored_inputs
from firmware_sim.image import check_fit, read_image

_SECONDS = 600
_SHIFT = 6  # an instruction takes 2^6 nanoseconds of the emulated clocks


@dataclass(frozen=True)
class Machine:
    """``name``, ``cpu`` and ``clock`` in Hz are QEMU's; ``compiler`` is clang's."""

    name: str
    cpu: str
    compiler: str
    memory: Board
    clock: int = 25_000_000


def _memory(name: str, flash: int, ram: int) -> Board:
    return Board(name, name, 0, flash * KIB, 0x20000000, ram * KIB)


MACHINES = {
    "cortex-m3": Machine("mps2-an385", "cortex-m3", "cortex_m3", _memory("MPS2", 4096, 4096)),
    "cortex-m4": Machine("mps2-an386", "cortex-m4", "cortex_m4", _memory("MPS2", 4096, 4096)),
    "cortex-m7": Machine("mps2-an500", "cortex-m7", "cortex_m7", _memory("MPS2", 4096, 4096)),
    "cortex-m55": Machine(
        "mps3-an547", "cortex-m55", "cortex_m55", _memory("MPS3", 512, 512), 32_000_000
    ),
    "cortex-m55+mve": Machine(
        "mps3-an547", "cortex-m55", "cortex_m55+mve", _memory("MPS3", 512, 512), 32_000_000
    ),
}
"""By name; with ``+mve`` the compiler may use vector instructions."""


def run_qemu(graph: Graph, source: CSource, inputs: npt.ArrayLike, cpu: str) -> Stored:
    """Outputs [n, ...] in their stored type, as ``execute`` computes them.

    Args:
        graph: the model.
        source: its C, with the default prefix.
        inputs: stored integers [n, ...].
        cpu: a key of ``MACHINES``.

    Raises:
        UsageError: no such CPU.
        DoesNotFitError: the machine is too small.
        ToolError: QEMU is not installed, the compiler or the program failed, or the model reported
            an error.
    """
    return count_qemu(graph, source, inputs, cpu)[0]


def count_qemu(
    graph: Graph, source: CSource, inputs: npt.ArrayLike, cpu: str
) -> tuple[Stored, tuple[int, ...]]:
    """Outputs, and instructions of each inference, below 8 millions; as for ``run_qemu``."""
    data, ticks = _run(source, stored_inputs(graph, inputs), cpu, None)
    tick = 10**9 / MACHINES[cpu].clock
    counts = tuple(round(int(n) * tick / (1 << _SHIFT)) for n in np.frombuffer(ticks, "<u4"))
    return as_tensor(graph, graph.logits, data), counts


def certify_qemu(
    graph: Graph, source: CSource, inputs: npt.ArrayLike, levels: npt.ArrayLike, cpu: str
) -> Verdicts:
    """What ``cactus_edge_predict_certified`` finds; arguments and errors as for ``run_qemu``."""
    data = stored_inputs(graph, inputs)
    radii = np.broadcast_to(np.asarray(levels, np.int32), len(data))
    return verdicts(graph, _run(source, data, cpu, radii)[0])


def _run(
    source: CSource, data: Stored, cpu: str, radii: npt.NDArray[np.int32] | None
) -> tuple[bytes, bytes]:
    if cpu not in MACHINES:
        known = ", ".join(MACHINES)
        raise UsageError(f"no CPU '{cpu}' under QEMU{meant(cpu, MACHINES)} known: {known}")
    machine = MACHINES[cpu]
    program = shutil.which("qemu-system-arm")
    if program is None:
        raise ToolError("qemu-system-arm is not installed; run: apt-get install qemu-system-arm")
    with tempfile.TemporaryDirectory(prefix="cactus-edge-") as name:
        folder = Path(name)
        elf = build.firmware(
            source.files,
            folder,
            machine.memory,
            main="qemu.c",
            cpu=Cpu(machine.compiler, "", ARM),
        )
        check_fit(read_image(elf), machine.memory, source.layers)
        (folder / "input.bin").write_bytes(data.tobytes())
        if radii is not None:
            (folder / "levels.bin").write_bytes(radii.tobytes())
        command = [program, "-M", machine.name, "-cpu", machine.cpu, "-nographic"]
        command += ["-monitor", "none", "-serial", "none", "-kernel", str(elf)]
        command += ["-icount", f"shift={_SHIFT}"]
        command += ["-semihosting-config", "enable=on,target=native"]
        try:
            result = subprocess.run(
                command, cwd=folder, capture_output=True, check=False, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise ToolError(f"QEMU ({cpu}) did not end within {_SECONDS} seconds") from None
        if result.returncode:
            said = result.stderr.decode(errors="replace").strip()
            raise ToolError(f"QEMU ({cpu}) ended with status {result.returncode}: {said}")
        return (folder / "output.bin").read_bytes(), (folder / "ticks.bin").read_bytes()
