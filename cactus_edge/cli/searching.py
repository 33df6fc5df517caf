"""The verb ``search``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cactus_edge import files
from cactus_edge.cli.making import require_training
from cactus_edge.cli.options import a_radius
from cactus_edge.cli.output import (
    DataOption,
    ForceOption,
    JsonOption,
    bar,
    emit,
    say,
    share,
    table,
    tell,
)
from cactus_edge.errors import PropertyNotMetError, UsageError, counted

if TYPE_CHECKING:
    from cactus_edge.search import Report
    from cactus_edge.search.budget import Near
    from cactus_edge.search.report import Row

_INTERRUPTED = 130  # as shells have it
_UNITS = {
    "--max-size": "KiB",
    "--max-latency": "us",
    "--max-instructions": "instructions",
    "--min-certified": "%",
}


def search(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Directories of one or more training runs.", metavar="RUN"),
    ],
    data: DataOption,
    eps: Annotated[
        str,
        typer.Option(
            "--eps",
            callback=a_radius,
            help="Radius on real inputs in [0, 1], such as 0.1 or 8/255.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="A directory for all results.")],
    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity",
            metavar="LIST",
            help="Fractions to prune by magnitude, such as 0,0.5,0.9. Without it and --member: "
            "0,0.5,0.9,0.95 and the recipe's members.",
        ),
    ] = None,
    bits: Annotated[
        str, typer.Option("--bits", metavar="LIST", help="Widths of the weights.")
    ] = "8,4,3,2",
    member: Annotated[
        list[str] | None,
        typer.Option(
            "--member",
            metavar="NUMBER|TABLE",
            help="A member as for convert, at its own width or at those of --bits; repeatable.",
        ),
    ] = None,
    max_size: Annotated[
        float | None,
        typer.Option("--max-size", help="KiB of the file; of flash on a microcontroller."),
    ] = None,
    max_latency: Annotated[
        float | None,
        typer.Option("--max-latency", help="Microseconds of one image, on this machine."),
    ] = None,
    max_instructions: Annotated[
        float | None,
        typer.Option("--max-instructions", help="Of one inference, on a microcontroller."),
    ] = None,
    min_certified: Annotated[
        float | None,
        typer.Option(
            "--min-certified",
            help="Percent of the validation samples; the cheapest model that has it is chosen.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="What costs are those of: host, a CPU such as cortex-m4, or a board."
        ),
    ] = "host",
    samples: Annotated[
        int | None,
        typer.Option("--samples", "-n", help="How many validation samples; all without it."),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the Pareto front of deployed models over sparsities, widths and members; choose one.

    Choices are made on the validation split. A search that was stopped goes on where it was.
    Example: cactus-edge search runs/mnist --data mnist --eps 0.1 --max-size 100 -o searches/mnist
    """
    require_training("a search")
    from cactus_edge.search import Limits, Request, Space
    from cactus_edge.search import search as run

    files.refuse_existing(output / "search.json", force)
    request = Request(
        runs=tuple(runs),
        data=data,
        epsilon=eps,
        space=Space(
            tuple(int(number) for number in _numbers("--bits", bits, int)),
            None if sparsity is None else tuple(_numbers("--sparsity", sparsity, float)),
            None if member is None else tuple(member),
        ),
        limits=Limits(max_size, max_latency, max_instructions, min_certified),
        device=device,
        samples=samples,
    )
    try:
        with bar("search") as progress:
            found = run(request, output, force=force, progress=progress, say=tell)
    except KeyboardInterrupt:
        text = f"stopped; what is done is in {output}, and the same command goes on from there"
        tell(text)
        raise typer.Exit(_INTERRUPTED) from None
    _show(found, as_json)
    if found.chosen is None:
        raise PropertyNotMetError(_shortfall(found))
    if not as_json:
        test = found.chosen
        say(
            f"chosen: {test.name}\n"
            f"test split, {counted(test.data.samples, 'sample')}: standard "
            f"{share(test.standard_accuracy)} %, certified {share(test.certified_accuracy)} %\n"
            + "\n".join(str(output / name) for name in (test.file, test.certificate, "front.svg"))
        )


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[int] | list[float]:
    """The numbers of a list such as ``8,4``."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "8,4,2" if kind is int else "0,0.5,0.9"
        raise UsageError(f"{option} {text}: give numbers with commas, such as {example}") from None


def _show(found: Report, as_json: bool) -> None:
    """The table, best certified first."""
    host = found.device.name == "host"
    chosen = found.chosen.name if found.chosen else ""
    rows = [
        (
            row.name,
            f"{row.model.file_bytes:,}",
            f"{row.model.nonzero:,}",
            *_costs(row),
            share(row.standard_accuracy),
            share(row.certified_accuracy),
            "chosen" if row.name == chosen else "front" if row.front else "",
        )
        for row in sorted(found.rows, key=lambda row: (-row.certified_accuracy, row.size))
    ]
    costs = ("packed bytes", "us") if host else ("flash", "RAM", "instructions")
    columns = ("model", "file bytes", "non-zero", *costs, "standard %", "certified %", "")
    title = (
        f"{found.data.name} {found.data.split}, {counted(found.data.samples, 'sample')}, radius "
        f"{found.epsilon}, {found.device.processor}; {found.verifier}"
    )
    emit(found, as_json, table(title, columns, rows))
    problems = {row.name: row.model.problem for row in found.rows if row.model.problem}
    for name, problem in {**problems, **found.failed}.items():
        tell(f"{name}: {problem}")


def _costs(row: Row) -> tuple[str, ...]:
    firmware = row.model.firmware
    if row.latency is not None:
        return f"{row.latency.packed_bytes:,}", f"{row.latency.median:.1f}"
    if firmware is None:
        return "-", "-", "-"
    return f"{firmware.flash_bytes:,}", f"{firmware.ram_bytes:,}", f"{firmware.instructions:,}"


def _shortfall(found: Report) -> str:
    """Why nothing was chosen, what comes closest, and what would have to give."""
    if not found.nearest:
        return f"no candidate fits {found.device.name} ({found.device.processor})"
    near = "; ".join(_near(entry) for entry in found.nearest)
    needed = [
        f"{option} {_rounded(option, value)}"
        for option, value in found.needed.items()
        if value is not None
    ]
    gives = f"; with all other limits kept, {' or '.join(needed)} would do" if needed else ""
    return f"no candidate keeps the limits; nearest: {near}{gives}"


def _near(near: Near) -> str:
    misses = " and ".join(
        f"{_directed(miss.option, miss.value):,.2f} {_UNITS[miss.option]} for {miss.option} "
        f"{miss.limit:g}"
        for miss in near.misses
    )
    return f"{near.name} has {misses}"


def _rounded(option: str, value: float) -> str:
    """A value that would do as the option's."""
    return f"{_directed(option, value):.10g}"


def _directed(option: str, value: float) -> float:
    """In hundredths: up for what may be at most the option's value, else down."""
    hundredths = 100 * value
    whole = int(hundredths) if option == "--min-certified" else -int(-hundredths // 1)
    return whole / 100


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(search)
