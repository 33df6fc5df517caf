"""One process's share of every batch, and what the processes have to tell each other.

Contract: the batch is cut into equal parts, one per process. A process computes a loss of its part;
the *mean over the processes* is the loss of the batch, and the mean of their gradients its
gradient. So whatever is a mean over samples needs nothing further. What is not (batch statistics,
the regulariser's ratios, the sign of a gradient) takes its means over all processes through
``Share.means``, whose backward pass is the mean as well: with L = mean over r of L_r and
y = mean over s of x_s, the gradient of L_r with respect to y, averaged over r, is what x_s gets.

A process alone computes exactly what it would compute without this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Share:
    """This process's part.

    Attributes:
        rank: number of the process, from 0; the first one writes files.
        count: of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def rows(self, values: Tensor) -> Tensor:
        """This process's rows, [N / count, ...], of what concerns the whole batch, [N, ...]."""
        size = len(values) // self.count
        return values if self.count == 1 else values[self.rank * size : (self.rank + 1) * size]

    def means(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The mean over the processes of each of ``values``, of one shape, differentiably."""
        if self.count == 1:
            return values
        return tuple(_averaged(torch.stack(values)).unbind())

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, differentiably."""
        return self.means(values)[0]

    def moments(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over the whole batch from those of the parts."""
        if self.count == 1:
            return mean, variance
        whole = self.mean(mean)
        return whole, self.mean(variance + (mean - whole) ** 2)

    def largest(self, values: Tensor) -> Tensor:
        """The largest over the processes, element by element, without gradient."""
        return self._reduced(values, distributed.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, without gradient."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.count == 1:
            return values
        result = values.detach().clone()
        distributed.all_reduce(result, operation)
        return result

    def replicated(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The same weights, whose gradient is the mean over the processes."""
        if self.count == 1:
            return weights
        values: tuple[Tensor, ...] = _Replicated.apply(*weights.values())  # type: ignore[assignment]
        return dict(zip(weights, values, strict=True))

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by the mean over the processes."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient, mean in zip(gradients, _averages(gradients), strict=True):
            gradient.copy_(mean)


ALONE = Share()


def _averages(values: Iterable[Tensor]) -> list[Tensor]:
    """The mean over the processes of each of ``values``, in one message."""
    parts = list(values)
    flat = torch.cat([part.flatten() for part in parts])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


def _averaged(values: Tensor) -> Tensor:
    """The mean over the processes, forwards and backwards."""
    result: Tensor = _Mean.apply(values)  # type: ignore[assignment]
    return result


class _Mean(torch.autograd.Function):
    """Mean over the processes; the gradient is averaged too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        del ctx
        return _averages([values])[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return _averages(gradients)[0]


class _Replicated(torch.autograd.Function):
    """The identity; the gradients are averaged over the processes."""

    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
        del ctx
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        del ctx
        return tuple(_averages(gradients))
