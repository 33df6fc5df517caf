"""The training loop: one recipe in, one directory out.

Contract: ``train`` is a function of the recipe and the data. On the CPU a run that was interrupted
(at any step) and resumed ends in the same bits as one that was not, because nothing random has a
state: order, augmentation, attacks and draws are seeded by (seed, purpose, position). During
training only the validation split is looked at; the test split is evaluated once, at the end.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import lightning_fabric
import msgspec
import torch
from torch import Tensor

from cactus_edge import datasets, files
from cactus_edge.errors import DataError, OutputError, UsageError
from cactus_edge.train import checkpoint, importance, start, views
from cactus_edge.train.data import augment, generator, order, select, to_samples
from cactus_edge.train.evaluate import (
    DOMAIN,
    VERIFIER,
    accuracy,
    precise_statistics,
    set_running_statistics,
)
from cactus_edge.train.objective import cactus_loss, drawn_members, schedule
from cactus_edge.train.recipe import Recipe, format_recipe
from cactus_edge.train.reports import EpochRow, MemberResult, Progress, StepReport, Summary
from cactus_edge.train.state import (
    Position,
    Run,
    State,
    fresh_state,
    kept_masks,
    restored,
    save_run,
    write_history,
)
from cactus_edge.train.zoo import build, initialise_for_bounds, parameter_count

logger = logging.getLogger(__name__)

REPORT_INTERVAL = 0.25  # seconds between two progress reports


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    device: str = "auto",
) -> Summary:
    """Train a network and write the run's directory.

    Args:
        recipe: what to train.
        output: directory of the run; made if needed.
        resume: go on from the checkpoint in ``output``, if there is one.
        force: replace a run in ``output``.
        progress: receives reports.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        OutputError: ``output`` holds a run, and neither ``resume`` nor ``force`` is given.
        DataError: data, start or checkpoint do not fit the recipe.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
    """
    start.refuse_itself(recipe, output)
    _claim(output, resume=resume, force=force)
    fabric = _fabric(device)
    training, validation = datasets.load_training(recipe.data.name, recipe.data.validation)
    test = datasets.load(recipe.data.name, "test")  # here, so that a missing file is noticed now
    run = _prepare(recipe, output, fabric, (training, validation, test), progress)
    state = restored(run, training.sha256) if resume else fresh_state(run, training.sha256)
    finished = output / checkpoint.METRICS_FILE
    if resume and finished.exists() and state.position.step == run.total_steps:
        logger.info("%s: the run is complete", output)
        return msgspec.json.decode(finished.read_bytes(), type=Summary)
    files.write(output / checkpoint.RECIPE_FILE, format_recipe(recipe).encode(), force=True)
    started, first_step = time.monotonic(), state.position.step
    with _threads(recipe.threads), _interruptible() as interrupted:
        _fit(run, state, interrupted, started)
        seconds = time.monotonic() - started
        done = (state.position.step - first_step) * recipe.optimizer.batch_size
        return _finish(run, state, seconds, done / seconds if seconds else 0.0)


def _fit(run: Run, state: State, interrupted: threading.Event, started: float) -> None:
    """The loop itself, from the state's position to the last epoch."""
    recipe, position = run.recipe, state.position
    batch, per_epoch = recipe.optimizer.batch_size, run.steps_per_epoch
    first_step, reported = position.step, started
    while position.step < run.total_steps:
        epoch, offset = divmod(position.step, per_epoch)
        indices = order(len(run.training), recipe.seed, epoch)
        for index in range(offset, per_epoch):
            _refresh_masks(run, state, index)
            chosen = indices[index * batch : (index + 1) * batch].to(run.fabric.device)
            images, labels = select(run.training, chosen)
            shake = generator(run.fabric.device, recipe.seed, "augment", position.step)
            images = augment(images, recipe.data.augment, shake)
            now = schedule(recipe, position.step, per_epoch)
            for group in run.optimizer.param_groups:
                group["lr"] = now.learning_rate

            loss, state.ranges = cactus_loss(
                run.network, images, labels, recipe, position.step, now, state.masks, state.ranges
            )
            run.optimizer.zero_grad(set_to_none=True)
            run.fabric.backward(loss)
            _clip(run)
            run.optimizer.step()

            position.step += 1
            position.loss_sum += _finite(loss, position.step)
            if interrupted.is_set():
                save_run(run, state)
                raise KeyboardInterrupt
            if time.monotonic() - reported > REPORT_INTERVAL:
                reported = time.monotonic()
                _report(run, position, first_step, started, loss)
        _end_epoch(run, state)


def _refresh_masks(run: Run, state: State, index: int) -> None:
    """Recompute masks where they are due at the epoch's step ``index``."""
    choice = run.recipe.compression
    if choice.mask_refresh == "step":
        drawn = drawn_members(run.recipe, state.position.step)
        if run.scores is None:
            state.masks = views.masks_of(run.network, drawn, choice)
        else:
            masks = views.masks_of(run.scores, drawn, choice)
            state.masks = importance.straight_through(masks, run.scores)
    elif choice.mask_refresh == "epoch" and index == 0:
        state.masks = views.masks_of(run.network, choice.members, choice)


def _end_epoch(run: Run, state: State) -> None:
    """Rebuild batch statistics, evaluate on validation data, write the checkpoint."""
    recipe, position = run.recipe, state.position
    now = schedule(recipe, position.step - 1, run.steps_per_epoch)
    choice = recipe.compression
    view = views.deployed_view(
        run.network, choice.members[0], choice, state.ranges, kept_masks(run, state)
    )
    if run.network.has_batch_norm():  # the stored statistics are those of the first member
        set_running_statistics(run.network, precise_statistics(run.network, run.training, view))
    reached = accuracy(run.network, run.validation, recipe.objective.reported_epsilon, view)
    row = EpochRow(
        epoch=position.step // run.steps_per_epoch,
        epsilon=now.epsilon,
        certified_weight=now.certified_weight,
        learning_rate=now.learning_rate,
        loss=position.loss_sum / run.steps_per_epoch,
        validation_standard=reached.standard,
        validation_certified=reached.certified,
    )
    position.history.append(row)
    position.loss_sum = 0.0
    save_run(run, state)
    write_history(run.output, position.history)
    if run.progress is not None:
        run.progress.epoch(row)


def _finish(run: Run, state: State, seconds: float, throughput: float) -> Summary:
    """Write the model, evaluate every member on validation and test data, write the summary."""
    recipe = run.recipe
    data_sha256, kept = state.position.data_sha256, kept_masks(run, state)
    checkpoint.save_model(run.output, run.network, recipe, state.ranges, data_sha256, kept)
    epsilon = recipe.objective.reported_epsilon
    members: list[MemberResult] = []
    for member in recipe.compression.members:
        view = views.deployed_view(run.network, member, recipe.compression, state.ranges, kept)
        if run.network.has_batch_norm():
            set_running_statistics(run.network, precise_statistics(run.network, run.training, view))
        members.append(
            MemberResult(
                member=member.label(),
                validation=accuracy(run.network, run.validation, epsilon, view),
                test=accuracy(run.network, run.test, epsilon, view),
            )
        )
    summary = Summary(
        output=str(run.output),
        parameters=parameter_count(run.network),
        epochs=recipe.optimizer.epochs,
        seconds=round(seconds, 2),
        samples_per_second=round(throughput, 1),
        epsilon=epsilon,
        domain=DOMAIN,
        verifier=VERIFIER,
        members=tuple(members),
        data_sha256=data_sha256,
        start_sha256=run.start.sha256,
    )
    text = msgspec.json.format(msgspec.json.encode(summary), indent=2)
    files.write(run.output / checkpoint.METRICS_FILE, text, force=True)
    return summary


# --- preparation ---------------------------------------------------------------------------------


def _claim(output: Path, *, resume: bool, force: bool) -> None:
    """Make the directory; refuse or remove an earlier run."""
    if resume and force:
        raise UsageError("give either --resume or --force, not both")
    present = [name for name in checkpoint.FILES if (output / name).exists()]
    if present and not (resume or force):
        raise OutputError(
            f"{output} holds a run already ({', '.join(present)}); use --resume to go on with it, "
            "--force to replace it, or another directory"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        if force:
            for name in present:
                (output / name).unlink()
    except OSError as error:
        raise OutputError(f"{output}: cannot be used as an output directory: {error}") from error


def _fabric(device: str) -> lightning_fabric.Fabric:
    """Fabric on one device."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device '{device}'; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device; use --device cpu")
    accelerator = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return lightning_fabric.Fabric(accelerator=accelerator, devices=1)


def _prepare(
    recipe: Recipe,
    output: Path,
    fabric: lightning_fabric.Fabric,
    splits: tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset],
    progress: Progress | None,
) -> Run:
    """Network, optimizer and data on the device."""
    samples, validation, test = (to_samples(split, fabric.device) for split in splits)
    batch = recipe.optimizer.batch_size
    if len(samples) < batch:
        raise DataError(
            f"[optimizer] batch_size: {batch} is more than the {len(samples)} training samples"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = build(
            recipe.network.name, samples.input_shape, splits[0].classes, recipe.network.width
        )
        if recipe.objective.initialisation == "ibp":
            initialise_for_bounds(network)
    beginning = start.load(recipe, network, splits[0].sha256, fabric.device)
    network = network.to(fabric.device)
    scores = importance.learned(network) if recipe.compression.importance == "scores" else None
    trained = importance.trained(network, scores)
    optimizer = torch.optim.Adam(trained.values(), lr=recipe.optimizer.learning_rate)
    return Run(
        recipe,
        output,
        fabric,
        network,
        optimizer,
        samples,
        validation,
        test,
        progress,
        beginning,
        scores,
    )


def _clip(run: Run) -> None:
    """Clip the gradient's norm."""
    limit = run.recipe.optimizer.gradient_clip
    if limit:
        torch.nn.utils.clip_grad_norm_(run.trained.values(), limit)


def _finite(loss: Tensor, step: int) -> float:
    """The loss as a number; training that diverged stops here."""
    value = float(loss.detach())
    if not value < float("inf"):
        raise DataError(
            f"the loss is {value} after step {step}; use a smaller [optimizer] learning_rate or a "
            "longer [objective] epsilon_ramp"
        )
    return value


def _report(run: Run, position: Position, first_step: int, started: float, loss: Tensor) -> None:
    """Throughput and remaining time for the progress display."""
    if run.progress is None:
        return
    rate = (position.step - first_step) / (time.monotonic() - started)
    run.progress.step(
        StepReport(
            epoch=(position.step - 1) // run.steps_per_epoch + 1,
            step=position.step,
            total_steps=run.total_steps,
            loss=float(loss.detach()),
            samples_per_second=rate * run.recipe.optimizer.batch_size,
            seconds_left=(run.total_steps - position.step) / rate,
        )
    )


# --- process-wide settings, restored afterwards --------------------------------------------------


@contextmanager
def _threads(count: int) -> Generator[None]:
    """Run torch with ``count`` threads (0: as it is)."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interruptible() -> Generator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach the main thread only
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        event.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
