"""Accuracies of a trained network, and batch statistics rebuilt from the data.

Every certified accuracy here is interval-certified in floats and says so; the certificate of the
deployed integers comes from ``cactus_edge.certify``. Everything here is float32, whatever
precision training has: neither bfloat16 nor TF32, which GPUs otherwise use in convolutions.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

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
from cactus_edge.train.share import ALONE, Share
from cactus_edge.train.zoo import Network, device_of

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
def accuracy(
    network: Network,
    samples: Samples,
    epsilon: float,
    view: View = DENSE,
    share: Share = ALONE,
) -> Accuracy:
    """Standard and interval-certified accuracy of a view, with the running batch statistics.

    Every process of ``share`` takes its part of the batches and gets the whole result.
    """
    statistics = running_statistics(network)
    hits: list[Tensor] = [torch.zeros(2, dtype=torch.int64, device=samples.labels.device)]
    with _full_precision(device_of(network)):
        for images, labels in _batches(samples, share):
            logits, _ = forward(network, images, view, statistics)
            bounds = propagate(network, input_box(images, epsilon), labels, view, statistics)
            hit = logits.argmax(1) == labels
            both = hit & certified(bounds.margins, labels)
            hits.append(torch.stack([hit.sum(), both.sum()]))
    correct, robust = share.total(torch.stack(hits).sum(0)).tolist()
    return Accuracy(correct / len(samples), robust / len(samples))


@torch.no_grad()
def precise_statistics(
    network: Network, samples: Samples, view: View = DENSE, share: Share = ALONE
) -> Statistics:
    """Mean batch statistics over a split: the 'precise' estimate instead of a moving average."""
    sums = {
        name: torch.zeros_like(torch.stack(moments))
        for name, moments in running_statistics(network).items()
    }
    with _full_precision(device_of(network)):
        for images, _ in _batches(samples, share):
            _, used = forward(network, images, view)
            for name, moments in used.items():
                sums[name] += torch.stack(moments)
    batches = -(-len(samples) // BATCH)
    result: dict[str, tuple[Tensor, Tensor]] = {}
    for name, added in sums.items():
        mean, variance = share.total(added) / batches
        result[name] = mean, variance
    return result


@torch.no_grad()
def set_running_statistics(network: Network, statistics: Statistics) -> None:
    """Write batch statistics into the network, for evaluation and deployment."""
    for name, (mean, variance) in statistics.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)  # only those have statistics
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)


def _batches(samples: Samples, share: Share) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples, in order; of several processes each takes every so manieth batch."""
    for start in range(share.rank * BATCH, len(samples), share.count * BATCH):
        yield select(samples, slice(start, start + BATCH))


@contextmanager
def _full_precision(device: torch.device) -> Generator[None]:
    """Layers compute in float32."""
    backends: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
