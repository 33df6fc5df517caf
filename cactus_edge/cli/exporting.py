"""The verb ``export-onnx``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from cactus_edge import files, flatbuffer, inputs
from cactus_edge.cli.options import EpsilonOption, ModelArgument, SplitOption, split_of
from cactus_edge.cli.output import ForceOption, JsonOption, emit, table, working
from cactus_edge.errors import UsageError, counted
from cactus_edge.graph import Int64Array
from cactus_edge.inputs import Perturbation


def export_onnx(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .onnx file to write.")],
    real: Annotated[
        bool,
        typer.Option("--float", help="The dequantized float network instead of the integers."),
    ] = False,
    unsigned: Annotated[
        bool,
        typer.Option("--uint8", help="Activations as uint8: faster, exact on CPUs with VNNI."),
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", help="A data set or .npz, to compare on, or for --eps.")
    ] = None,
    split: SplitOption = "test",
    samples: Annotated[int, typer.Option("--samples", "-n", help="How many to compare.")] = 100,
    index: Annotated[
        int | None, typer.Option("--index", help="With --float: the sample of the query; 0.")
    ] = None,
    eps: EpsilonOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model as ONNX: its integers in QDQ form, or its dequantized network with a query.

    Example: cactus-edge export-onnx model.tflite --data digits -o model.onnx

    Example: cactus-edge export-onnx model.tflite --float --data digits --eps 0.05 -o model.onnx
    """
    from cactus_edge.onnx_io import export

    files.refuse_existing(output, force)
    if samples < 0:
        raise UsageError(f"--samples {samples}: give 0 or more")
    graph, _ = flatbuffer.load(model)
    if not real:
        if eps is not None or index is not None:
            raise UsageError("--eps and --index belong to the query of --float")
        content = export.to_qdq(graph, signed=not unsigned)
        stored = np.zeros((0, *graph.tensors[graph.core_input].shape[1:]), np.int64)
        if data is not None:
            images = split_of(data, split, graph).images[:samples]
            stored: Int64Array = inputs.stored(graph, images)
        with working("compare with ONNX Runtime"):
            report = export.compare(graph, content, stored, signed=not unsigned)
        files.write(output, content, force=force)
        rows = [(name, count, report.elements) for name, count in report.differences.items()]
        title = (
            f"{output}: {len(content):,} bytes; in ONNX Runtime {report.runtime} as it is set up, "
            f"decisions differ on {report.decisions_differ} of "
            f"{counted(report.samples, 'sample')}, "
            f"logits by {report.largest} at most"
        )
        emit(report, as_json, table(title, ("profile", "differ", "of"), rows))
        return
    if unsigned:
        raise UsageError("--uint8 is about integers; the network of --float has none")
    if (eps is None) != (data is None):
        raise UsageError("a query needs both --data and --eps")
    content = export.to_real(graph)
    written = [(str(output), len(content))]
    query_path = output.with_suffix(".vnnlib")
    text = ""
    if data is not None and eps is not None:
        if query_path == output:
            raise UsageError(f"{output} would be the query's name; give -o one that ends in .onnx")
        files.refuse_existing(query_path, force)
        index = 0 if index is None else index
        chosen = split_of(data, split, graph)
        if not 0 <= index < len(chosen.labels):
            raise UsageError(
                f"--index {index}: the split has {counted(len(chosen.labels), 'sample')}"
            )
        remark = f"{chosen.name}, {split} sample {index}, radius {eps}, for {output.name}"
        label = int(chosen.labels[index])
        perturbation = Perturbation.epsilon(eps)
        text = export.query(graph, chosen.images[index], label, perturbation, remark)
        written.append((str(query_path), len(text)))
    files.write(output, content, force=force)
    if text:
        files.write(query_path, text.encode(), force=force)
    emit(dict(written), as_json, table("written", ("file", "bytes"), written))


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command("export-onnx")(export_onnx)
