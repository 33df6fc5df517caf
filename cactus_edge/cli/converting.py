"""The verb ``convert``: trained runs and float ONNX files to ``.tflite``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cactus_edge import files
from cactus_edge.cli.making import require_training
from cactus_edge.cli.output import (
    ForceOption,
    JsonOption,
    bar,
    emit,
    percent,
    share,
    table,
    tell,
    working,
)
from cactus_edge.errors import UsageError, about

if TYPE_CHECKING:
    from cactus_edge.lowering.weighted import LayerReport

_COLUMNS = ("layer", "bits", "zeros %", "universal", "median scale change %", "largest %")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run's directory, its model.safetensors, or a float .onnx file.",
            metavar="RUN|MODEL.onnx",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .tflite file to write.")],
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits", help="Width of the weights: 8, 4, 3 or 2; the member's, or 8, without it."
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", help="Of a run: fraction of weights to prune, by magnitude."),
    ] = None,
    member: Annotated[
        str | None,
        typer.Option(
            "--member",
            metavar="NUMBER|TABLE",
            help="Of a run: compress as this member of the recipe does, counted from 1, or as one "
            "written out: '{ kind = \"structured\", sparsity = 0.5 }'.",
        ),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option("--eps", help="Radius for calibration; without it the recipe's, or 0."),
    ] = None,
    clipping: Annotated[
        str | None,
        typer.Option(
            "--clipping",
            help="Clip weights where their rounding errs least (mse), or not at all (none); the "
            "recipe's choice without it, or mse below 8 bits.",
        ),
    ] = None,
    universal: Annotated[
        bool | None,
        typer.Option(
            "--universal/--plain",
            help="Choose scales on which all runtimes agree, the default.",
        ),
    ] = None,
    wide_layer: Annotated[
        list[str] | None,
        typer.Option("--wide-layer", help="Of a run: a layer to keep at 8 bits; repeatable."),
    ] = None,
    whole_layer: Annotated[
        list[str] | None,
        typer.Option("--whole-layer", help="Of a run: a layer not to prune; repeatable."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="NAME|FILE.npz",
            help="Of an .onnx file: samples, a data set or an .npz with x or x_train.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="Of an .onnx file: how many; 512.")
    ] = None,
    ranges: Annotated[
        str | None,
        typer.Option(
            "--ranges", help="Of an .onnx file: minmax, percentile (0.9999, the default) or mse."
        ),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option("--percentile", help="Of an .onnx file: see --ranges.")
    ] = None,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="Of an .onnx file: one scale for each layer.")
    ] = False,
    equalize: Annotated[
        bool, typer.Option("--equalize", help="Of an .onnx file: cross-layer equalization.")
    ] = False,
    keep_biases: Annotated[
        bool, typer.Option("--keep-biases", help="Of an .onnx file: no bias correction.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune, quantize and write a .tflite file that stock runtimes load.

    Example: cactus-edge convert runs/mnist-quick --bits 8 --sparsity 0.5 -o model.tflite

    Example: cactus-edge convert model.onnx --calibration data.npz --bits 8 -o model.tflite

    Example: cactus-edge convert quantized.onnx -o model.tflite
    """
    files.refuse_existing(output, force)
    of_onnx = {
        "--calibration": calibration,
        "--samples": samples,
        "--ranges": ranges,
        "--percentile": percentile,
        "--per-tensor": per_tensor or None,
        "--equalize": equalize or None,
        "--keep-biases": keep_biases or None,
    }
    if source.suffix != ".onnx":
        _refuse(of_onnx, source, ".onnx files")
        spared = (wide_layer or [], whole_layer or [])
        _convert_run(
            source, output, bits, sparsity or 0.0, member, eps, universal is not False, clipping,
            spared, force, as_json,
        )  # fmt: skip
        return
    of_runs = {"--sparsity": sparsity, "--member": member}
    of_runs |= {"--wide-layer": wide_layer or None, "--whole-layer": whole_layer or None}
    _refuse(of_runs, source, "runs")
    if calibration is None:
        given = {**of_onnx, "--bits": bits, "--eps": eps, "--clipping": clipping}
        given["--universal" if universal else "--plain"] = universal
        _convert_quantized(source, output, given, force, as_json)
        return
    if clipping not in (None, "mse", "none"):
        raise UsageError(f"--clipping {clipping}: known are mse and none")
    from cactus_edge.lowering.calibration import Calibration, method_of
    from cactus_edge.onnx_io import convert as onnx_convert

    default = Calibration()
    chosen = Calibration(
        method_of(ranges or default.method),
        default.percentile if percentile is None else percentile,
        eps or 0.0,
    )
    settings = onnx_convert.Settings(
        bits=8 if bits is None else bits,
        calibration=chosen,
        samples=onnx_convert.Settings.samples if samples is None else samples,
        universal=universal is not False,
        per_tensor=per_tensor,
        equalize=equalize,
        correct_bias=not keep_biases,
        clip_weights=None if clipping is None else clipping == "mse",
    )
    with working("convert"), about(source):
        report = onnx_convert.convert(source, output, calibration, settings, force=force)
    for note in () if as_json else report.notes:
        tell(f"note: {note}")
    title = (
        f"{_title(output, report.bytes, report.universal)}; decides as the float network on "
        f"{share(report.same_decisions)} % of the samples that were compared"
    )
    emit(report, as_json, table(title, _COLUMNS, _rows(report.layers)))


def _convert_quantized(
    source: Path, output: Path, given: Mapping[str, object], force: bool, as_json: bool
) -> None:
    """An .onnx file without calibration samples: a QDQ model, whose integers are kept."""
    from cactus_edge.onnx_io import convert_quantized
    from cactus_edge.onnx_io.quantized import is_quantized
    from cactus_edge.onnx_io.reading import read

    with about(source):
        quantized = is_quantized(read(files.read(source, "ONNX file")))
    if not quantized:
        raise UsageError(
            f"{source} holds floats: give --calibration, a data set's name or an .npz with "
            "samples as x"
        )
    _refuse(given, source, "float networks")
    with working("convert"), about(source):
        report = convert_quantized.convert(source, output, force=force)
    title = _title(output, report.bytes, report.universal)
    row = (report.runtime, report.profile, report.elements, 0)
    emit(report, as_json, table(title, ("ONNX Runtime", "profile", "logits", "differ"), [row]))


def _refuse(options: Mapping[str, object], source: Path, owner: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} is for {owner}, which {source} is not")


def _convert_run(
    checkpoint: Path,
    output: Path,
    bits: int | None,
    sparsity: float,
    member: str | None,
    eps: float | None,
    universal: bool,
    clipping: str | None,
    spared: tuple[list[str], list[str]],
    force: bool,
    as_json: bool,
) -> None:
    require_training("conversion")
    from cactus_edge.train import lower

    with bar("convert", "steps") as progress:
        report = lower.convert(
            checkpoint,
            output,
            bits=bits,
            sparsity=sparsity,
            member=member,
            epsilon=eps,
            universal=universal,
            clipping=clipping,
            wide=spared[0],
            whole=spared[1],
            force=force,
            progress=progress,
        )
    title = _title(output, report.bytes, report.universal)
    emit(report, as_json, table(title, _COLUMNS, _rows(report.layers)))


def _title(output: Path, size: int, universal: bool) -> str:
    agreement = "universal" if universal else "NOT universal: certificates will be conjunctions"
    return f"{output}: {size:,} bytes, {agreement}"


def _rows(layers: Sequence[LayerReport]) -> list[tuple[object, ...]]:
    return [
        (
            layer.name,
            layer.bits,
            percent(layer.sparsity),
            f"{layer.snapped}/{layer.channels}",
            f"{100 * layer.median_change:.3f}",
            f"{100 * layer.largest_change:.3f}",
        )
        for layer in layers
    ]


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(convert)
