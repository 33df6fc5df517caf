"""What a process of a run has before its first step: data, network and optimizer on its device."""

from __future__ import annotations

from pathlib import Path

import lightning_fabric
import msgspec
import torch

from cactus_edge import datasets
from cactus_edge.errors import DataError
from cactus_edge.train import importance, start
from cactus_edge.train.data import to_samples
from cactus_edge.train.execution import Execution
from cactus_edge.train.recipe import Recipe
from cactus_edge.train.reports import Progress
from cactus_edge.train.share import Share
from cactus_edge.train.state import Run
from cactus_edge.train.zoo import build, initialise_for_bounds


class Job(msgspec.Struct, frozen=True):
    """What every process of a run is told."""

    recipe: Recipe
    output: Path
    resume: bool
    execution: Execution


def prepare(
    job: Job,
    fabric: lightning_fabric.Fabric,
    splits: tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset],
    progress: Progress | None,
) -> Run:
    """Network, optimizer and data on the device."""
    recipe = job.recipe
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
        job.output,
        fabric,
        network,
        optimizer,
        samples,
        validation,
        test,
        progress,
        job.execution,
        Share(fabric.global_rank, fabric.world_size),
        beginning,
        scores,
    )
