"""The training loop: one recipe in, one directory out.

Contract: ``train`` is a function of the recipe and the data. On the CPU a run that was interrupted
(at any step) and resumed ends in the same bits as one that was not, because nothing random has a
state: order, augmentation, attacks and draws are seeded by (seed, purpose, position). During
training only the validation split is looked at; the test split is evaluated once, at the end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import lightning_fabric
import msgspec
import torch

from cactus_edge import datasets, files
from cactus_edge.errors import DataError
from cactus_edge.train import checkpoint, execution, importance, processes, start, views
from cactus_edge.train.compress import Masks
from cactus_edge.train.cost import (
    EpochCost,
    peak_memory,
    read_costs,
    step_time,
    summarise,
    write_costs,
)
from cactus_edge.train.data import augment, generator, order, select
from cactus_edge.train.evaluate import (
    DOMAIN,
    VERIFIER,
    accuracy,
    precise_statistics,
    set_running_statistics,
)
from cactus_edge.train.execution import Execution, Flag
from cactus_edge.train.logs import Logs
from cactus_edge.train.members import Member
from cactus_edge.train.objective import cactus_loss, drawn_members, schedule
from cactus_edge.train.prepare import Job, prepare
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
from cactus_edge.train.zoo import parameter_count

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
    devices: int = 1,
    precision: str = execution.FULL_PRECISION,
    tensorboard: bool = False,
    checkpoint_seconds: float = execution.CHECKPOINT_SECONDS,
) -> Summary:
    """Train a network and write the run's directory.

    Args:
        recipe: what to train.
        output: directory of the run; made if needed.
        resume: go on from the checkpoint in ``output``, if there is one.
        force: replace a run in ``output``.
        progress: receives reports.
        device: ``auto``, ``cpu`` or ``cuda``.
        devices: processes that share every batch; a script that asks for several needs the usual
            ``if __name__ == "__main__":``.
        precision: of training steps, ``32-true`` or ``bf16-mixed``.
        tensorboard: write logs for TensorBoard as well.
        checkpoint_seconds: time between two checkpoints within an epoch.

    Raises:
        OutputError: ``output`` holds a run, and neither ``resume`` nor ``force`` is given; or
            another process trains there, or it cannot be written.
        DataError: data, start or checkpoint do not fit the recipe.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
    """
    chosen = Execution(device, devices, precision, tensorboard, checkpoint_seconds)
    execution.check(chosen, recipe)
    start.refuse_itself(recipe, output)
    with execution.claimed(output, resume=resume, force=force):
        job = Job(recipe, output, resume, chosen)
        fabric = execution.fabric_for(chosen)
        if devices > 1:
            return processes.launch(fabric, _train, job, progress)
        return _train(fabric, job, progress, None)


def _train(
    fabric: lightning_fabric.Fabric, job: Job, progress: Progress | None, stop: Flag | None
) -> Summary:
    """The whole run, in one of its processes; without ``stop`` it listens to Ctrl-C itself."""
    recipe, output = job.recipe, job.output
    training, validation = datasets.load_training(recipe.data.name, recipe.data.validation)
    test = datasets.load(recipe.data.name, "test")  # here, so that a missing file is noticed now
    run = prepare(job, fabric, (training, validation, test), progress)
    state = restored(run, training.sha256) if job.resume else fresh_state(run, training.sha256)
    finished = output / checkpoint.METRICS_FILE
    if job.resume and finished.exists() and state.position.step == run.total_steps:
        logger.info("%s: the run is complete", output)
        return msgspec.json.decode(finished.read_bytes(), type=Summary)
    costs = read_costs(output, len(state.position.history)) if job.resume else []
    if run.share.first:
        files.write(output / checkpoint.RECIPE_FILE, format_recipe(recipe).encode(), force=True)
        write_history(output, state.position.history)  # a killed run may have an older one
    started, first_step = time.monotonic(), state.position.step
    listening = execution.interruptible() if stop is None else nullcontext(stop)
    with execution.threads(recipe.threads, run.share.count), listening as interrupted:
        _fit(run, state, interrupted, started, costs)
        seconds = time.monotonic() - started
        done = (state.position.step - first_step) * recipe.optimizer.batch_size
        return _finish(run, state, seconds, done / seconds if seconds else 0.0, costs)


def _fit(run: Run, state: State, interrupted: Flag, started: float, costs: list[EpochCost]) -> None:
    """The loop itself, from the state's position to the last epoch."""
    recipe, position = run.recipe, state.position
    batch, per_epoch = recipe.optimizer.batch_size, run.steps_per_epoch
    first_step, reported, saved = position.step, started, started
    logs = _logs(run, position, costs)
    while len(position.history) < recipe.optimizer.epochs:
        epoch = len(position.history)
        indices = order(len(run.training), recipe.seed, epoch)
        began, before = time.monotonic(), position.step
        for index in range(position.step - epoch * per_epoch, per_epoch):
            _refresh_masks(run, state, index)
            loss = _step(run, state, indices[index * batch : (index + 1) * batch])
            position.step += 1
            loss, stop = _agreed(run, loss, interrupted)
            position.loss_sum += _finite(loss, position.step)
            if stop:
                save_run(run, state)
                raise KeyboardInterrupt
            now = time.monotonic()
            if now - saved > run.execution.checkpoint_seconds:
                save_run(run, state)
                saved = time.monotonic()
            if now - reported > REPORT_INTERVAL:
                reported = now
                _report(run, position, first_step, started, loss)
        trained = time.monotonic()
        row = _end_epoch(run, state)
        saved = time.monotonic()
        memory, gpu_memory = peak_memory(run.fabric.device, run.share)
        evaluations = batch * sum(_networks(run, step) for step in range(before, position.step))
        cost = EpochCost(
            epoch=row.epoch,
            samples=(position.step - before) * batch,
            seconds=trained - began,
            evaluation_seconds=saved - trained,
            memory_bytes=memory,
            gpu_memory_bytes=gpu_memory,
            evaluations=evaluations,
        )
        costs.append(cost)
        if run.share.first:
            write_costs(run.output, costs)
        if logs is not None:
            logs.epoch(row, cost)
        if run.progress is not None:
            run.progress.epoch(row)
    if logs is not None:
        logs.close()


def _networks(run: Run, step: int) -> int:
    """How many members a step evaluates."""
    compressed = schedule(run.recipe, step, run.steps_per_epoch).compressed
    return len(drawn_members(run.recipe, step)) if compressed else 1


def _refresh_masks(run: Run, state: State, index: int) -> None:
    """Recompute masks where they are due at the epoch's step ``index``."""
    choice = run.recipe.compression
    if choice.mask_refresh == "step":
        state.masks = _masks(run, state, drawn_members(run.recipe, state.position.step))
    elif choice.mask_refresh == "epoch" and index == 0:
        state.masks = _masks(run, state, choice.members)


def _masks(run: Run, state: State, members: Sequence[Member]) -> Mapping[str, Masks]:
    """The masks of some members now: kept, or of the weights, or of their scores."""
    choice = run.recipe.compression
    if run.scores is not None:
        return importance.straight_through(views.masks_of(run.scores, members, choice), run.scores)
    if choice.mask_refresh == "once":
        return state.masks
    return views.masks_of(run.network, members, choice)


def _step(run: Run, state: State, chosen: torch.Tensor) -> float:
    """One step of the optimizer on this process's share of a batch; the loss of the share."""
    recipe, position = run.recipe, state.position
    images, labels = select(run.training, chosen.to(run.fabric.device))
    shake = generator(run.fabric.device, recipe.seed, "augment", position.step)
    images = augment(images, recipe.data.augment, shake)
    now = schedule(recipe, position.step, run.steps_per_epoch)
    for group in run.optimizer.param_groups:
        group["lr"] = now.learning_rate
    images, labels = run.share.rows(images), run.share.rows(labels)
    with run.fabric.autocast():
        loss, state.ranges = cactus_loss(
            run.network,
            images,
            labels,
            recipe,
            position.step,
            now,
            state.masks,
            state.ranges,
            run.share,
        )
    run.optimizer.zero_grad(set_to_none=True)
    run.fabric.backward(loss)
    run.share.average_gradients(run.trained.values())
    _clip(run)
    run.optimizer.step()
    return float(loss.detach())


def _agreed(run: Run, loss: float, interrupted: Flag) -> tuple[float, bool]:
    """The loss of the whole batch, and whether any process is to stop."""
    share = run.share
    if share.count == 1:
        return loss, interrupted.is_set()
    told = torch.tensor([loss, interrupted.is_set()], dtype=torch.float64, device=run.fabric.device)
    total, stop = share.total(told).tolist()
    return total / share.count, stop > 0


def _logs(run: Run, position: Position, costs: list[EpochCost]) -> Logs | None:
    """Logs for TensorBoard, where they are asked for, with the epochs that are done."""
    if not (run.execution.tensorboard and run.share.first):
        return None
    return Logs(run.output, position.history, {cost.epoch: cost for cost in costs})


def _end_epoch(run: Run, state: State) -> EpochRow:
    """Rebuild batch statistics, evaluate on validation data, write the checkpoint."""
    recipe, position = run.recipe, state.position
    now = schedule(recipe, position.step - 1, run.steps_per_epoch)
    choice = recipe.compression
    view = views.deployed_view(
        run.network, choice.members[0], choice, state.ranges, kept_masks(run, state)
    )
    if run.network.has_batch_norm():  # the stored statistics are those of the first member
        set_running_statistics(
            run.network, precise_statistics(run.network, run.training, view, run.share)
        )
    reached = accuracy(
        run.network, run.validation, recipe.objective.reported_epsilon, view, run.share
    )
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
    if run.share.first:
        write_history(run.output, position.history)
    return row


def _finish(
    run: Run, state: State, seconds: float, throughput: float, costs: list[EpochCost]
) -> Summary:
    """Write the model, evaluate every member on validation and test data, write the summary."""
    recipe = run.recipe
    data_sha256, kept = state.position.data_sha256, kept_masks(run, state)
    if run.share.first:
        checkpoint.save_model(run.output, run.network, recipe, state.ranges, data_sha256, kept)
    epsilon = recipe.objective.reported_epsilon
    members: list[MemberResult] = []
    for member in recipe.compression.members:
        view = views.deployed_view(run.network, member, recipe.compression, state.ranges, kept)
        if run.network.has_batch_norm():
            set_running_statistics(
                run.network, precise_statistics(run.network, run.training, view, run.share)
            )
        members.append(
            MemberResult(
                member=member.label(),
                validation=accuracy(run.network, run.validation, epsilon, view, run.share),
                test=accuracy(run.network, run.test, epsilon, view, run.share),
                microseconds_per_sample=_member_cost(run, state, member),
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
        cost=summarise(
            costs,
            samples_per_epoch=run.steps_per_epoch * recipe.optimizer.batch_size,
            device=run.fabric.device,
            devices=run.share.count,
            precision=run.execution.precision,
        ),
    )
    text = msgspec.json.format(msgspec.json.encode(summary), indent=2)
    if run.share.first:
        files.write(run.output / checkpoint.METRICS_FILE, text, force=True)
    return summary


def _member_cost(run: Run, state: State, member: Member) -> float:
    """Microseconds per sample of a last training step with one member alone; changes nothing."""
    recipe, share = run.recipe, run.share
    alone = msgspec.structs.replace(recipe.compression, members=(member,), draw="all")
    alone = msgspec.structs.replace(recipe, compression=alone)
    step = run.total_steps - 1
    images, labels = select(run.training, slice(0, recipe.optimizer.batch_size))
    images, labels = share.rows(images), share.rows(labels)
    now = schedule(recipe, step, run.steps_per_epoch)

    def once() -> None:
        masks = _masks(run, state, (member,))
        with run.fabric.autocast():
            loss, _ = cactus_loss(
                run.network, images, labels, alone, step, now, masks, state.ranges, share
            )
        run.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:  # a member without scores trains none
            run.fabric.backward(loss)
            share.average_gradients(run.trained.values())

    return round(1e6 * step_time(once, run.fabric.device) / recipe.optimizer.batch_size, 3)


def _clip(run: Run) -> None:
    """Clip the gradient's norm."""
    limit = run.recipe.optimizer.gradient_clip
    if limit:
        torch.nn.utils.clip_grad_norm_(run.trained.values(), limit)


def _finite(loss: float, step: int) -> float:
    """The loss; training that diverged stops here."""
    if not loss < float("inf"):
        raise DataError(
            f"the loss is {loss} after step {step}; use a smaller [optimizer] learning_rate or a "
            "longer [objective] epsilon_ramp"
        )
    return loss


def _report(run: Run, position: Position, first_step: int, started: float, loss: float) -> None:
    """Throughput and remaining time for the progress display."""
    if run.progress is None:
        return
    rate = (position.step - first_step) / (time.monotonic() - started)
    run.progress.step(
        StepReport(
            epoch=(position.step - 1) // run.steps_per_epoch + 1,
            step=position.step,
            total_steps=run.total_steps,
            loss=loss,
            samples_per_second=rate * run.recipe.optimizer.batch_size,
            seconds_left=(run.total_steps - position.step) / rate,
        )
    )
