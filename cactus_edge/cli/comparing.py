"""The verb ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cactus_edge import datasets, files, flatbuffer, inputs
from cactus_edge.cli.making import require_training
from cactus_edge.cli.options import a_radius, split_of
from cactus_edge.cli.output import JsonOption, bar, emit, percent, say, share, table, tell
from cactus_edge.errors import DataError, UsageError, about, counted, meant
from cactus_edge.inputs import Perturbation

if TYPE_CHECKING:
    from rich.table import Table

    from cactus_edge.compare import Signals
    from cactus_edge.compare.costs import Costs, Variant
    from cactus_edge.datasets import Dataset
    from cactus_edge.graph import Graph
    from cactus_edge.lowering.stages import FloatArray, Stage


class CompareOutput(msgspec.Struct, frozen=True):
    """What ``compare --json`` prints.

    ``costs`` is null where they were not measured, and ``note`` says why.
    """

    source: str
    model: str
    data: str
    split: str
    signals: msgspec.Raw
    costs: msgspec.Raw
    advice: tuple[str, ...]
    note: str


def compare(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run's directory, its model.safetensors, or a float .onnx file.",
            metavar="RUN|MODEL.onnx",
        ),
    ],
    model: Annotated[
        Path, typer.Argument(help="The .tflite file that was made of it.", metavar="MODEL")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="A data set's name or .npz file; the run's own without it.",
            metavar="NAME",
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="validation (choices belong there), test or train.")
    ] = "validation",
    samples: Annotated[
        int, typer.Option("--samples", "-n", help="How many samples at most.")
    ] = 500,
    eps: Annotated[
        str | None,
        typer.Option("--eps", callback=a_radius, help="Radius to certify; the one of conversion."),
    ] = None,
    with_costs: Annotated[
        bool,
        typer.Option(
            "--costs/--no-costs", help="Of a run: convert it with one layer spared after another."
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Show how much of each layer the integers keep, which layer costs what, and what to change.

    Example: cactus-edge compare runs/mnist mnist.tflite

    Example: cactus-edge compare model.onnx model.tflite --data data.npz
    """
    from cactus_edge.compare import advice

    if samples < 1:
        raise UsageError(f"--samples {samples}: at least one is needed")
    graph, _ = flatbuffer.load(model)
    costs: Costs | None = None
    note = ""
    if source.suffix == ".onnx":
        if data is None:
            raise UsageError(f"{source} does not say what it was trained on; give --data")
        if eps is not None:
            raise UsageError("--eps is for runs, whose layers are spared one after another")
        chosen = split_of(data, split, graph)
        stages, real = _of_onnx(source, chosen, samples)
        note = "costs are measured for runs alone"
        found = _signals(stages, graph, real, chosen, samples)
    else:
        require_training("a comparison")
        from cactus_edge.compare.costs import costs as measured
        from cactus_edge.train import load_model
        from cactus_edge.train.folding import stages as fold

        run = load_model(source)
        fraction = run.recipe.data.validation
        chosen = datasets.load(data or run.recipe.data.name, _split(split), fraction)
        real = _float(chosen, samples)
        found = _signals(fold(run.network.eval(), {}), graph, real, chosen, samples)
        if with_costs:
            radius = run.recipe.objective.reported_epsilon if eps is None else eps
            training = datasets.load(run.recipe.data.name, "train", fraction)
            with bar("compare", "models") as progress:
                try:
                    costs = measured(
                        run, graph, training, chosen, found.samples,
                        Perturbation.epsilon(str(radius)), progress=progress,
                    )  # fmt: skip
                except DataError as error:
                    note = f"{model}: {error}; so what each layer costs was not measured"
    output = CompareOutput(
        source=str(source),
        model=model.name,
        data=chosen.name,
        split=chosen.split,
        signals=msgspec.Raw(msgspec.json.encode(found)),
        costs=msgspec.Raw(msgspec.json.encode(costs)),
        advice=tuple(advice(found, costs)),
        note=note,
    )
    emit(output, as_json, *_tables(output, found, costs))
    if note:
        tell(f"note: {note}")
    for sentence in () if as_json else output.advice:
        say(f"- {sentence}")


def _split(name: str) -> datasets.Split:
    splits: tuple[datasets.Split, ...] = ("validation", "test", "train")
    for split in splits:
        if name == split:
            return split
    raise UsageError(f"no split '{name}'{meant(name, splits)} use test, validation or train")


def _float(data: Dataset, samples: int) -> FloatArray:
    """Float64 [N, C, H, W] or [N, F] in [0, 1]."""
    images = data.images[:samples]
    real = images.astype("float64") / (255 if images.dtype == "uint8" else 1)
    return real.transpose(0, 3, 1, 2) if real.ndim == 4 else real


def _of_onnx(source: Path, data: Dataset, samples: int) -> tuple[list[Stage], FloatArray]:
    from cactus_edge.onnx_io.reading import read
    from cactus_edge.onnx_io.samples import Samples, real
    from cactus_edge.onnx_io.translate import translate

    with about(source):
        translation = translate(read(files.read(source, "ONNX file")))
    given = Samples(data.name, data.images[:samples], data.sha256)
    return list(translation.stages), real(given, translation.shape)


def _signals(
    stages: list[Stage], graph: Graph, real: FloatArray, data: Dataset, samples: int
) -> Signals:
    from cactus_edge.compare import signals

    stored = inputs.stored(graph, data.images[:samples])
    return signals(stages, graph, stored, real, data.labels[:samples].astype("int64"))


def _tables(output: CompareOutput, found: Signals, costs: Costs | None) -> list[Table]:
    rows = [
        (
            layer.name,
            layer.bits or "-",
            percent(layer.sparsity) if layer.bits else "-",
            _decibels(layer.whole),
            _decibels(layer.own),
            _decibels(layer.weights) if layer.bits else "-",
        )
        for layer in found.layers
    ]
    shares = (found.float_correct, found.correct, found.alike)
    floats, integers, alike = (share(count / found.samples) for count in shares)
    title = (
        f"{output.model} beside {output.source}, {output.data} {output.split}, "
        f"{counted(found.samples, 'sample')}: float {floats} % right, integers {integers} %, "
        f"alike {alike} %"
    )
    columns = ("layer", "bits", "zeros %", "signal, dB", "of the layer alone, dB", "weights, dB")
    tables = [table(title, columns, rows)]
    if costs is not None and costs.variants:
        named = [("as deployed", costs.deployed), ("all spared", costs.spared)]
        named += [(f"{v.layer} {v.change}", v) for v in costs.variants]
        number = counted(costs.samples, "sample")
        title = f"radius {costs.epsilon}, {number}, one layer spared at a time"
        columns = ("model", "right %", "certified %", "gain", "file bytes", "non-zero weights")
        lines = [_line(name, v, costs) for name, v in named]
        tables.append(table(title, columns, lines))
    return tables


def _line(name: str, variant: Variant, costs: Costs) -> tuple[str, ...]:
    if variant.problem:
        return name, "-", "-", "-", "-", variant.problem
    return (
        name,
        share(variant.correct / costs.samples),
        share(variant.certified / costs.samples),
        f"{variant.certified - costs.deployed.certified:+d}",
        f"{variant.bytes:,}",
        f"{variant.nonzero:,}",
    )


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(compare)
