"""Two processes on the digits, for ``test_processes.py``: `two_processes.py RECIPE OUTPUT`.

First the gradients of every loss, in double precision, against those of one process. Then a run
that Ctrl-C stops, and that goes on. Prints the largest difference and what the run reported.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import lightning_fabric
import msgspec
import torch

from cactus_edge import datasets
from cactus_edge.train import loop, processes, views
from cactus_edge.train.data import select, to_samples
from cactus_edge.train.execution import Execution, Flag, fabric_for
from cactus_edge.train.losses import LOSSES
from cactus_edge.train.members import Quantized
from cactus_edge.train.objective import cactus_loss, schedule
from cactus_edge.train.recipe import Recipe, load_recipe
from cactus_edge.train.reports import EpochRow, Progress, StepReport
from cactus_edge.train.share import ALONE, Share
from cactus_edge.train.zoo import build

BATCH = 16


class Interrupting:
    """Presses Ctrl-C in the parent at the first report, if there is one to press it for."""

    def __init__(self, armed: bool) -> None:
        self.armed = armed
        self.epochs: list[int] = []

    def step(self, report: StepReport) -> None:
        if self.armed and report.step == 3:
            self.armed = False
            os.kill(os.getpid(), signal.SIGINT)

    def epoch(self, row: EpochRow) -> None:
        self.epochs.append(row.epoch)


def gradients(recipe: Recipe, share: Share) -> list[torch.Tensor]:
    """Loss, ranges and gradients of one step: mean over the processes of ``share``."""
    samples = to_samples(datasets.load("digits", "train"), torch.device("cpu"))
    torch.manual_seed(0)
    network = build("cnn-small-bn", samples.input_shape, 10, 0.25).double()
    images, labels = select(samples, slice(0, BATCH))
    choice = recipe.compression
    now = schedule(recipe, 4, 9)
    assert now.regulariser_weight > 0 and now.epsilon > 0
    masks = views.masks_of(network, choice.members, choice)
    images, labels = share.rows(images.double()), share.rows(labels)
    loss, ranges = cactus_loss(network, images, labels, recipe, 4, now, masks, {}, share)
    loss.backward()
    share.average_gradients(network.parameters())
    found = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(found) == len(list(network.parameters()))
    return [share.total(loss.detach()) / share.count, *ranges.values(), *found]


def largest_difference(recipe: Recipe, share: Share) -> float:
    """Over all losses, of two processes and one, relative to the largest element."""
    worst = 0.0
    for name in LOSSES:
        objective = msgspec.structs.replace(recipe.objective, loss=name, attack_steps=2)
        chosen = msgspec.structs.replace(recipe, objective=objective)
        for ours, whole in zip(gradients(chosen, share), gradients(chosen, ALONE), strict=True):
            scale = float(whole.abs().max()) + 1e-12
            worst = max(worst, float((ours - whole).abs().max()) / scale)
    return worst


def work(
    fabric: lightning_fabric.Fabric, job: loop.Job, progress: Progress | None, stop: Flag
) -> tuple[float, loop.Summary]:
    """What each of the two processes does."""
    loop.REPORT_INTERVAL = -1.0
    worst = -1.0
    if not job.resume:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        worst = largest_difference(job.recipe, Share(fabric.global_rank, fabric.world_size))
        torch.set_default_dtype(torch.float32)
        (job.output / f"difference{fabric.global_rank}").write_text(str(worst))
    return worst, loop._train(fabric, job, progress, stop)  # pyright: ignore[reportPrivateUsage]


def main() -> None:
    recipe, output = load_recipe(Path(sys.argv[1])), Path(sys.argv[2])
    output.mkdir()
    execution = Execution(device="cpu", devices=2)
    assert Quantized in map(type, recipe.compression.members)
    first = Interrupting(armed=True)
    interrupted = False
    try:
        processes.launch(
            fabric_for(execution), work, loop.Job(recipe, output, False, execution), first
        )
    except KeyboardInterrupt:
        interrupted = True
    second = Interrupting(armed=False)
    job = loop.Job(recipe, output, True, execution)
    _, summary = processes.launch(fabric_for(execution), work, job, second)
    differences = [float((output / f"difference{rank}").read_text()) for rank in (0, 1)]
    result = {
        "differences": differences,
        "interrupted": interrupted,
        "epochs": [first.epochs, second.epochs],
        "summary": msgspec.to_builtins(summary),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
