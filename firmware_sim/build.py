"""Compilation with ziglang, one pip package that holds clang, a linker and all run-time libraries.

Zig keeps what it compiled in its own cache in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from cactus_edge.errors import MissingExtraError, ToolError
from firmware_sim.boards import CPUS, Board, Cpu

_MESSAGE_LINES = 12
_COMMON = ("-std=c99", "-O2", "-g0", "-Wall", "-Wextra", "-Wpedantic")
_TRAP = ("-fsanitize=undefined", "-fsanitize-trap=undefined")
_PLAIN = ("-fno-sanitize=all",)
TRACE = "-DCACTUS_EDGE_TRACE"
LAYERS = "-DCACTUS_EDGE_LAYERS"


def data_file(name: str) -> str:
    """The text of a file in ``firmware_sim/c``."""
    return (resources.files("firmware_sim") / "c" / name).read_text(encoding="utf-8")


def compile_c(arguments: Sequence[str], folder: Path) -> None:
    """Run the compiler in ``folder``.

    Raises:
        MissingExtraError: ziglang is not installed.
        ToolError: the compiler failed; the message carries the first lines of what it said.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise MissingExtraError("ziglang", "sim", "Compiling firmware")
    command = [sys.executable, "-m", "ziglang", "cc", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        said = "\n".join(result.stderr.strip().splitlines()[:_MESSAGE_LINES])
        raise ToolError(f"the C compiler failed (zig cc {' '.join(arguments)}):\n{said}")


def put(texts: Mapping[str, str], folder: Path) -> list[str]:
    """Write sources into ``folder``; the names of those to compile."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [name for name in texts if name.endswith(".c")]


def shared_library(texts: Mapping[str, str], folder: Path, name: str = "library") -> Path:
    """A shared library for this computer."""
    sources = put(texts, folder)
    output = folder / f"{name}.so"
    compile_c([*_COMMON, *_PLAIN, "-fPIC", "-shared", *sources, "-o", str(output)], folder)
    return output


def host_program(
    texts: Mapping[str, str], folder: Path, *, trace: bool = False, sanitize: bool = False
) -> Path:
    """A program around a model, see ``c/host.c``; ``sanitize`` traps on undefined behaviour."""
    sources = put({**texts, "host.c": data_file("host.c")}, folder)
    output = folder / "host"
    options = [*(_TRAP if sanitize else _PLAIN), *([TRACE] if trace else [])]
    compile_c([*_COMMON, *options, *sources, "-o", str(output)], folder)
    return output


def firmware(
    texts: Mapping[str, str],
    folder: Path,
    board: Board,
    *,
    trace: bool = False,
    by_layer: bool = False,
    main: str = "main.c",
    cpu: Cpu | None = None,
    options: Sequence[str] = (),
) -> Path:
    """An ELF file for ``board``: the model, a program, and what the compiler's library adds.

    ``by_layer`` keeps layers from being inlined. ``main`` is one of the texts, or else a file in
    ``firmware_sim/c``. ``cpu`` is that of the board if None. ``options`` are further ones for the
    compiler.
    """
    core = cpu or CPUS[board.cpu]
    script = Template(data_file("board.ld")).substitute(
        flash_origin=hex(board.flash_origin),
        ram_origin=hex(board.ram_origin),
        stack_top=hex(board.ram_origin + board.ram_bytes),
    )
    program = {} if main in texts else {main: data_file(main)}
    sources = put({**texts, **program, "board.ld": script}, folder)
    output = folder / "firmware.elf"
    arguments = [
        *_COMMON,
        *_PLAIN,
        "-ffreestanding",
        "-ffunction-sections",
        "-fno-unwind-tables",
        "-fno-asynchronous-unwind-tables",
        "-target",
        core.target,
        f"-mcpu={core.compiler}",
        *([TRACE] if trace else []),
        *([LAYERS] if by_layer else []),
        *options,
        *sources,
        "-T",
        "board.ld",
        "-Wl,-e,reset",
        "-Wl,--gc-sections",
        "-o",
        str(output),
    ]
    compile_c(arguments, folder)
    return output
