"""The verbs ``train`` and ``convert``."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cactus_edge import files
from cactus_edge.cli.output import ForceOption, JsonOption, console, emit, percent, table
from cactus_edge.errors import MissingExtraError

if TYPE_CHECKING:
    from cactus_edge.train import EpochRow, StepReport
    from cactus_edge.train.cost import Cost

_SHOWN_FRACTION = 0.05
_MIB = 2**20


class _Bar:
    """Shows a training run: epoch, loss, throughput, remaining time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("train", total=None, text="")
        self._fraction, self._shown = 0.0, 0.0

    def step(self, report: StepReport) -> None:
        left = int(report.seconds_left)
        text = (
            f"epoch {report.epoch}  loss {report.loss:.3f}  "
            f"{report.samples_per_second:,.0f} samples/s  {left // 60}:{left % 60:02d} left"
        )
        self._fraction = report.step / max(report.total_steps, 1)
        self._progress.update(
            self._task, total=report.total_steps, completed=report.step, text=text
        )

    def epoch(self, row: EpochRow) -> None:
        # history.csv has every epoch; the terminal shows about twenty of them.
        if self._fraction - self._shown < _SHOWN_FRACTION and self._fraction < 1:
            return
        self._shown = self._fraction
        self._progress.console.print(
            f"epoch {row.epoch:3d}  epsilon {row.epsilon:.4f}  loss {row.loss:.4f}  "
            f"validation: standard {percent(row.validation_standard)} %, "
            f"certified {percent(row.validation_certified)} % (interval, float)",
            highlight=False,
        )


@contextmanager
def training_bar() -> Generator[_Bar]:
    """A progress display for ``cactus_edge.train.train``."""
    columns = (TextColumn("train"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield _Bar(progress)


def require_training(purpose: str) -> None:
    """Raise MissingExtraError when torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch", "train", purpose)


def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe.", metavar="RECIPE")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from a checkpoint.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    devices: Annotated[
        int,
        typer.Option("--devices", help="Processes, or GPUs, that share every batch."),
    ] = 1,
    precision: Annotated[
        str,
        typer.Option("--precision", help="Of training steps: 32-true or bf16-mixed."),
    ] = "32-true",
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write logs for TensorBoard as well.")
    ] = False,
    checkpoint_every: Annotated[
        float,
        typer.Option(
            "--checkpoint-every",
            metavar="SECONDS",
            help="Time between checkpoints within an epoch; one is written after every epoch.",
        ),
    ] = 600.0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train with the CACTUS objective, as one recipe says.

    Example: cactus-edge train recipes/mnist-quick.toml --output runs/mnist-quick
    """
    require_training("training")
    from cactus_edge.train import load_recipe
    from cactus_edge.train import train as run

    wanted = load_recipe(recipe)
    try:
        with training_bar() as progress:
            summary = run(
                wanted,
                output,
                resume=resume,
                force=force,
                progress=progress,
                device=device,
                devices=devices,
                precision=precision,
                tensorboard=tensorboard,
                checkpoint_seconds=checkpoint_every,
            )
    except KeyboardInterrupt:
        same = f" --devices {devices}" if devices > 1 else ""
        same += "" if precision == "32-true" else f" --precision {precision}"
        console.print(
            f"interrupted; go on with: cactus-edge train {recipe} -o {output} --resume{same}",
            highlight=False,
        )
        raise typer.Exit(130) from None
    rows = [
        (
            member.member,
            percent(member.validation.standard),
            percent(member.validation.certified),
            percent(member.test.standard),
            percent(member.test.certified),
            f"{member.microseconds_per_sample:.1f}" if member.microseconds_per_sample else "-",
        )
        for member in summary.members
    ]
    title = (
        f"{summary.output}: {summary.parameters:,} parameters, {summary.seconds:.0f} s; certified "
        f"at epsilon {summary.epsilon:g} by {summary.domain} bounds ({summary.verifier})"
        f"{_cost(summary.cost)}"
    )
    columns = ("member", "val std %", "val cert %", "test std %", "test cert %", "us/sample")
    emit(summary, as_json, table(title, columns, rows))


def _cost(cost: Cost | None) -> str:
    """What training took, as the end of a sentence."""
    if cost is None:
        return ""
    gpu = f" + {cost.gpu_memory_bytes / _MIB:,.0f} MiB of GPU" if cost.gpu_memory_bytes else ""
    processes = f" in each of {cost.devices} processes" if cost.devices > 1 else ""
    return (
        f"; training: {cost.seconds_per_epoch:.1f} s per epoch, {cost.samples_per_second:,.0f} "
        f"samples/s, {cost.microseconds_per_network:.1f} us per sample and network "
        f"({cost.networks_per_step:.3g} per step), {cost.memory_bytes / _MIB:,.0f} MiB{gpu}"
        f"{processes}, {cost.precision}"
    )


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run's directory or its model.safetensors.", metavar="RUN")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .tflite file to write.")],
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits", help="Width of the weights: 8, 4, 3 or 2; the member's, or 8, without it."
        ),
    ] = None,
    sparsity: Annotated[
        float, typer.Option("--sparsity", help="Fraction of weights to prune, by magnitude.")
    ] = 0.0,
    member: Annotated[
        str | None,
        typer.Option(
            "--member",
            metavar="NUMBER|TABLE",
            help="Compress as this member of the recipe does, counted from 1, or as one written "
            "out: '{ kind = \"structured\", sparsity = 0.5 }'.",
        ),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option("--eps", help="Radius for calibration; the recipe's without it."),
    ] = None,
    clipping: Annotated[
        str | None,
        typer.Option(
            "--clipping",
            help="Clip weights where their rounding errs least (mse), or not at all; the recipe's "
            "choice without it.",
        ),
    ] = None,
    universal: Annotated[
        bool,
        typer.Option("--universal/--plain", help="Choose scales on which all runtimes agree."),
    ] = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune, quantize and write a .tflite file that stock runtimes load.

    Example: cactus-edge convert runs/mnist-quick --bits 8 --sparsity 0.5 -o model.tflite
    """
    require_training("conversion")
    from cactus_edge.train import lower

    files.refuse_existing(output, force)
    report = lower.convert(
        checkpoint,
        output,
        bits=bits,
        sparsity=sparsity,
        member=member,
        epsilon=eps,
        universal=universal,
        clipping=clipping,
        force=force,
    )
    rows = [
        (
            layer.name,
            layer.bits,
            percent(layer.sparsity),
            f"{layer.snapped}/{layer.channels}",
            f"{100 * layer.median_change:.3f}",
            f"{100 * layer.largest_change:.3f}",
        )
        for layer in report.layers
    ]
    columns = ("layer", "bits", "zeros %", "universal", "median scale change %", "largest %")
    agreement = (
        "universal" if report.universal else "NOT universal: certificates will be conjunctions"
    )
    emit(report, as_json, table(f"{output}: {report.bytes:,} bytes, {agreement}", columns, rows))


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(train)
    app.command()(convert)
