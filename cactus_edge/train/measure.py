"""The float network as a baseline: accuracy under attack, and latency at batch 1."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import msgspec
import torch

from cactus_edge.datasets import Dataset
from cactus_edge.train.bounds import DENSE, attack, input_box, running_statistics
from cactus_edge.train.checkpoint import load_model
from cactus_edge.train.data import generator, select, to_samples

_CPU = torch.device("cpu")
_BATCH = 500


class FloatMeasurement(msgspec.Struct, frozen=True):
    """Fractions of the split; ``latency`` is the median of single samples, in microseconds."""

    standard_accuracy: float
    attack_accuracy: float
    latency: float


def float_measurement(
    path: Path,
    data: Dataset,
    epsilon: float,
    *,
    steps: int = 20,
    restarts: int = 2,
    runs: int = 300,
) -> FloatMeasurement:
    """Attack a trained float network by projected gradient and time it.

    Args:
        path: a run's directory or its ``model.safetensors``.
        data: the split to measure on.
        epsilon: radius in [0, 1].
        steps: gradient steps.
        restarts: random starts.
        runs: timed calls.
    """
    model = load_model(path)
    network = model.network.eval()
    samples = to_samples(data, _CPU)
    fixed = running_statistics(network)
    correct = robust = 0
    for start in range(0, len(samples), _BATCH):
        images, labels = select(samples, slice(start, start + _BATCH))
        with torch.no_grad():
            hit = network(images).argmax(1) == labels
        correct += int(hit.sum())
        for restart in range(restarts):
            random = generator(_CPU, model.recipe.seed, "measure", start * restarts + restart)
            box = input_box(images, epsilon)
            points = attack(network, box, labels, DENSE, fixed, steps, random)
            with torch.no_grad():
                hit &= network(points).argmax(1) == labels
        robust += int(hit.sum())
    return FloatMeasurement(
        correct / len(samples), robust / len(samples), _latency(network, samples.images[:1], runs)
    )


@torch.no_grad()
def _latency(network: torch.nn.Module, image: torch.Tensor, runs: int) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sample = image.float() / 255 if image.dtype == torch.uint8 else image
        times: list[float] = []
        for _ in range(runs + 20):
            start = time.perf_counter()
            network(sample)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[20:]) * 1e6
