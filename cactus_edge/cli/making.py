"""The verb ``train``."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cactus_edge.cli.output import (
    ForceOption,
    JsonOption,
    PortOption,
    ServeOption,
    announced,
    console,
    emit,
    share,
    table,
    tell,
)
from cactus_edge.errors import MissingExtraError, counted

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
            f"validation: standard {share(row.validation_standard)} %, "
            f"certified {share(row.validation_certified)} % (interval, float)",
            highlight=False,
            soft_wrap=True,
        )


@contextmanager
def training_bar() -> Generator[_Bar]:
    """A progress display for ``cactus_edge.train.train``."""
    columns = (TextColumn("train"), BarColumn(), TextColumn("{task.fields[text]}"))
    progress = Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
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
    serve: ServeOption = False,
    port: PortOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train with the CACTUS objective, as one recipe says.

    Example: cactus-edge train recipes/mnist-quick.toml --output runs/mnist-quick
    """
    require_training("training")
    from cactus_edge.train import load_recipe
    from cactus_edge.train import train as run
    from cactus_edge.train.tensorboard import serving

    wanted = load_recipe(recipe)
    try:
        with announced(serving(output, port) if serve else None), training_bar() as progress:
            summary = run(
                wanted,
                output,
                resume=resume,
                force=force,
                progress=progress,
                device=device,
                devices=devices,
                precision=precision,
                tensorboard=tensorboard or serve,
                checkpoint_seconds=checkpoint_every,
            )
    except KeyboardInterrupt:
        again = ["cactus-edge", "train", str(recipe), "-o", str(output), "--resume"]
        for option, value, default in (
            ("--device", device, "auto"),
            ("--devices", devices, 1),
            ("--precision", precision, "32-true"),
            ("--checkpoint-every", checkpoint_every, 600.0),
        ):
            again += [] if value == default else [option, f"{value}"]
        again += ["--serve"] if serve else ["--tensorboard"] if tensorboard else []
        tell(f"interrupted; go on with: {shlex.join(again)}")
        raise typer.Exit(130) from None
    summary = msgspec.structs.replace(summary, output=str(output))  # it may have been moved
    rows = [
        (
            member.member,
            share(member.validation.standard),
            share(member.validation.certified),
            share(member.test.standard),
            share(member.test.certified),
            f"{member.microseconds_per_sample:.1f}" if member.microseconds_per_sample else "-",
        )
        for member in summary.members
    ]
    title = (
        f"{summary.output}: {counted(summary.parameters, 'parameter')}, {summary.seconds:.0f} s; "
        f"certified at epsilon {summary.epsilon:g} by {summary.domain} bounds ({summary.verifier})"
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


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(train)
