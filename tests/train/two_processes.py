"""What each of the two processes of ``test_processes.py`` does.

The gradients of every loss, in double precision, against those of one process; then a run that
Ctrl-C stops; then the rest of it.
"""

from __future__ import annotations

import os
import signal

import lightning_fabric
import msgspec
import torch

from cactus_edge import datasets
from cactus_edge.train import loop, objective, views
from cactus_edge.train.bounds import View
from cactus_edge.train.checkpoint import load_state
from cactus_edge.train.data import select, to_samples
from cactus_edge.train.execution import Flag
from cactus_edge.train.losses import LOSSES
from cactus_edge.train.objective import cactus_loss, schedule
from cactus_edge.train.prepare import Job
from cactus_edge.train.recipe import Recipe
from cactus_edge.train.reports import EpochRow, Progress, StepReport, Summary
from cactus_edge.train.share import ALONE, Share
from cactus_edge.train.state import Position
from cactus_edge.train.zoo import build

BATCH = 16


class Never:
    """No Ctrl-C."""

    def is_set(self) -> bool:
        return False


class Interrupting:
    """Presses Ctrl-C in the calling process at the given step."""

    def __init__(self, step: int) -> None:
        self.at = step
        self.epochs: list[int] = []

    def step(self, report: StepReport) -> None:
        if report.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def epoch(self, row: EpochRow) -> None:
        self.epochs.append(row.epoch)


class Nothing(msgspec.Struct):
    """A job that needs no telling."""


def die(
    fabric: lightning_fabric.Fabric, _job: Nothing, _progress: Progress | None, _stop: Flag
) -> int:
    """The second process is killed while the first one waits for it."""
    fabric.barrier()
    if fabric.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fabric.barrier()
    return 0


def gradients(recipe: Recipe, share: Share) -> list[torch.Tensor]:
    """Loss, ranges and gradients of one step, and the gradient that perturbations follow."""
    samples = to_samples(datasets.load("digits", "train"), torch.device("cpu"))
    torch.manual_seed(0)
    network = build("cnn-small-bn", samples.input_shape, 10, 0.25).double()
    images, labels = select(samples, slice(0, BATCH))
    images, labels = share.rows(images.double()), share.rows(labels)
    choice, now = recipe.compression, schedule(recipe, 4, 9)
    assert now.regulariser_weight > 0 and now.epsilon > 0
    masks = views.masks_of(network, choice.members, choice)
    loss, ranges = cactus_loss(network, images, labels, recipe, 4, now, masks, {}, share)
    loss.backward()
    share.average_gradients(network.parameters())
    found = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(found) == len(list(network.parameters()))

    weights = {name: layer.weight.detach().requires_grad_() for name, layer in network.weighted()}
    certified = objective._certified_loss(  # pyright: ignore[reportPrivateUsage]
        network, images, labels, recipe.objective, now, View(weights), share
    )
    followed = torch.autograd.grad(certified, list(weights.values()))
    return [share.total(loss.detach()) / share.count, *ranges.values(), *found, *followed]


def largest_difference(recipe: Recipe, share: Share) -> float:
    """Over all losses, of two processes and one."""
    worst = 0.0
    for name in LOSSES:
        changed = msgspec.structs.replace(recipe.objective, loss=name, attack_steps=2)
        chosen = msgspec.structs.replace(recipe, objective=changed)
        found = gradients(chosen, share)
        if not share.first:
            continue  # the first process has the same, and compares it
        for ours, whole in zip(found, gradients(chosen, ALONE), strict=True):
            worst = max(worst, float((ours - whole).abs().max()))
    return worst


def work(
    fabric: lightning_fabric.Fabric, job: Job, progress: Progress | None, stop: Flag
) -> tuple[float, int, Summary]:
    """The largest difference of gradients, the step at which Ctrl-C came, and the summary."""
    loop.REPORT_INTERVAL = -1.0
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    worst = largest_difference(job.recipe, Share(fabric.global_rank, fabric.world_size))
    torch.set_default_dtype(torch.float32)
    train = loop._train  # pyright: ignore[reportPrivateUsage]
    step = -1
    try:
        train(fabric, job, progress, stop)
    except KeyboardInterrupt:
        step = msgspec.json.decode(load_state(job.output)[1], type=Position).step
    rest = msgspec.structs.replace(job, resume=True)
    return worst, step, train(fabric, rest, progress, Never())
