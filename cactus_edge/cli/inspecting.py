"""The verbs ``analyze``, ``twin``, ``universalize`` and ``supported-ops``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cactus_edge import datasets, files, flatbuffer, manual
from cactus_edge.analyze import analyze as describe
from cactus_edge.cli.output import (
    ForceOption,
    JsonOption,
    bar,
    emit,
    percent,
    say,
    share,
    table,
    working,
)
from cactus_edge.errors import PropertyNotMetError, counted

if TYPE_CHECKING:
    from rich.table import Table

    from cactus_edge.universalize import Universalized


def analyze(
    model: Annotated[Path, typer.Argument(help="A .tflite file.", metavar="MODEL")],
    as_json: JsonOption = False,
) -> None:
    """Show layers, widths, zeros, accumulator headroom and where runtimes would disagree.

    Example: cactus-edge analyze model.tflite
    """
    graph, content = flatbuffer.load(model)
    result = describe(graph, content)
    rows = [
        (
            layer.index,
            layer.kind,
            layer.name,
            "x".join(map(str, layer.output_shape[1:])),
            layer.bits or "-",
            layer.weights or "-",
            percent(layer.sparsity) if layer.weights else "-",
            f"{layer.macs:,}" if layer.macs else "-",
            f"{layer.accumulator:,}" if layer.accumulator else "-",
            layer.disagreeing or "-",
        )
        for layer in result.layers
    ]
    columns = (
        "#",
        "operator",
        "name",
        "output",
        "bits",
        "weights",
        "zeros %",
        "MACs",
        "accumulator <=",
        "disagreeing",
    )
    agreement = "universal" if result.universal else "runtimes disagree"
    title = (
        f"{model.name}: {counted(result.bytes, 'byte')}, {counted(result.macs, 'MAC')}, {agreement}"
    )
    emit(result, as_json, table(title, columns, rows))


def twin(
    model: Annotated[Path, typer.Argument(help="A .tflite file.", metavar="MODEL")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .tflite file to write.")],
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model whose output are certified bounds of the model's logits, on any runtime.

    Example: cactus-edge twin model.tflite -o twin.tflite
    """
    from cactus_edge.certify.twin_model import make_twin

    with working("twin"):
        report = make_twin(model, output, force=force)
    rows = [(name, "yes") for name in report.profiles]
    rows += [(name, f"no: {reason}") for name, reason in report.others.items()]
    agreement = "the same bounds on every runtime" if report.universal else "bounds by profile"
    shapes = " -> ".join(
        "x".join(map(str, shape)) for shape in (report.input_shape, report.output_shape)
    )
    title = f"{output}: {report.bytes:,} bytes, {shapes}, {agreement}"
    emit(report, as_json, table(title, ("profile", "bounds are those of certify"), rows))


def universalize(
    model: Annotated[Path, typer.Argument(help="A .tflite file.", metavar="MODEL")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .tflite file to write.")],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="NAME", help="Compare both models on its test samples."),
    ] = None,
    even_pools: Annotated[
        bool,
        typer.Option("--even-pools", help="Averages over even windows, too: for ONNX Runtime."),
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Move a model's scales to where all runtimes agree, and say what that costs.

    Example: cactus-edge universalize theirs.tflite --data images.npz -o universal.tflite
    """
    from cactus_edge.universalize import make_universal

    samples = None if data is None else datasets.load(data, "test")
    with bar("universalize", "operators") as progress:
        report = make_universal(
            model, output, samples, even_pools=even_pools, force=force, progress=progress
        )
    title = f"{output}: {report.bytes:,} bytes, {'' if report.universal else 'NOT '}universal"
    if report.samples:
        counts = report.correct_before, report.correct_after
        before, after = (count / report.samples for count in counts)
        title += (
            f"; accuracy {share(before)} % before, {share(after)} % after, "
            f"{report.decisions_changed} of {counted(report.samples, 'decision')} changed"
        )
    if report.layers or as_json:
        emit(report, as_json, _moved(title, report))
    else:
        say(f"{title}; every operator was already, nothing moved")
    if not report.universal:
        names = ", ".join(layer.name for layer in report.layers if layer.remaining)
        raise PropertyNotMetError(f"{output}: profiles still disagree in {names}")


def _moved(title: str, report: Universalized) -> Table:
    """What moved; what each operator costs alone where samples were given."""
    columns = [
        "layer",
        "operator",
        "moved",
        "scale %",
        "up to %",
        "weights %",
        "added",
        "differing",
    ]
    columns += ["points lost", "decisions"] if report.samples else []
    rows: list[list[object]] = []
    for layer in report.layers:
        row: list[object] = [
            layer.name.split(";")[0],  # of the operators that a converter fused, the last
            layer.kind,
            f"{layer.moved}/{layer.channels}",
            f"{100 * layer.median_change:.2f}",
            f"{100 * layer.largest_change:.2f}",
            f"{100 * layer.weights_changed:.1f}",
            layer.added or "-",
            layer.remaining or "-",
        ]
        if alone := layer.samples_alone:
            row += [f"{100 * layer.lost_alone / alone:.2f}", layer.decisions_changed_alone]
        rows.append(row + ["-"] * (len(columns) - len(row)))
    return table(title, columns, rows)


def supported_ops(
    write: Annotated[
        Path | None, typer.Option("--write", help="Write the manual as Markdown instead.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the operators, and what each must satisfy.

    Example: cactus-edge supported-ops

    Example: cactus-edge supported-ops --write operators.md
    """
    if write is not None:
        # An earlier version of the manual is nothing to lose.
        known = write.is_file() and write.read_bytes().startswith(manual.TITLE.encode())
        files.write(write, manual.markdown().encode(), force=force or known)
        return
    operators = manual.supported()
    rows = [
        (kind, "\n".join([summary, *(f"- {rule}" for rule in rules)]).replace("``", "`"))
        for kind, (summary, rules) in operators.items()
    ]
    emit(operators, as_json, table("Supported operators", ("operator", "rules"), rows))


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(analyze)
    app.command()(twin)
    app.command()(universalize)
    app.command()(supported_ops)
