"""Accuracies of a trained network, and batch statistics rebuilt from the data.

Every certified accuracy here is interval-certified in floats and says so; the certificate of the
deployed integers comes from ``cactus_edge.certify``.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import torch
from torch import Tensor, nn

from cactus_edge.train.bounds import (
    DENSE,
    Statistics,
    View,
    certified,
    forward,
    input_box,
    propagate,
    running_statistics,
)
from cactus_edge.train.data import Samples, select
from cactus_edge.train.zoo import Network

BATCH = 500
DOMAIN = "interval"
VERIFIER = "cactus_edge.train.bounds (float32)"


class Accuracy(msgspec.Struct, frozen=True):
    """Fractions of a split.

    Attributes:
        standard: classified correctly.
        certified: correct on the whole box, by interval bounds in floats.
    """

    standard: float
    certified: float


@torch.no_grad()
def accuracy(network: Network, samples: Samples, epsilon: float, view: View = DENSE) -> Accuracy:
    """Standard and interval-certified accuracy of a view, with the running batch statistics."""
    statistics = running_statistics(network)
    correct = robust = 0
    for images, labels in _batches(samples):
        logits, _ = forward(network, images, view, statistics)
        bounds = propagate(network, input_box(images, epsilon), labels, view, statistics)
        hit = logits.argmax(1) == labels
        correct += int(hit.sum())
        robust += int((hit & certified(bounds.margins, labels)).sum())
    return Accuracy(correct / len(samples), robust / len(samples))


@torch.no_grad()
def precise_statistics(network: Network, samples: Samples, view: View = DENSE) -> Statistics:
    """Mean batch statistics over a split: the 'precise' estimate instead of a moving average."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    batches = 0
    for images, _ in _batches(samples):
        _, used = forward(network, images, view)
        for name, (mean, variance) in used.items():
            if name in sums:
                mean, variance = sums[name][0] + mean, sums[name][1] + variance
            sums[name] = (mean, variance)
        batches += 1
    return {name: (mean / batches, variance / batches) for name, (mean, variance) in sums.items()}


@torch.no_grad()
def set_running_statistics(network: Network, statistics: Statistics) -> None:
    """Write batch statistics into the network, for evaluation and deployment."""
    for name, (mean, variance) in statistics.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)  # only those have statistics
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)


def _batches(samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples, in order."""
    for start in range(0, len(samples), BATCH):
        yield select(samples, slice(start, start + BATCH))
