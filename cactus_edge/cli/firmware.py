"""The verb ``export-c``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cactus_edge import flatbuffer, profiles
from cactus_edge.cli.options import ModelArgument
from cactus_edge.cli.output import ForceOption, JsonOption, emit, table, working
from cactus_edge.csource import CLayer, Layout, generate
from cactus_edge.errors import counted


class ExportOutput(msgspec.Struct, frozen=True):
    """What ``export-c --json`` prints; ``flash_bytes`` and ``ram_bytes`` only with a board."""

    folder: str
    files: tuple[str, ...]
    prefix: str
    profile: str
    certified: bool
    crc32: str
    table_bytes: int
    arena_bytes: int
    arena_lower_bound: int
    layers: tuple[CLayer, ...]
    board: str | None = None
    flash_bytes: int | None = None
    ram_bytes: int | None = None


def export_c(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the library.")],
    prefix: Annotated[
        str, typer.Option("--prefix", help="Of files, functions and, in capitals, macros.")
    ] = "cactus_edge",
    profile: Annotated[
        str, typer.Option("--profile", help="Rounding profile of the C code.")
    ] = profiles.DEFAULT,
    layout: Annotated[
        Layout, typer.Option("--layout", help="Of all weights; auto takes the smallest.")
    ] = Layout.AUTO,
    certified: Annotated[
        bool,
        typer.Option("--certified", help="Add a function that proves its label, on the device."),
    ] = False,
    serial: Annotated[
        bool,
        typer.Option("--console", help="Add a console for a serial line, for validate --device."),
    ] = False,
    board: Annotated[
        str | None, typer.Option("--board", help="Compile for it and refuse what does not fit.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the model as a C99 library for microcontrollers.

    Example: cactus-edge export-c model.tflite -o firmware --prefix wake_word
    """
    graph, _ = flatbuffer.load(model)
    flash = ram = None
    with working("export"):
        source = generate(
            graph, profile, layout=layout, prefix=prefix, certified=certified, serial=serial
        )
        if board is not None:
            from firmware_sim import fit

            plain = generate(graph, profile, layout=layout, certified=certified, serial=serial)
            image = fit(plain, board)
            flash, ram = image.flash_bytes, image.static_bytes
    source.write(output, force=force)
    shown = ExportOutput(
        str(output),
        tuple(sorted((*source.files, *source.surroundings))),
        prefix,
        profile,
        certified,
        f"{source.crc32:08x}",
        source.table_bytes,
        source.arena_bytes,
        source.arena_lower_bound,
        source.layers,
        board,
        flash,
        ram,
    )
    rows = [
        (n.index, n.kind, n.name, n.layout or "-", n.weight_bytes, n.table_bytes, n.live_bytes)
        for n in source.layers
    ]
    columns = ("", "operator", "name", "layout", "weights", "all constants", "alive in arena")
    fits = f"; on {board} {flash:,} bytes of flash and {ram:,} of RAM" if board else ""
    title = (
        f"{output}: {counted(source.table_bytes, 'byte')} of constants, CRC {source.crc32:08x}; "
        f"arena {counted(source.arena_bytes, 'byte')}, of which {source.arena_lower_bound:,} are "
        f"alive at once{fits}"
    )
    emit(shown, as_json, table(title, columns, rows))


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command("export-c")(export_c)
