"""The verb ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cactus_edge import files
from cactus_edge.cli.options import split_of
from cactus_edge.cli.output import ForceOption, JsonOption, bar, emit, table, tell
from cactus_edge.errors import DataError, UsageError

if TYPE_CHECKING:
    from cactus_edge.report import Explorer, Sources, Widths

_MOST_SAMPLES = 1000


class ReportOutput(msgspec.Struct, frozen=True):
    """What ``report --json`` prints.

    ``page`` is missing, and ``bytes`` 0, where ``--card`` or ``--bom`` alone were asked for.
    ``explored`` counts the samples of the explorer, ``radii`` those of its slider; ``notes`` say
    what is missing on the page, and why.
    """

    page: str | None
    bytes: int
    certificates: tuple[str, ...]
    results: dict[str, int]
    explored: int
    radii: tuple[str, ...]
    notes: tuple[str, ...]
    card: str | None = None
    bom: str | None = None


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Certificates, their model, and results of sweep -o, search, bench --json and "
            "validate --json; or folders that hold them.",
            metavar="FILE|FOLDER",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The .html file to write.")
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option("--card", help="A model card to write: Markdown as the Hugging Face Hub has."),
    ] = None,
    bom: Annotated[
        Path | None,
        typer.Option("--bom", help="A bill of materials to write: CycloneDX 1.6, as JSON."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="The certified data set's name or .npz file; the name that the certificate has, "
            "without it.",
            metavar="NAME",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", help="How many samples the explorer shows at most.")
    ] = 100,
    title: Annotated[str | None, typer.Option("--title", help="Heading of the page.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page: verdicts, curves, layers, runtimes and an explorer.

    A model card and a bill of materials are written beside it, or without it.

    Example: cactus-edge report certificate.jsonl model.tflite -o report.html

    Example: cactus-edge report searches/digits --data digits -o report.html

    Example: cactus-edge report certificate.jsonl model.tflite --card README.md --bom bom.json
    """
    from cactus_edge import report as reporting

    outputs = [path for path in (output, card, bom) if path is not None]
    if not outputs:
        raise UsageError("nothing to write: give -o PAGE.html, --card FILE.md or --bom FILE.json")
    for path in outputs:
        files.refuse_existing(path, force)
    if not 0 <= samples <= _MOST_SAMPLES:
        raise UsageError(f"--samples {samples}: the explorer holds from 0 to {_MOST_SAMPLES}")
    read = reporting.read(sources, samples)
    for path in (*(claim.path for claim in read.claims), *(model.path for model in read.models)):
        if path.resolve() in {output.resolve() for output in outputs}:
            raise UsageError(f"{path} is read by this command; give what it writes another name")
    notes: list[str] = []
    explorer = None
    made: list[tuple[Path, bytes]] = []
    if output is not None:
        explorer, widths = _measured(read, data, samples, notes)
        heading = title or f"Report on {read.main.head.models[0].file}"
        page = reporting.Page(heading, read, explorer, widths, tuple(notes))
        made.append((output, reporting.render(page)))
    if card is not None:
        if not read.models:
            notes.append(f"no layers in the card: the model was not given ({_names(read)})")
        made.append((card, reporting.card(read)))
    if bom is not None:
        made.append((bom, reporting.bill_of_materials(read)))
    for path, content in made:
        files.write(path, content, force=force)
    shown = ReportOutput(
        page=None if output is None else str(output),
        bytes=0 if output is None else len(made[0][1]),
        certificates=tuple(str(claim.path) for claim in read.claims),
        results={
            "sweep": len(read.curves),
            "search": len(read.searches),
            "bench": len(read.benches),
            "validate": len(read.validations),
        },
        explored=0 if explorer is None else len(explorer.samples),
        radii=() if explorer is None else tuple(step.exact for step in explorer.radii),
        notes=tuple(notes),
        card=None if card is None else str(card),
        bom=None if bom is None else str(bom),
    )
    for note in notes:
        tell(f"note: {note}")
    rows: list[tuple[str, object]] = [("certificates", len(shown.certificates))]
    rows += shown.results.items()
    if output is not None:
        rows += [
            ("samples to explore", shown.explored),
            ("radii", ", ".join(shown.radii) or "-"),
            ("bytes", shown.bytes),
        ]
    emit(shown, as_json, table(", ".join(map(str, outputs)), ("", "value"), rows))


def _names(read: Sources) -> str:
    """The models that the certificate is about."""
    return ", ".join(model.file for model in read.main.head.models)


def _measured(
    read: Sources, data: str | None, samples: int, notes: list[str]
) -> tuple[Explorer | None, Widths | None]:
    """What needs model and data; a note says why where either is missing."""
    from cactus_edge import report as reporting

    claim = read.main
    about = claim.head.data
    if about is None:
        notes.append("no explorer: the certificate is about a query, not about samples")
        return None, None
    if not read.models:
        notes.append(f"no explorer and no layers: the model was not given ({_names(read)})")
        return None, None
    if not claim.samples:
        notes.append("no explorer and no layers: no sample was asked for")
        return None, None
    try:
        dataset = split_of(data or about.name, about.split, read.models[0].graph)
    except DataError as error:
        if data is not None:
            raise
        notes.append(f"no explorer and no layers: {error}; give --data")
        return None, None
    explored = reporting.opened(claim, read.models, dataset, samples)
    widths = None
    if claim.head.property.patch:
        notes.append("no layers: a patch is a union of boxes, whose widths differ")
    with bar("report", "parts") as progress:
        explorer = reporting.explore(claim, explored, progress=progress)
        if not claim.head.property.patch:
            widths = reporting.widths(explored, progress=progress)
    return explorer, widths


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(report)
