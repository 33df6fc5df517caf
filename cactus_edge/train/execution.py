"""How a run is carried out, as opposed to what is trained: devices, precision, interruption.

Nothing here is part of the recipe. With one process and full precision none of it changes a bit of
the result; several processes change it within float tolerance, mixed precision by design.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, get_args

import lightning_fabric
import msgspec
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from cactus_edge import files
from cactus_edge.errors import DataError, MissingExtraError, OutputError, UsageError, counted, meant
from cactus_edge.train import checkpoint, logs
from cactus_edge.train.recipe import Recipe

Precision = Literal["32-true", "bf16-mixed"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
FULL_PRECISION: Precision = "32-true"
CHECKPOINT_SECONDS = 600.0


class Execution(msgspec.Struct, frozen=True):
    """The choices of one call.

    Attributes:
        device: ``auto``, ``cpu`` or ``cuda``.
        devices: processes, each with its share of every batch and, on GPUs, its own GPU.
        precision: of training steps; evaluation and stored statistics are float32 in any case.
        tensorboard: whether logs for TensorBoard are written.
        checkpoint_seconds: between two checkpoints within an epoch.
    """

    device: str = "auto"
    devices: int = 1
    precision: str = FULL_PRECISION
    tensorboard: bool = False
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    @property
    def accelerator(self) -> str:
        """``cpu`` or ``cuda``."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


class Flag(Protocol):
    """What says that a run is to stop: an event of threads or of processes."""

    def is_set(self) -> bool:
        """Whether it is."""
        ...


def check(execution: Execution, recipe: Recipe) -> None:
    """Refuse what cannot be done, before anything is read or written.

    Raises:
        UsageError: an unknown name, or more devices than there are.
        DataError: the batch cannot be cut into equal parts.
        MissingExtraError: TensorBoard is not installed.
    """
    device, devices = execution.device, execution.devices
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device '{device}'; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device; use --device cpu")
    if devices < 1:
        raise UsageError(f"--devices {devices}: use a number from 1")
    if execution.accelerator == "cuda" and devices > torch.cuda.device_count():
        raise UsageError(
            f"--devices {devices}: torch finds {torch.cuda.device_count()} CUDA devices; use at "
            "most as many, or --device cpu"
        )
    if recipe.optimizer.batch_size % devices:
        raise DataError(
            f"[optimizer] batch_size: {counted(recipe.optimizer.batch_size, 'sample')} cannot be "
            f"shared equally by {devices} processes; use a multiple of {devices}, or "
            "other --devices"
        )
    if execution.precision not in PRECISIONS:
        raise UsageError(
            f"unknown precision '{execution.precision}'{meant(execution.precision, PRECISIONS)} "
            f"use one of {', '.join(PRECISIONS)}"
        )
    if not execution.checkpoint_seconds >= 0:
        raise UsageError(f"--checkpoint-every {execution.checkpoint_seconds}: use seconds from 0")
    if execution.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "train", "--tensorboard")


@contextmanager
def claimed(output: Path, *, resume: bool, force: bool) -> Generator[None]:
    """Make the directory, for this process alone until the block ends.

    An earlier run is refused or removed, and what a killed one left half done is removed.

    Raises:
        UsageError: ``resume`` and ``force``.
        OutputError: there is an earlier run, another process is at it, or it cannot be written.
    """
    if resume and force:
        raise UsageError("give either --resume or --force, not both")
    present = [name for name in checkpoint.FILES if (output / name).exists()]
    if present and not (resume or force):
        raise OutputError(
            f"{output} holds a run already ({', '.join(present)}); use --resume to go on with it, "
            "--force to replace it, or another directory"
        )
    with files.owning(output):
        try:
            for name in checkpoint.FILES:
                for temporary in output.glob(f".{name}.*"):
                    temporary.unlink()
            if force:
                for name in present:
                    (output / name).unlink()
                logs.clear(output)
        except OSError as error:
            raise OutputError(
                f"{output}: cannot be used as an output directory: {error}"
            ) from error
        yield


def fabric_for(execution: Execution) -> lightning_fabric.Fabric:
    """Fabric for one process, or one that starts several on this machine."""
    accelerator, devices = execution.accelerator, execution.devices
    precision: Precision = "bf16-mixed" if execution.precision == "bf16-mixed" else FULL_PRECISION
    if devices == 1:
        return lightning_fabric.Fabric(accelerator=accelerator, devices=1, precision=precision)
    return lightning_fabric.Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp_spawn",
        precision=precision,
        plugins=[LightningEnvironment()],  # this machine, whatever the scheduler's variables say
    )


# --- process-wide settings, restored afterwards --------------------------------------------------


@contextmanager
def threads(count: int, processes: int = 1) -> Generator[None]:
    """Run torch with ``count`` threads (0: as it is, or this process's part of the cores)."""
    before = torch.get_num_threads()
    if count or processes > 1:
        torch.set_num_threads(count or max(1, (os.cpu_count() or 1) // processes))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def interruptible() -> Generator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    with on_interrupt(event.set):
        yield event


@contextmanager
def on_interrupt(act: Callable[[], None]) -> Generator[None]:
    """Call ``act`` at the first Ctrl-C; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        act()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
